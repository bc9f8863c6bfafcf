"""The short examples: each runs, and the number that it prints is what its text promises."""

import pytest

from tests.examples.support import load

pytestmark = [pytest.mark.whole, pytest.mark.usefixtures("relaxed_promotion")]


def test_accumulation_takes_a_fraction_of_the_memory_and_gives_the_same_gradient():
    whole, in_parts, difference = load("accumulate").main()
    assert in_parts < whole / 4 and difference < 1e-5


def test_autocast_lowers_every_product():
    dtypes, error = load("autocast").main()
    assert dtypes == {"bfloat16": 5} and 0 < error < 0.02


def test_what_was_trained_is_what_is_served():
    differ, floats, codes = load("quantize").main()
    assert differ == 0 and codes < 0.3 * floats


def test_gradual_pruning_keeps_what_the_function_needs():
    found = load("prune").main()
    (dense, none), (gradual, zeros), (at_once, as_many) = found.values()
    assert none == 0 and zeros == as_many == pytest.approx(0.9, abs=1e-3)
    assert gradual < at_once and gradual < dense + 0.1


def test_a_compact_model_computes_the_same_with_half_of_the_work():
    before, after, difference = load("compact").main()
    assert after < 0.6 * before and difference < 1e-6


def test_a_teacher_is_worth_more_than_few_labels():
    teacher, alone, taught = load("distill").main().values()
    assert taught > alone + 0.1 and taught > teacher - 0.03


def test_a_step_on_a_mesh_is_that_of_one_device_with_no_reduction_in_a_loop():
    loops, difference = load("shard").main()
    assert loops == 0 and difference < 1e-6


def test_1f1b_does_not_grow_with_the_parts():
    memory, difference = load("pipeline").main()
    assert memory["1f1b", 32] <= memory["1f1b", 8] and difference < 1e-6
    assert memory["1f1b", 32] < memory["gpipe", 32]


def test_a_transform_of_ones_own_is_the_parameters_masked():
    assert load("rewrite").main() == 0


def test_gradients_of_a_model_that_nobody_edited_start_near_one_and_fit_in_eight_bits():
    away, losses = load("unit_scaling").main()
    assert away["unit-scaled"] < 4 < 8 < away["plain"]
    assert losses["float32"] < 2.7 and abs(losses["fp8"] - losses["float32"]) < 0.1


@pytest.mark.slow
def test_the_file_to_copy_learns_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = load("train")
    first = train.main(20)
    longer = train.main(40)
    assert longer < first < 8
    assert train.us.Checkpoints("runs/train").steps()[-1] == 40
    # A finished run is served again, also where fewer steps are asked for than it has.
    assert train.main(40) == train.main(20) == longer
