"""Checkpoints: whole or refused, and the previous one is never touched.

    directory/
      step_00000300/
        SHA256SUMS      a digest of every other file; `sha256sum -c SHA256SUMS` checks it by hand
        manifest.json   format, step, and of every leaf its name, shape and dtype
        arrays/         the arrays as orbax stores them: the shards of process 0, of process 1, ..
      step_00000400/

A save writes everything under another name, forces it to the disk and then renames the directory,
which POSIX does at once or not at all: a process killed at any moment leaves the earlier
checkpoints as they were. A restore computes every digest before it believes anything.
"""

from unitscale_jax.checkpoint._checkpoints import Checkpoints
from unitscale_jax.checkpoint._compressed_tensors import export_compressed_tensors
from unitscale_jax.checkpoint._safetensors import load, save

__all__ = ["Checkpoints", "export_compressed_tensors", "load", "save"]
