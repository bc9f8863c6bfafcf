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
from typing import Any, Literal

import jax

from unitscale_jax.trace.program._compat import scope, traced_apart
from unitscale_jax.trace.program._walk import Site

_TAKEN: contextvars.ContextVar[list[dict[str, Any]] | None] = contextvars.ContextVar("notes")
_MARK = re.compile(r"note:(\d+):")
_OWN = re.compile(r"note:\d+:|as_traced:|entered:|result:")


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
    """True if somebody takes notes: then even what a transform leaves alone should be noted."""
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


def as_traced(*, low: bool = False) -> contextlib.AbstractContextManager[Any]:
    """The equations made inside compute in the dtypes they have: their precision is their own.

    Products on codes, and the making of codes, are such. What changes dtypes finds it at the
    equations (see `dtypes_meant`), wherever they went.

    Args:
        low: Whether together they are one product, whose result (`made_result`) has the dtype that
            one of the operands' arrays would have had.
    """
    return jax.named_scope("as_traced:low:" if low else "as_traced:")


def operand_enters() -> contextlib.AbstractContextManager[Any]:
    """The `stop_gradient` made inside is where an array enters what is `as_traced` around."""
    return jax.named_scope("entered:")


def made_result() -> contextlib.AbstractContextManager[Any]:
    """The select made inside is the result of what is `as_traced` around."""
    return jax.named_scope("result:")


def dtypes_meant(site: Site) -> Literal["", "inside", "operand", "result"]:
    """Tells whether, and where, an equation is one of those `as_traced`.

    Returns:
        "" for any other; of a product that is low "operand" where one of its arrays enters and
        "result" where it is made; "inside" for the rest. In the backward pass of a custom
        derivative what is around the call does not count.
    """
    if not _is_marked(site):
        return ""
    scopes: list[str] = []
    at: Site | None = site
    while at is not None:
        scopes += [part for part in scope(at.eqn).split("/") if "transpose(" not in part]
        backward = at.body == 2 and at.parent is not None and at.parent.name == "custom_vjp_call"
        at = None if backward else at.parent
    text = "/".join(scopes)
    if "as_traced:low:" in text:
        if "result:" in text and site.name == "select_n":
            return "result"
        return "operand" if "entered:" in text and site.name == "stop_gradient" else "inside"
    return "inside" if "as_traced:" in text else ""


def _is_marked(site: Site) -> bool:
    """True if the mark of `as_traced` is on an equation or around it, which it seldom is."""
    at: Site | None = site
    while at is not None:
        if "as_traced:" in scope(at.eqn):
            return True
        at = at.parent
    return False


def notes_at(site: Site, notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Notes at an equation in one dict; of two with one name it has the innermost."""
    out: dict[str, Any] = {}
    for number in _MARK.findall(site.scope):
        out |= notes[int(number)]
    return out


def scope_without_notes(site: Site) -> str:
    """The named scopes that are the user's own."""
    return "/".join(part for part in site.scope.split("/") if not _OWN.search(part))
