"""Laws of the examples' text: how it is split, and the scores to beat on it."""

import lzma
import pathlib
import sysconfig

import numpy as np
import pytest
from charlm import data
from hypothesis import given, strategies as st

pytestmark = pytest.mark.whole


def as_text(string):
    return np.frombuffer(string, np.uint8)


def written(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


@pytest.fixture(scope="module")
def library():
    return data.standard_library()


def test_the_library_is_split_by_top_level_name(library):
    assert {data.top_level(name) for name in library.test_files} == set(data.HELD_OUT)
    assert not {data.top_level(name) for name in library.train_files} & set(data.HELD_OUT)


def test_whole_files_are_held_out_and_none_is_on_both_sides(library):
    assert not set(library.train_files) & set(library.test_files)
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for files, text in [(library.train_files, library.train), (library.test_files, library.test)]:
        assert b"".join((root / name).read_bytes() for name in files) == text.tobytes()


def test_the_library_has_no_tables_and_no_tests(library):
    for name in [*library.train_files, *library.test_files]:
        assert not set(name.split("/")) & {"test", "tests", "site-packages", "encodings", "idlelib"}
        assert not name.startswith(("_sysconfigdata", "config-"))


def test_the_files_of_a_folder_come_before_its_subfolders(tmp_path):
    written(tmp_path, {"b.py": b"", "a/z.py": b"", "a/b/c.py": b"", "c.py": b"", "tests/t.py": b""})
    assert list(data.walk(tmp_path)) == ["b.py", "c.py", "a/z.py", "a/b/c.py"]


@pytest.mark.parametrize("count", [2, 3, 12, 60])
def test_a_folder_is_split_by_name_whatever_else_it_holds(tmp_path, count):
    files = {f"{i % 3}/{i}.txt": bytes([65 + i % 26]) * 9 for i in range(count)}
    few = data.files_below(written(tmp_path / "few", files))
    assert few.train_files and few.test_files
    assert {*few.train_files, *few.test_files} == set(files)
    assert b"".join(files[name] for name in few.test_files) == few.test.tobytes()
    more = data.files_below(written(tmp_path / "more", files | {f"x{i}": b"x" for i in range(40)}))
    of_old = {name for name in files if data.fold(name) == 0}
    assert of_old <= set(few.test_files) and of_old <= set(more.test_files)


def test_a_folder_gives_only_its_text(tmp_path):
    files = {"a.txt": b"text", "b.txt": b"more", "c.bin": b"a\0b", "empty": b"", ".hidden": b"no"}
    corpus = data.files_below(written(tmp_path, files))
    assert {*corpus.train_files, *corpus.test_files} == {"a.txt", "b.txt"}


def test_of_one_file_the_end_is_held_out(tmp_path):
    text = bytes(range(1, 102))
    corpus = data.files_below(written(tmp_path, {"one": text}) / "one")
    assert corpus.train.tobytes() + corpus.test.tobytes() == text
    assert len(corpus.test) == 10


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "absent", "absent does not exist. Name a file or a folder"),
        ({"a": b"text"}, "", "holds 1 text files; holding out needs two"),
        ({"a": b"text"}, "a", "a holds 4 bytes, too few"),
    ],
)
def test_an_error_says_what_is_missing(tmp_path, files, path, message):
    with pytest.raises(ValueError, match=message):
        data.files_below(written(tmp_path, files) / path)


def slow_witten_bell(train, context, byte, order):
    """The recursion as it is written, counting by search; `context` is the text before `byte`."""
    if order < 0:
        return 1 / 256
    shorter = slow_witten_bell(train, context, byte, order - 1)
    if len(context) < order:
        return shorter
    history = context[len(context) - order :]
    places = range(len(train) - order)
    after = [train[i + order] for i in places if train[i : i + order] == history]
    if not after:
        return shorter
    kinds = len(set(after))
    return (after.count(byte) + kinds * shorter) / (len(after) + kinds)


alphabets = st.sampled_from([b"ab", b"abc\xff", bytes(range(256))])
texts = alphabets.flatmap(lambda a: st.lists(st.sampled_from(a), min_size=6, max_size=30))


@given(train=texts.map(bytes), test=texts.map(bytes))
def test_ngrams_equal_the_slow_recursion(train, test):
    for order, found in enumerate(data.witten_bell(as_text(train), as_text(test), 4)):
        expected = [slow_witten_bell(train, test[:i], byte, order) for i, byte in enumerate(test)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("context", [b"", b"the ", b"qqqq", b"e th", b"\0\xff\0\xff"])
def test_probabilities_of_the_256_bytes_sum_to_one(context):
    train = as_text(b"the other thing, the theme of them all" + bytes(range(256)))
    last = [
        [float(p[-1]) for p in data.witten_bell(train, as_text(context + bytes([byte])), 6)]
        for byte in range(256)
    ]
    np.testing.assert_allclose(np.sum(last, axis=0), np.ones(7), rtol=1e-12)


def test_bits_are_those_of_the_probabilities():
    train, test = as_text(b"abracadabra" * 9), as_text(b"abrabracad" * 7)
    each = [-np.log2(p).sum() / len(test) for p in data.witten_bell(train, test, 3)]
    bits = data.ngram_bits(train, test, (1, 3))
    assert list(bits) == [1, 3] and np.allclose(list(bits.values()), [each[1], each[3]])


def test_more_context_predicts_the_library_better_up_to_order_four(library):
    bits = data.ngram_bits(library.train, library.test, range(6))
    assert bits[0] > bits[1] > bits[2] > bits[3] > bits[4] < bits[5]
    assert 1.9 < bits[4] < 2.2  # 2.03 and 2.02 for 3.11 and 3.12


def test_xz_is_the_size_of_the_packed_text():
    text = as_text(b"a b c " * 500)
    assert data.xz_bits(text) == 8 * len(lzma.compress(text.tobytes(), preset=9)) / 3000
