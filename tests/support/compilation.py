"""Programs compiled quickly: the same arithmetic by plainer machine code, in a third of the time.

Most of the time of a suite of small programs is their compilation. A law about sizes, names,
choices, or sums within a tolerance does not depend on how well the code is optimized. A law on
bits in differently compiled programs, on fences, memory or FLOPs does: there the optimizer is the
adversary, so the files of those laws are compiled as users compile theirs, and a file that is not
listed here is too. `COMPILED=quickly` runs the files that are listed, compiled so,
and `COMPILED=fully` the others; .ci/check does both. Without it all files run, compiled fully.
"""

import importlib.metadata
import os
import pathlib

_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Later lines, which have no other emitters, stop at a flag they do not know.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")

QUICKLY = {"XLA_FLAGS": " ".join(_FLAGS)}  # of the environment, for JAX reads it once

_ANYHOW = {
    ".": ["README.md", "unitscale_jax"],
    "tests": [
        "checkpoint",
        "compaction",
        "prune",
        "support",
        "test_bridge.py",
        "test_checkpoint.py",
    ],
    "tests/distill": ["test_cache.py", "test_distilled.py", "test_features.py", "test_losses.py"],
    "tests/examples": ["test_data.py", "test_minilm.py"],
    "tests/laws": ["test_pairs.py", "test_parallel_zoo.py"],
    "tests/parallel": [
        *["test_data.py", "test_experts.py", "test_gathered.py", "test_generation.py"],
        *["test_infer.py", "test_layout.py", "test_merge.py", "test_pipeline.py"],
        *["test_sequence.py", "test_stack.py", "test_tensor.py", "test_vocabulary.py"],
    ],
    "tests/unit": [
        *["test_constraint.py", "test_ops.py", "test_residual.py"],
        *["test_unit_scaled.py"],
    ],
    "tests/precision": ["test_autocast.py"],
    "tests/quant": ["test_gptq.py", "test_gradient.py", "test_roles.py"],
    "tests/trace": ["test_dims.py", "test_provenance.py", "test_reach.py", "test_zeros.py"],
}


def environment() -> dict[str, str]:
    """What `COMPILED` adds to the environment."""
    return QUICKLY if os.environ.get("COMPILED") == "quickly" else {}


def is_left_out(path: pathlib.Path, root: pathlib.Path) -> bool:
    """Whether `COMPILED` does not ask for the file at `path`."""
    asked = os.environ.get("COMPILED")
    assert asked in (None, "quickly", "fully"), f"COMPILED={asked} is neither quickly nor fully"
    return asked is not None and (asked == "quickly") != any_compilation_will_do(path, root)


def any_compilation_will_do(path: pathlib.Path, root: pathlib.Path) -> bool:
    """Whether no law of the file at `path` is about what the compiler makes of a program."""
    within = lambda listed: any(
        path.is_relative_to(root / folder / name) for folder in listed for name in listed[folder]
    )
    return within(_ANYHOW)
