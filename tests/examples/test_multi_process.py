"""Laws of the example of several processes, which starts itself."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.examples.support import EXAMPLES, load

pytestmark = pytest.mark.whole

multi_process = load("multi_process")


@pytest.mark.slow
def test_a_run_of_which_one_process_was_killed_ends_where_one_device_does():
    command = [sys.executable, str(EXAMPLES / "multi_process.py"), "--smallest", "--kill"]
    env = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout
    seconds = float(re.search(r"process 0 ended (\S+) seconds later", said)[1])
    assert seconds < multi_process.HEARTBEAT + 5
    assert "goes on from step 2, on {'dp': 2, 'tp': 4}" in said
    together, alone = said.split("one process, one device")
    steps = dict(re.findall(r"step +(\d+)  (\S+) bits", together))
    expected = dict(re.findall(r"step +(\d+)  (\S+) bits", alone))
    assert list(steps) == list(expected) == ["2", "4", "6"]
    for step, bits in expected.items():
        assert abs(float(steps[step]) - float(bits)) < 2e-3
    worst = float(re.search(r"after 6 steps the parameters differ by (\S+) of", alone)[1])
    assert worst < 1e-4


def test_the_text_of_a_step_depends_on_the_step_alone():
    size, text = multi_process.SIZES["smallest"], np.arange(1000)
    first = multi_process.windows(text, size, 3)
    assert first.shape == (size["rows"], size["length"] + 1)
    np.testing.assert_array_equal(multi_process.windows(text, size, 3), first)
    assert not np.array_equal(multi_process.windows(text, size, 4), first)
    np.testing.assert_array_equal(np.diff(first, axis=1), 1)


def test_a_process_that_fails_is_shown_with_its_error(tmp_path, capfd):
    class Settings:
        folder, size = tmp_path, "smallest"

    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    multi_process.errors_of(Settings, 0).write_text("what went wrong")
    with pytest.raises(SystemExit, match="process 0 ended with 3:\nwhat went wrong"):
        multi_process.all_end_well(Settings, [process])
