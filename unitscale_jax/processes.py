"""What processes tell one another beside arrays: small values, outcomes, errors.

A step of which one process fails must fail on all of them, or the others wait for it in the next
collective. So whoever may fail alone does it inside of `agreed` or `together`.
"""

import builtins
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def rank() -> int:
    """The index of this process; 0 when it is alone."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are; asks no device when this one is alone."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def agreed(call: Callable[[], Any]) -> Any:
    """Process 0's result of a call that it alone makes, or its error, on every process.

    The result is of JSON's kinds. All processes call this, and none returns before process 0 has
    made the call.
    """
    return together(call if rank() == 0 else lambda: None)[0]


def together(call: Callable[[], Any]) -> list[Any]:
    """Everyone's result of a call that each makes, in order; or an error on all if one failed.

    The results are of JSON's kinds.
    """
    if count() == 1:
        return [call()]
    try:
        mine, error = {"result": call()}, None
    except Exception as raised:  # it is raised below, once the others know
        mine, error = {"error": type(raised).__name__, "says": str(raised)}, raised
    outcomes = [json.loads(text) for text in _exchanged(json.dumps(mine))]
    failed = [(i, outcome) for i, outcome in enumerate(outcomes) if "error" in outcome]
    if error is not None:
        raise error
    if failed:
        raise _as_it_was(*failed[0])
    return [outcome["result"] for outcome in outcomes]


def _exchanged(text: str) -> list[str]:
    """The texts of all processes; arrays are what they can exchange, so of one length."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size, np.int32))
    padded = np.pad(data, (0, int(np.max(sizes)) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _as_it_was(process: int, outcome: dict[str, str]) -> Exception:
    """An error of another process, of the same type where that is one of Python's own."""
    kind = getattr(builtins, outcome["error"], None)
    known = isinstance(kind, type) and issubclass(kind, ValueError | TypeError | OSError)
    if known and kind is not UnicodeDecodeError and kind is not UnicodeEncodeError:
        return kind(f"process {process}: {outcome['says']}")
    return RuntimeError(f"process {process}: {outcome['error']}: {outcome['says']}")
