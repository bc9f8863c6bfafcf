"""Laws of several processes: they compute what one does, end together, and go on elsewhere.

All jobs of two processes run once, for the whole module.
"""

import json
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from tests.support import processes

pytestmark = pytest.mark.whole

TOLERANCE = dict(rtol=1e-5, atol=1e-6)
SLACK = 5  # seconds, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def ended(folder):
    """How the processes of each job ended: `ended[job][rank]`."""
    with (
        processes.Job("broken", folder) as broken,
        processes.Job("raising", folder) as raising,
        processes.Job("hanging", folder) as hanging,
    ):
        ends = dict(
            zip(
                ("broken", "raising", "hanging"),
                processes.ends_of(broken, raising, hanging),
                strict=True,
            )
        )
    with processes.Job("resumed", folder) as resumed:
        (ends["resumed"],) = processes.ends_of(resumed)
    return ends


@pytest.fixture(scope="module")
def told(ended, folder):
    """What each process of the resumed job found out."""
    assert [end.code for end in ended["resumed"]] == [0, 0], ended["resumed"]
    return [json.loads((folder / f"resumed_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def unbroken():
    """The run of six steps on one device: its losses, and where it ends."""
    mesh = mesh_of(1, 1)
    run, update = processes.fresh(mesh)
    return processes.train(run, update, mesh, 6), run


def mesh_of(dp, tp):
    return us.parallel.mesh(devices=jax.devices()[: dp * tp], dp=dp, tp=tp)


# --- one ends, all end


def test_when_one_is_killed_the_other_ends_after_the_heartbeat(ended):
    survivor, killed = ended["broken"]
    assert killed.code == -signal.SIGKILL and killed.after == 0
    assert survivor.code != 0 and survivor.after < processes.HEARTBEAT + SLACK
    assert "stopped sending heartbeats" in survivor.said


def test_an_exception_that_nobody_catches_ends_all(ended):
    waiting, raised = ended["raising"]
    assert raised.code == 1 and "ArithmeticError: what nobody catches" in raised.said
    assert raised.after == 0  # it did not wait for the other
    assert waiting.code != 0 and waiting.after < processes.HEARTBEAT + SLACK


def test_a_watchdog_ends_what_stands_still_and_shows_where(ended):
    guarded, asleep = ended["hanging"]
    assert "alive after 3 seconds, under a watchdog of 2" in guarded.said
    assert guarded.code == 1 and "Timeout (0:00:02)!" in guarded.said
    assert "in hanging" in guarded.said and "sync_global_devices" in guarded.said
    assert asleep.code != 0 and asleep.after < SLACK


# --- two processes compute what one does, and go on from where they were stopped


def test_a_killed_run_goes_on_over_another_mesh_as_if_it_were_unbroken(told, unbroken, folder):
    losses, run = unbroken
    for process in told:
        assert process["began"] == 3 and process["steps"] == [3, 6]
        np.testing.assert_allclose(process["losses"], losses[3:], **TOLERANCE)
    for sizes in ((8, 1), (1, 1), (2, 4)):
        like, _ = processes.fresh(mesh_of(*sizes))
        step, restored = us.Checkpoints(folder / "run").restore(like)
        assert (step, restored["step"]) == (6, 6)
        for came, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(run), strict=True):
            if not processes.is_key(came):
                np.testing.assert_allclose(came, expected, **TOLERANCE)


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 1)])
def test_leaves_of_all_kinds_are_restored_by_another_number_of_processes(told, folder, sizes):
    assert all(process["same bits"] for process in told)
    like = processes.all_kinds(mesh_of(*sizes))
    blank = jax.tree.map(lambda x: x if processes.is_key(x) else jnp.zeros_like(x), like)
    for start in (like, blank | {"step": 0, "numpy": like["numpy"]}):
        _, restored = us.Checkpoints(folder / "kinds").restore(start)
        assert processes.bits_held(restored) == processes.bits_held(like)


def test_each_process_reads_the_rows_that_it_holds_by_their_index_in_the_batch(told):
    for process, rows in zip(told, ([*range(8)], [*range(8, 16)]), strict=True):
        assert process["asked"] == [rows]
        assert process["held"] == [[rows[0], rows[-1] + 1]]


FAULTS = {  # on process 0, and on process 1
    "disk full": ("OSError: process 1: the disk is full", "OSError: the disk is full"),
    "orbax fails": ("ValueError: process 1: .*ocdbt.process_1", "ValueError: .*ocdbt.process_1"),
    "elsewhere": (
        "ValueError: only has no part on process 0.*a mesh of devices of all processes",
        "ValueError: process 0: only has no part on process 0",
    ),
    "own disk": (
        "FileNotFoundError: process 1: .*Every process needs the same directory",
        "FileNotFoundError: .*Every process needs the same directory",
    ),
    "older": (
        "ValueError: saving step 1.*later step_00000002",
        "ValueError: process 0: saving step 1.*later step_00000002",
    ),
    "nothing": (
        "FileNotFoundError: .*holds no checkpoint",
        "FileNotFoundError: process 0: .*holds no checkpoint",
    ),
    "another model": ("ValueError: .*leaf 'params/up' is expected",) * 2,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_of_one_is_an_error_on_all(fault, told):
    for process, message in zip(told, FAULTS[fault], strict=True):
        assert re.match(message, process["faults"][fault]), process["faults"][fault]


def test_all_go_on_from_the_checkpoint_that_process_0_finds_whole(told):
    for process in told:
        assert process["faults"]["after damage"] == 1
        (warning,) = process["faults"]["warned"]
        assert "step_00000002: arrays/manifest.ocdbt was altered" in warning


# --- one process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(address="localhost:1"), "only address given. Give address, processes and rank"),
        (dict(processes=2, rank=0), "only processes and rank given"),
        (dict(address="localhost:1", processes=2, rank=2), "rank 2 of 2 processes: expected 0"),
        (dict(address="localhost:1", processes=2, rank=-1), "rank -1 of 2 processes"),
    ],
)
def test_a_start_that_cannot_be_meant_is_refused_before_anything_changes(arguments, message):
    with pytest.raises(ValueError, match=message):
        us.parallel.initialize(**arguments)
    assert not jax.distributed.is_initialized()


def test_recoverability_is_refused_since_the_others_would_never_end():
    jax.config.update("jax_enable_recoverability", True)
    try:
        with pytest.raises(ValueError, match="the others wait for it without end"):
            us.parallel.initialize("localhost:1", 2, 0)
    finally:
        jax.config.update("jax_enable_recoverability", False)


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_a_watchdog_needs_time(seconds):
    with pytest.raises(ValueError, match="expected seconds above 0"), us.parallel.watchdog(seconds):
        pass
