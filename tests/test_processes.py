"""Laws of what processes tell one another; those of several are in parallel/test_launch."""

import subprocess
import sys

import pytest

from unitscale_jax.processes import _as_it_was, agreed, together


def test_alone_a_call_is_a_call():
    assert agreed(lambda: {"a": 1}) == {"a": 1} and together(lambda: "b") == ["b"]
    for call in (agreed, together):
        with pytest.raises(ZeroDivisionError):
            call(lambda: 1 / 0)


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError, OSError])
def test_an_error_of_another_process_is_of_the_same_type(kind):
    error = _as_it_was(3, {"error": kind.__name__, "says": "what happened"})
    assert type(error) is kind and str(error) == "process 3: what happened"


@pytest.mark.parametrize("name", ["XlaRuntimeError", "UnicodeDecodeError", "SystemExit", "print"])
def test_what_cannot_be_made_again_is_a_runtime_error_that_names_it(name):
    error = _as_it_was(3, {"error": name, "says": "what happened"})
    assert type(error) is RuntimeError and str(error) == f"process 3: {name}: what happened"


def test_who_only_looks_at_checkpoints_asks_for_no_device(tmp_path):
    # On a TPU, a launcher that did would take the devices from the processes that it starts.
    program = (
        "import unitscale_jax as us, sys\n"
        "assert us.Checkpoints(sys.argv[1]).steps() == []\n"
        "import jax; jax.config.update('jax_num_cpu_devices', 3)\n"  # an error after a device
        "assert jax.device_count() == 3"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
