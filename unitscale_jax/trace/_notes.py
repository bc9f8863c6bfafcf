"""Notes that a transform leaves at the equations it makes, for whoever asks to see them.

    with noted(autocast="follow"): ...      # nothing happens, unless somebody is `taking_notes`

While notes are taken, the equations made inside carry the number of the note among their named
scopes. So a note follows its equations through jit, loops, differentiation and other transforms,
and a transform written later shows its decisions without a change to who reads them.

One note is for the reader itself: `wide=True` says that a wider dtype is meant here.
"""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import Any

import jax

from unitscale_jax.trace._compat import traced_apart
from unitscale_jax.trace._walk import Site

_TAKEN: contextvars.ContextVar[list[dict[str, Any]] | None] = contextvars.ContextVar("notes")
_MARK = re.compile(r"note:(\d+):")


@contextlib.contextmanager
def taking_notes() -> Iterator[list[dict[str, Any]]]:
    """Collects the notes of everything traced inside; see `notes_at`."""
    token = _TAKEN.set(notes := [])
    try:
        with traced_apart():  # a trace made before has no notes, and this one is not for running
            yield notes
    finally:
        _TAKEN.reset(token)


def taking() -> bool:
    """Whether somebody takes notes: then even what a transform leaves alone should be noted."""
    return _TAKEN.get(None) is not None


@contextlib.contextmanager
def noted(**note: Any) -> Iterator[None]:
    """Equations made inside have this note, if notes are taken."""
    taken = _TAKEN.get(None)
    if taken is None:
        yield
        return
    taken.append(note)
    with jax.named_scope(f"note:{len(taken) - 1}:"):
        yield


def notes_at(site: Site, notes: list[dict[str, Any]]) -> dict[str, Any]:
    """All notes at an equation in one dict, of two with one name the innermost."""
    out: dict[str, Any] = {}
    for number in _MARK.findall(site.scope):
        out |= notes[int(number)]
    return out


def scope_without_notes(site: Site) -> str:
    """The named scopes that are the user's own."""
    return "/".join(part for part in site.scope.split("/") if not _MARK.search(part))
