"""Several processes: how they start, and how they all end when one of them does.

A process that waits in a collective for one that is gone waits for ever, and none of JAX's calls
raises. What ends it is a timeout, of three kinds:

    one is killed, or its machine is lost    the others are aborted after `heartbeat` seconds;
                                             at once, if it was process 0
    one raises                               `initialize` makes it exit without waiting for the
                                             others, so they find it dead, as above
    one hangs and lives                      its heart beats on: only `watchdog` ends it

Then all are started again, on as many machines as are left, from the last checkpoint.
"""

import contextlib
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from types import TracebackType

import jax


def initialize(
    address: str | None = None,
    processes: int | None = None,
    rank: int | None = None,
    *,
    cpu_devices: int | None = None,
    heartbeat: int = 100,
    shutdown: int = 300,
) -> None:
    """Makes this process one of several that run the same program on all their devices.

    To be called first, before anything asks JAX for a device. On TPU pods, under Slurm and under
    Open MPI it needs no arguments. Afterwards `jax.devices()` are those of all processes, so
    that meshes, layouts and every function of this library span them; each process must run the
    same programs on them in the same order. From then on an exception that nobody catches ends
    this process at once, when its traceback is printed, with exit code 1.

    Args:
        address: Host and port of process 0, such as "10.0.0.1:1234".
        processes: How many there are.
        rank: Which of them this is, from 0.
        cpu_devices: How many devices this process makes of its CPU; None leaves JAX's setting.
        heartbeat: Seconds after which a process that gives no sign is taken for dead, and the
            others end. JAX's 100 forgives a machine that is moved or busy.
        shutdown: Seconds that a process which is done waits for the others to be done too.

    Raises:
        ValueError: Only some of address, processes and rank are given, or rank is not below
            processes; or JAX's recoverability is on, under which the others never end.
        RuntimeError: A device was asked for before; or there is no process 0 at the address.

    Example:
        >>> us.parallel.initialize("localhost:1234", processes=2, rank=2)
        Traceback (most recent call last):
            ...
        ValueError: rank 2 of 2 processes: expected 0 to 1.
    """
    given = [
        name
        for name, x in (("address", address), ("processes", processes), ("rank", rank))
        if x is not None
    ]
    if len(given) in (1, 2):
        raise ValueError(
            f"only {' and '.join(given)} given. Give address, processes and rank, or none of them "
            "where JAX finds them by itself: on TPU pods, under Slurm and Open MPI."
        )
    if processes is not None and rank is not None and not 0 <= rank < processes:
        raise ValueError(f"rank {rank} of {processes} processes: expected 0 to {processes - 1}.")
    if getattr(jax.config, "jax_enable_recoverability", False):
        raise ValueError(
            "jax_enable_recoverability is on: when a process dies, the others wait for it without "
            "end. Leave it off, and start all again from a checkpoint."
        )
    if cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    jax.distributed.initialize(
        address,
        processes,
        rank,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=shutdown,
    )
    sys.excepthook = _ending(sys.excepthook)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Ends this process if it stands still: what no heartbeat notices.

    To be called again at every step, when a value of the step has arrived; JAX returns from a step
    before it is computed. The timer is Python's `faulthandler`, of which there is one, and which
    needs neither the interpreter nor the main thread.

    Args:
        seconds: How long a step may take, with its compilation, validation and checkpoint.

    Yields:
        A function that gives another `seconds` from now. When they are over, the stacks of all
        threads are printed and the process exits with code 1, and so the others end too.

    Example:
        >>> with us.parallel.watchdog(60) as step_is_done:
        ...     for step in range(3):
        ...         loss = jnp.float32(step).block_until_ready()
        ...         step_is_done()
    """
    if seconds <= 0:
        raise ValueError(f"watchdog({seconds}): expected seconds above 0.")

    def step_is_done() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)

    step_is_done()
    try:
        yield step_is_done
    finally:
        faulthandler.cancel_dump_traceback_later()


_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], None]


def _ending(hook: _Hook) -> _Hook:
    """A hook for exceptions that ends the process.

    Python's own end would wait at a barrier for the others, which wait in a collective for us.
    """

    def ending_hook(kind, error, trace):
        try:
            hook(kind, error, trace)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(1)

    return ending_hook
