"""Trains a small byte-level GPT on source code, and tells what it is worth.

    python examples/charlm                       about three minutes on two CPU cores
    python examples/charlm --resume              continues where it was stopped or killed
    python examples/charlm --resume --prompt "class "
    python examples/charlm --data FOLDER --out runs/mine
    python examples/charlm --mesh data=2,tensor=2,pipe=2 --layers 4

The model is plain Flax NNX. From the library come mixed precision (`autocast`), training on 8-bit
integers and serving from them (`quantized`, `quantize`), exact accumulation of micro-batches
(`accumulated`), a loss scale for float16 (`loss_scaled`), checkpoints from which a killed run
continues bit for bit, and with `--mesh` data, tensor and pipeline parallelism (`parallel`). Its
score, in bits per byte of files it never saw, stands beside those of byte n-grams and of xz on the
same files.
"""
