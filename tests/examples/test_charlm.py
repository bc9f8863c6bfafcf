"""Laws of the main job: its command line, its samples, its score, and that a killed run goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from charlm import cli, model as gpt, score as scoring, train as training

import unitscale_jax as us
from tests.examples.support import ENV, EXAMPLES

pytestmark = pytest.mark.whole

LENGTH = 16


def command(*flags):
    return [sys.executable, str(EXAMPLES / "charlm"), *map(str, flags)]


def run(*flags):
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=300, env=ENV)


def settings_of(*flags):
    return cli.read_settings(cli.make_parser(), list(map(str, flags)))


@pytest.fixture(scope="module")
def model():
    flags = ("--smallest", "--length", LENGTH, "--out", "absent")
    return gpt.build(settings_of(*flags))


# --- the command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], "--steps: expected a whole number, at least 1, got '0'"),
        (["--rate", "fast"], "--rate: expected a number above 0, got 'fast'"),
        (["--rate", "nan"], "--rate: expected a number above 0, got 'nan'"),
        (
            ["--seed", str(2**32)],
            "--seed: expected a whole number from 0 to 2^32 - 1, got '4294967",
        ),
        (["--temperature", "-1"], "--temperature: expected a number, at least 0, got '-1'"),
        (["--policy", "float8"], "--policy: invalid choice: 'float8'"),
        (["--quantize", "int3"], "--quantize: invalid choice: 'int3'"),
        (["--fp8"], "--fp8 has scale 1, which only values near 1 fit; add --unit-scaled"),
        (["--long", "--smallest"], "--smallest: not allowed with argument --long"),
        (["--width", "30", "--heads", "4"], "--heads 4 does not divide --width 30"),
        (["--parts", "9", "--rows", "8"], "--parts 9 exceeds --rows 8"),
        (["--mesh", "data=2,rows=4"], "--mesh: expected sizes of data, tensor, pipe, as data=2"),
        (["--mesh", "data=8", "--parts", "5"], "--mesh data=8 leaves each device 4 of --rows 32"),
        (["--mesh", "data=4,pipe=2"], "--mesh pipe=2 does not divide --layers 3"),
        (["--data", "absent.txt"], "--data: absent.txt does not exist. Name a file or a folder"),
        (["--resume", "--out", "absent"], "--resume: absent holds no run"),
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
    ],
)
def test_a_bad_flag_gets_one_clear_line(capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)  # should a flag be taken after all, its run is not in ours
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.count("\n") == 1 and words in message


def test_text_too_short_for_a_window_gets_one_clear_line(capsys, tmp_path):
    (tmp_path / "text").write_text("short " * 30)
    with pytest.raises(SystemExit):
        cli.main(["--data", str(tmp_path / "text"), "--out", str(tmp_path / "out")])
    assert "leaves 18 bytes to test on, which --length 128 exceeds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_explains_every_flag():
    for action in cli.make_parser()._actions:
        assert action.help, action.option_strings


def test_a_flag_wins_over_its_size_and_the_size_over_the_default():
    settings = settings_of("--smallest", "--width", "64")
    assert (settings.width, settings.layers) == (64, cli.PRESETS["smallest"]["layers"])
    assert settings.parts == cli.PRESETS["default"]["parts"]


# --- the model, its score and its samples


def test_a_byte_is_predicted_from_those_before_it_alone(model):
    apply, params = model
    text = np.random.default_rng(0).integers(0, 256, (1, LENGTH))
    for place in (1, LENGTH // 2, LENGTH - 1):
        other = text.copy()
        other[0, place] ^= 1
        same = np.all(
            apply(params, jnp.asarray(text)) == apply(params, jnp.asarray(other)), axis=-1
        )
        assert np.array_equal(same[0], np.arange(LENGTH) < place)


@pytest.mark.parametrize("policy", ["float32", "bfloat16", "float16"])
@pytest.mark.usefixtures("relaxed_promotion")
def test_every_dot_of_the_model_is_in_the_dtype_of_the_policy(policy):
    flags = ("--smallest", "--length", LENGTH, "--policy", policy, "--out", "absent")
    apply, params = gpt.build(settings_of(*flags))
    lowered = jax.jit(apply).lower(params, jnp.zeros((2, LENGTH), jnp.int32)).as_text()
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[policy]
    dots = re.findall(r"dot_general .* : \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", lowered)
    assert dots == [(short, short)] * 7  # four dense layers, two dots of attention, the head


@pytest.mark.parametrize(
    "flags", [("--quantize", "int8"), ("--quantize", "int4"), ("--unit-scaled", "--fp8")]
)
@pytest.mark.usefixtures("relaxed_promotion")
def test_what_is_served_is_what_was_trained_to_the_bit(flags):
    settings = settings_of("--smallest", "--length", LENGTH, *flags, "--out", "absent")
    apply, _, run = training.start(settings)
    codes = gpt.serving(settings, run["params"])[1]
    narrow = (jnp.int8, jnp.int4, jnp.float8_e4m3fn)
    kernels = [leaf for leaf in jax.tree.leaves(codes) if leaf.dtype in narrow]
    assert sum(leaf.size for leaf in kernels) > 0.2 * us.tree.size(run["params"])
    text = jnp.arange(2 * LENGTH, dtype=jnp.int32).reshape(2, LENGTH) % 256
    trained, served = (jax.jit(apply)(tree, text) for tree in (run["params"], codes))
    chex.assert_trees_all_equal(served, trained)
    exact = gpt.build(settings)[0](run["params"], text)
    assert not np.array_equal(served, exact)


@pytest.mark.parametrize("size", [LENGTH, LENGTH + 1, 5 * LENGTH - 3, 70 * LENGTH + 9])
def test_the_score_counts_every_byte_once(model, size):
    apply, params = model
    text = np.random.default_rng(1).integers(0, 256, size).astype(np.uint8)
    # A model that knows nothing of context, so that the score is a plain mean over the bytes.
    log_p = jax.nn.log_softmax(jnp.linspace(-2, 2, 256))
    blind = lambda _, text: jnp.broadcast_to(log_p, (*text.shape, 256))
    score = scoring.make_score(blind, text, LENGTH)
    np.testing.assert_allclose(score(params), -np.mean(log_p[text]) / np.log(2), rtol=1e-5)


def test_samples_continue_the_prompt_past_the_window(model):
    _, params = model

    def sums(_, text):  # the next byte is the sum of the last and of that three before it, plus one
        before = jnp.pad(text, ((0, 0), (3, 0)))[:, : text.shape[1]]
        return jax.nn.one_hot((text + before + 1) % 256, 256) * 50

    sample = scoring.make_sampler(sums, LENGTH, 2 * LENGTH)
    for prompt in (b"0", b"012345", bytes(range(40)), bytes(range(LENGTH))):
        seen = [0, 0, 0, *prompt]
        for _ in range(2 * LENGTH):
            seen.append((seen[-1] + seen[-4] + 1) % 256)
        assert list(sample(params, prompt, 0.0, jax.random.key(0))) == seen[-2 * LENGTH :]


def test_samples_follow_the_probabilities_at_their_temperature():
    logits = jnp.full(256, -jnp.inf).at[jnp.array([65, 66])].set(jnp.array([0.0, 1.0]))
    fixed = lambda _, text: jnp.broadcast_to(logits, (*text.shape, 256))
    drawn = scoring.make_sampler(fixed, LENGTH, 4000)({}, b"", 2.0, jax.random.key(3))
    expected = 1 / (1 + np.exp(-1 / 2))
    assert set(drawn) == set(b"AB")
    assert abs(drawn.count(b"B") / 4000 - expected) < 5 * np.sqrt(expected / 4 / 4000)


def test_generation_is_compiled_once_for_any_prompt(model):
    apply, params = model
    traces = []
    counted = lambda params, text: traces.append(0) or apply(params, text)
    sample = scoring.make_sampler(counted, LENGTH, 4)
    for prompt in (b"a", b"def f(x):", b"import os, sys, time"):
        sample(params, prompt, 0.5, jax.random.key(0))
    assert len(traces) == 1


def test_the_curve_of_a_resumed_run_ends_where_the_run_resumes(tmp_path):
    path = tmp_path / "curve.jsonl"
    for step in (10, 20, 30):
        training.Curve(path, until=step).append({"step": step, "train": 3.0})
    with path.open("a") as file:
        file.write('{"step": 40, "tr')  # what a kill leaves
    assert [point["step"] for point in training.Curve(path, until=20)] == [10, 20]
    assert len(path.read_text().splitlines()) == 2


# --- whole runs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of eight files, so that a run takes seconds."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.py").write_text(f"def f_{i}(x):\n    return x + {i}\n\n" * 40)
    return folder


def start_flags(text, out):
    return ("--smallest", "--data", text, "--steps", 60, "--every", 10, "--out", out)


def final(out):
    settings = cli.read_settings(cli.make_parser(), ["--resume", "--out", str(out)])
    with jax.numpy_dtype_promotion("standard"):
        _, _, like = training.start(settings)
    return us.Checkpoints(out / "checkpoints").restore(training.stored(like))


@pytest.mark.slow
def test_a_killed_run_continues_to_the_parameters_of_an_unbroken_run(text, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = run(*start_flags(text, whole), "--prompt", "def ")
    assert result.returncode == 0, result.stderr
    assert "this model" in result.stdout and "order-4 n-gram" in result.stdout
    assert (whole / "curve.png").read_bytes()[1:4] == b"PNG"

    killed = kill_after_first_checkpoint(broken, *start_flags(text, broken))
    assert killed < 60
    again = run(*start_flags(text, broken))
    assert again.returncode == 2 and "continue it with --resume" in again.stderr
    other = run("--resume", "--out", broken, "--width", 64)
    assert other.returncode == 2 and "has --width 32, which resuming keeps" in other.stderr

    result = run("--resume", "--out", broken)
    assert result.returncode == 0, result.stderr
    (step, expected), (step_again, found) = final(whole), final(broken)
    assert step == step_again == 60
    chex.assert_trees_all_equal(jax.tree.map(bits, found), jax.tree.map(bits, expected))
    points = [point["step"] for point in curve_of(broken)]
    assert points == sorted(set(points)) and points[-1] == 60


def kill_after_first_checkpoint(out, *flags):
    process = subprocess.Popen(command(*flags), stdout=subprocess.DEVNULL, env=ENV)
    checkpoints = us.Checkpoints(out / "checkpoints")
    deadline = time.monotonic() + 200
    while not checkpoints.steps() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    return checkpoints.steps()[-1]


def curve_of(out):
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def bits(leaf):
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


is_key = lambda leaf: (
    isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_a_run_in_sixteen_bits_learns(text, tmp_path, policy):
    result = run(*start_flags(text, tmp_path / "out"), "--policy", policy, "--parts", 3)
    assert result.returncode == 0, result.stderr
    points = curve_of(tmp_path / "out")
    assert points[-1]["test"] < points[0]["train"] - 2


@pytest.mark.slow
@pytest.mark.usefixtures("relaxed_promotion")
def test_a_mesh_changes_neither_the_run_nor_who_can_go_on_with_it(text, tmp_path, capsys):
    small = ["--smallest", "--data", text, "--layers", 2, "--steps", 6, "--every", 6]
    small += ["--test-bytes", 600, "--sample-bytes", 30]
    one, meshed = tmp_path / "one", tmp_path / "meshed"

    def printed(*flags):
        cli.main([str(flag) for flag in flags])
        return re.findall(r"this model +(\S+)|temperature 0.7:\n\n(.*)", capsys.readouterr().out)

    expected = printed(*small, "--out", one)
    assert printed(*small, "--out", meshed, "--mesh", "data=2,tensor=2,pipe=2") == expected
    (first, other) = (curve_of(out)[-1] for out in (one, meshed))
    np.testing.assert_allclose(list(other.values()), list(first.values()), rtol=1e-5)
    resumed = ["--resume", "--out", meshed, "--mesh", "data=4,tensor=2", "--zero", 3]
    assert printed(*resumed, "--sample-bytes", 30) == expected
