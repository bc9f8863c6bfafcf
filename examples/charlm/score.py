"""What a model is worth: bits per byte of held-out text, samples, and a drawing of its curve."""

import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from charlm import data
from charlm.model import losses
from charlm.train import Curve

ORDERS = (1, 2, 3, 4)  # longer n-grams do worse on six megabytes of text
EVAL_ROWS = 32  # windows scored at once


def make_score(apply, text: np.ndarray, length: int):
    """Returns `score(params, windows=None)`: bits per byte of all of `text`, or of some windows.

    A window is `length` bytes, predicted from those before them in the window and one more, so a
    byte is seen with half a window of context on average.
    """
    costs_of = jax.jit(lambda params, text: losses(apply(params, text[:, :-1]), text[:, 1:]))
    before = np.concatenate([np.frombuffer(b"\n", np.uint8), text])
    all_starts = np.arange(0, len(text), length)

    def score(params, windows: int | None = None) -> float:
        some = len(all_starts) if windows is None else min(windows, len(all_starts))
        starts = all_starts[np.linspace(0, len(all_starts) - 1, some).astype(int)]
        total = count = 0
        for i in range(0, len(starts), EVAL_ROWS):
            # The last window, and the last rows, are moved back or repeated: one compilation.
            nominal = np.resize(starts[i : i + EVAL_ROWS], EVAL_ROWS)
            actual = np.minimum(nominal, len(text) - length)
            costs = costs_of(
                params, before[actual[:, None] + np.arange(length + 1)].astype(np.int32)
            )
            fresh = actual[:, None] + np.arange(length) >= nominal[:, None]
            fresh[len(starts) - i :] = False
            total += np.sum(np.where(fresh, costs, 0), dtype=np.float64)
            count += np.sum(fresh)
        return float(total / count / math.log(2))

    return score


def make_sampler(apply, length: int, count: int):
    """Returns `sample(params, prompt, temperature, key) -> bytes`, compiled once for any prompt."""

    @jax.jit
    def draw(params, window, filled, temperature, key):
        def next_byte(carry, key):
            window, filled = carry
            logits = apply(params, window[None])[0, filled - 1]  # f32 (256,)
            # The largest of logits / t + Gumbel noise is a draw from softmax(logits / t); times
            # t it also holds at t = 0, where it is the likeliest byte.
            noise = temperature * jax.random.gumbel(key, logits.shape)
            byte = jnp.argmax(logits + noise).astype(window.dtype)
            shifted = jnp.where(filled < length, window, jnp.roll(window, -1))
            place = jnp.minimum(filled, length - 1)
            return (shifted.at[place].set(byte), place + 1), byte

        return jax.lax.scan(next_byte, (window, filled), jax.random.split(key, count))[1]

    def sample(params, prompt: bytes, temperature: float, key) -> bytes:
        seen = np.frombuffer(prompt or b"\n", np.uint8)[-length:]
        window = np.zeros(length, np.int32)
        window[: len(seen)] = seen
        drawn = draw(params, window, np.int32(len(seen)), np.float32(temperature), key)
        return bytes(np.asarray(drawn, np.uint8))

    return sample


def baselines(corpus: data.Corpus) -> dict[str, float]:
    ngrams = data.ngram_bits(corpus.train, corpus.test, ORDERS)
    scores = {f"order-{order} n-gram": bits for order, bits in ngrams.items()}
    return scores | {"xz -9 of the test text": data.xz_bits(corpus.test)}


def draw_curve(path: pathlib.Path, curve: Curve, scores: dict[str, float], title: str) -> None:
    tests = [point for point in curve if "test" in point]
    lowest = min(*scores.values(), *(point["test"] for point in tests))
    figure = matplotlib.figure.Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="bits per byte")
    # The first steps, near 8 bits, would press all that matters into a corner.
    axes.set_ylim(lowest - 0.15, max(scores.values()) + 0.5)
    axes.plot([p["step"] for p in curve], [p["train"] for p in curve], lw=1, label="training")
    axes.plot([p["step"] for p in tests], [p["test"] for p in tests], "o-", ms=4, label="held out")
    beside = dict(xycoords=("axes fraction", "data"), va="center", fontsize=8)
    for name, bits in scores.items():
        axes.axhline(bits, color="gray", lw=0.8, ls=":" if "xz" in name else "--")
        axes.annotate(f"{name} {bits:.2f}", (1.01, bits), annotation_clip=False, **beside)
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=100)
