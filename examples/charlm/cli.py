"""The command line of the main job: flags, their checks, and the order of a run.

Nobody has to read this file to learn from the example; model.py and train.py are for that.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import sys

import jax
import rich.console

import unitscale_jax as us
from charlm import data
from charlm.model import QUANTIZE, serving
from charlm.score import baselines, draw_curve, make_sampler, make_score
from charlm.train import Curve, restored, start, train

PRESETS = {
    "default": dict(
        **dict(steps=700, rows=32, length=128, parts=2, width=96, layers=3, heads=2),
        **dict(rate=5e-3, every=100, test_bytes=None, sample_bytes=600),
    ),
    "long": dict(steps=3000, rows=16, length=256, width=128, layers=4, heads=4, rate=4e-3),
    "smallest": dict(
        **dict(steps=20, rows=8, length=32, width=32, layers=1, every=5),
        **dict(test_bytes=20_000, sample_bytes=50),
    ),
}
# What a run cannot change when it is resumed; the rest may differ from one session to the next.
FIXED = ("data", "steps", "rows", "length", "parts", "width", "layers", "heads", "rate", "policy")
FIXED += ("quantize", "unit_scaled", "seed")
MESH = {"data": 1, "tensor": 1, "pipe": 1}  # rows, heads and channels, layers


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage that --help gives."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, least, expected: str, below=math.inf):
    """An argparse type that says what was expected."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < below:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


def mesh_sizes(text: str) -> dict[str, int]:
    """An argparse type: `data=2,pipe=4` as sizes of all axes."""
    found = re.findall(r"(?:^|,)(\w+)=([1-9]\d*)(?=,|$)", text)
    sizes = {axis: int(size) for axis, size in found}
    if len(sizes) != text.count(",") + 1 or not sizes.keys() <= MESH.keys():
        raise argparse.ArgumentTypeError(
            f"expected sizes of {', '.join(MESH)}, as data=2,tensor=2,pipe=2, got {text!r}"
        )
    return MESH | sizes


def by_size(name: str) -> str:
    """What a flag is when it is left out."""
    default = PRESETS["default"][name]
    others = [f"--{size} {PRESETS[size].get(name, default)}" for size in ("long", "smallest")]
    return f" (default: {', '.join([str(default), *others])})"


def make_parser() -> Parser:
    at_least = lambda n: number(int, n, f"a whole number, at least {n}")
    positive = number(float, sys.float_info.min, "a number above 0")
    parser = Parser(
        prog="charlm",
        description="Trains a small byte-level GPT on source code, and reports bits per byte of "
        "held-out files beside byte n-grams and xz. Writes checkpoints, curve.jsonl and curve.png.",
    )
    flag = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--long",
        dest="size",
        action="store_const",
        const="long",
        help="train longer, 20 to 40 minutes on two CPU cores, past the best n-gram",
    )
    size.add_argument(
        "--smallest",
        dest="size",
        action="store_const",
        const="smallest",
        help="run everything once in its smallest form, about 15 seconds",
    )
    flag(
        "--data",
        type=pathlib.Path,
        metavar="PATH",
        help="a text file or a folder of them (default: the source of the standard library)",
    )
    flag(
        "--out",
        type=pathlib.Path,
        metavar="FOLDER",
        help="where checkpoints and curve go (default: runs/charlm, runs/charlm_long, ...)",
    )
    flag(
        "--resume",
        action="store_true",
        help="continue the run in --out, with its flags; if it is finished, score and sample it",
    )
    flag("--steps", type=at_least(1), metavar="N", help="training steps" + by_size("steps"))
    flag(
        "--rows", type=at_least(1), metavar="N", help="pieces of text in a batch" + by_size("rows")
    )
    flag(
        "--length",
        type=at_least(2),
        metavar="N",
        help="bytes in a piece, the longest context" + by_size("length"),
    )
    flag(
        "--parts",
        type=at_least(1),
        metavar="N",
        help="micro-batches a batch is accumulated from; any number gives the same gradient "
        "up to rounding" + by_size("parts"),
    )
    flag("--width", type=at_least(1), metavar="N", help="width of the model" + by_size("width"))
    flag("--layers", type=at_least(1), metavar="N", help="blocks of the model" + by_size("layers"))
    flag(
        "--heads",
        type=at_least(1),
        metavar="N",
        help="attention heads; they divide the width" + by_size("heads"),
    )
    flag("--rate", type=positive, metavar="X", help="highest learning rate" + by_size("rate"))
    flag(
        "--policy",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the arithmetic, "
        "over float32 parameters; float16 scales the loss (default: bfloat16, on a CPU float32)",
    )
    flag(
        "--quantize",
        choices=tuple(QUANTIZE),
        help="trains on codes of the kernels, 8-bit or 4-bit in groups of 32, with 8-bit "
        "activations, and serves from them (default: int8)",
    )
    flag(
        "--fp8",
        dest="quantize",
        action="store_const",
        const="fp8",
        help="the same as --quantize fp8: 8-bit floats with scale 1, for --unit-scaled alone",
    )
    flag(
        "--unit-scaled",
        action="store_true",
        default=None,
        help="gives the model the factors of unit scaling and the learning rates of u-muP; no "
        "gradient is clipped, and no loss is scaled",
    )
    flag(
        "--mesh",
        type=mesh_sizes,
        metavar="SIZES",
        help="devices in three directions, such as data=2,tensor=2,pipe=2: rows, heads and "
        "channels, layers; on a CPU it makes them. A resumed run may have another one (default: "
        "one device)",
    )
    flag(
        "--zero",
        type=int,
        choices=(0, 1, 2, 3),
        help="on a mesh, what is divided over the rows' devices: 1 and 2 the optimizer's state, 3 "
        "parameters too (default: 0)",
    )
    flag(
        "--seed",
        type=number(int, 0, "a whole number from 0 to 2^32 - 1", below=2**32),
        metavar="N",
        help="of the parameters, batches and samples (default: 0)",
    )
    flag(
        "--every",
        type=at_least(1),
        metavar="N",
        help="steps from one validation and checkpoint to the next" + by_size("every"),
    )
    flag(
        "--test-bytes",
        type=at_least(1),
        metavar="N",
        help="score on the first N bytes of the held-out text alone (default: on all)",
    )
    flag(
        "--prompt", metavar="TEXT", default="def ", help="what samples begin with (default: 'def ')"
    )
    flag(
        "--temperature",
        type=number(float, 0, "a number, at least 0"),
        metavar="X",
        default=0.7,
        help="of the samples; 0 always takes the likeliest byte (default: %(default)s)",
    )
    flag(
        "--sample-bytes",
        type=at_least(1),
        metavar="N",
        help="bytes to sample" + by_size("sample_bytes"),
    )
    return parser


def read_settings(parser: Parser, argv) -> argparse.Namespace:
    """The flags given, over those of the resumed run, over those of the chosen size."""
    args = vars(parser.parse_args(argv))
    if args["mesh"]:  # before JAX looks for devices
        devices = max(math.prod(args["mesh"].values()), jax.config.jax_num_cpu_devices)
        jax.config.update("jax_num_cpu_devices", devices)
    size, resume = args.pop("size"), args["resume"]
    out = args["out"] = args["out"] or pathlib.Path("runs", f"charlm_{size}" if size else "charlm")
    defaults = PRESETS["default"] | dict(
        **dict(policy=default_policy(), quantize="int8", seed=0, data=None, mesh=None, zero=0),
        unit_scaled=False,
    )
    if args["unit_scaled"]:  # rates of u-muP are in units of the parameters, which are near 1
        defaults["rate"] = 0.5
    wanted = PRESETS.get(size, {}) | {k: v for k, v in args.items() if v is not None}
    saved = saved_settings(out) if resume else {}
    if resume and not saved:
        parser.error(f"--resume: {out} holds no run; leave --resume out to begin one")
    for name in FIXED if resume else ():
        if name in wanted and str(wanted[name]) != str(saved[name]):
            flag = f"--{name}"
            parser.error(
                f"{flag} {wanted[name]}: the run in {out} has {flag} {saved[name]}, which resuming "
                "keeps; leave the flag out, or begin another run with another --out"
            )
    settings = argparse.Namespace(**defaults | saved | wanted)
    check(parser, settings)
    return settings


def default_policy() -> str:
    # On two CPU cores a step in bfloat16 takes as long (JAX 0.10) or nearly twice as long (0.12).
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check(parser: Parser, settings: argparse.Namespace) -> None:
    """What no flag can check alone."""
    if settings.width % settings.heads:
        parser.error(f"--heads {settings.heads} does not divide --width {settings.width}")
    if settings.parts > settings.rows:
        parser.error(f"--parts {settings.parts} exceeds --rows {settings.rows}")
    if settings.quantize == "fp8" and not settings.unit_scaled:
        parser.error("--fp8 has scale 1, which only values near 1 fit; add --unit-scaled")
    if settings.mesh:
        check_mesh(parser, settings)
    if not settings.resume and (old := saved_settings(settings.out)):
        steps = us.Checkpoints(settings.out / "checkpoints").steps()
        if steps and steps[-1] < old["steps"]:
            parser.error(
                f"{settings.out} holds a run stopped at step {steps[-1]} of {old['steps']}; "
                "continue it with --resume, or name another --out"
            )


def check_mesh(parser: Parser, settings: argparse.Namespace) -> None:
    data, pipe = settings.mesh["data"], settings.mesh["pipe"]
    devices = math.prod(settings.mesh.values())
    if devices != jax.device_count():
        parser.error(f"--mesh has {devices} devices, and this machine {jax.device_count()}")
    if settings.unit_scaled and pipe > 1:
        parser.error("--unit-scaled sees the whole model, and --mesh pipe cuts it in stages")
    if settings.layers % pipe:
        parser.error(f"--mesh pipe={pipe} does not divide --layers {settings.layers}")
    if settings.parts * data > settings.rows:
        parser.error(
            f"--mesh data={data} leaves each device {settings.rows // data} of --rows "
            f"{settings.rows}, fewer than --parts {settings.parts}"
        )


def saved_settings(out: pathlib.Path) -> dict:
    path = out / "settings.json"
    before = {"quantize": "none", "unit_scaled": False}  # a run of before there was a choice
    return before | json.loads(path.read_text()) if path.exists() else {}


def open_run(parser: Parser, settings: argparse.Namespace, corpus: data.Corpus) -> None:
    """Writes the settings of a new run; of a resumed one, checks that its text is the same."""
    text = hashlib.sha256(corpus.train.tobytes()).hexdigest()
    if settings.resume:
        if settings.text != text:
            parser.error(f"--resume: {corpus.identity} has changed since {settings.out} began")
        return
    settings.text = text
    path = settings.out / "settings.json"
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        if path.exists():  # a run of this program, and no stopped one: `check` refuses those
            print(f"replacing the earlier run in {settings.out}")
            shutil.rmtree(settings.out / "checkpoints", ignore_errors=True)
        kept = [*FIXED, "every", "test_bytes", "sample_bytes", "text"]
        path.with_suffix(".new").write_text(
            json.dumps({name: getattr(settings, name) for name in kept}, default=str, indent=1)
        )
        os.replace(path.with_suffix(".new"), path)  # at once: a kill leaves no half of it
    except OSError as error:
        parser.error(f"--out {settings.out}: {error.strerror}")


def read_corpus(parser: Parser, settings: argparse.Namespace) -> data.Corpus:
    try:
        where = settings.data
        corpus = data.files_below(pathlib.Path(where)) if where else data.standard_library()
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    corpus = corpus.first_of_test(settings.test_bytes)
    for role, text in (("train", corpus.train), ("test", corpus.test)):
        if len(text) <= settings.length:
            parser.error(
                f"--data: {corpus.identity} leaves {len(text)} bytes to {role} on, which --length "
                f"{settings.length} exceeds; give more text, or a shorter --length"
            )
    return corpus


def mesh_of(settings: argparse.Namespace):
    """The mesh of `--mesh`, to run under."""
    sizes = settings.mesh
    return jax.set_mesh(us.parallel.mesh(**sizes)) if sizes else contextlib.nullcontext()


def main(argv=None) -> None:
    parser = make_parser()
    settings = read_settings(parser, argv)
    corpus = read_corpus(parser, settings)
    open_run(parser, settings, corpus)
    with mesh_of(settings):
        run_on(parser, settings, corpus)


def run_on(parser: Parser, settings: argparse.Namespace, corpus: data.Corpus) -> None:
    """Everything that computes, on the mesh that is set, if any."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    apply, step, run = start(settings)
    checkpoints = us.Checkpoints(settings.out / "checkpoints")
    if settings.resume and checkpoints.steps():
        try:
            run = restored(settings, checkpoints, run)
        except ValueError as error:
            parser.error(f"--resume: {error}")
    console.print(f"{corpus}\n{describe(settings, run)}")

    scores = baselines(corpus)
    score = make_score(apply, corpus.test, settings.length)
    curve = Curve(settings.out / "curve.jsonl", until=run["position"])
    run = train(step, run, corpus, score, settings, curve, console)

    apply, codes = serving(settings, run["params"])
    scores = {"this model": make_score(apply, corpus.test, settings.length)(codes)} | scores
    if settings.quantize != "none":
        console.print(
            f"\nserved from {settings.quantize} codes: {us.tree.nbytes(codes) / 1e6:.2f} MB, in "
            f"float32 {us.tree.nbytes(run['params']) / 1e6:.2f} MB"
        )
    console.print("\nbits per byte of the held-out text (less is better)")
    for name, bits in sorted(scores.items(), key=lambda item: -item[1]):
        console.print(f"  {name:24s} {bits:.3f}")
    others = {name: bits for name, bits in scores.items() if name != "this model"}
    draw_curve(settings.out / "curve.png", curve, others, describe(settings, run))
    console.print(f"curve: {settings.out / 'curve.png'}")

    sample = make_sampler(apply, settings.length, settings.sample_bytes)
    key = jax.random.fold_in(run["key"], settings.steps)
    prompt = settings.prompt.encode("utf-8", "surrogateescape")
    text = prompt + sample(codes, prompt, settings.temperature, key)
    console.print(f"\nsampled at temperature {settings.temperature:g}:\n")
    console.print(text.decode("utf-8", "replace"), markup=False)


def describe(settings: argparse.Namespace, run) -> str:
    million = us.tree.size(run["params"]) / 1e6
    return (
        f"{million:.2f} M parameters, {settings.layers} layers of width {settings.width}; "
        f"{settings.steps} steps of {settings.rows} x {settings.length} bytes, {settings.policy}"
        f"{'' if settings.quantize == 'none' else f' and {settings.quantize}'}"
    )
