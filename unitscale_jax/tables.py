"""Reports: rows for programs, plain data for logs, and a table for people.

    report.rows      the entries, one for each line of the table
    report.data()    the same as dicts of plain values, which `json.dumps` takes
    str(report)      the table as text, as wide as its content
    rich.print(report)

Every report of the library offers these four, whatever else it knows.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Tabular"]


class Tabular(abc.ABC):
    """A report whose subclass says how its rows read.

    A subclass has `rows`, a field or a property: dataclasses or named tuples, in order.
    """

    @abc.abstractmethod
    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Titles of the columns and the text of every line; a title ">n" aligns to the right."""

    def below(self) -> Sequence[str]:
        """Sentences that stand below the table."""
        return ()

    def data(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain values: text, numbers, lists and dicts of them."""
        return [_plain(row) for row in getattr(self, "rows")]  # noqa: B009, of the subclass

    def table(self) -> "Table":
        """The table of `rich`."""
        from rich.table import Table  # a tenth of a second that most programs do not need
        from rich.text import Text

        titles, lines = self.cells()
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for title in titles:
            right = title.startswith(">")
            justify = "right" if right else "left"
            table.add_column(Text(title.removeprefix(">")), justify=justify, no_wrap=True)
        for line in lines:
            table.add_row(*map(Text, line))  # as text: brackets of shapes are no markup
        return table

    def __rich__(self) -> Any:
        """What `rich.print` draws."""
        from rich.console import Group
        from rich.text import Text

        return Group(self.table(), *map(Text, self.below()))

    def __str__(self) -> str:
        """The table as text, without colors and without spaces at the ends of lines."""
        from rich.console import Console

        console = Console(width=10_000, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        text = (line.rstrip() for line in capture.get().splitlines())
        return "\n".join([*text, *self.below()])


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(x) for name, x in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
