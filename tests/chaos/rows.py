"""What a section of the chaos run hands in: rows of measured and wanted, each reached or missed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    """What was counted or timed, in plain words"""
    measured: str
    """With its unit"""
    goal: str
    good: bool
    """Whether the goal is reached"""


class Section(Protocol):
    """A module of this package that `python -m tests.chaos` runs."""

    def measure(self, root: Path, console: Console) -> Any:
        """Make it happen.

        Args:
            root: An empty directory of this section's own, removed by the caller.
            console: Told of what goes on, a line at a time.

        Returns:
            The section's own dataclass of what came of it.
        """

    def rows(self, outcome: Any) -> list[Row]:
        """What the outcome says, as lines of the table."""


def none_of(what: str, found: Sequence[str]) -> Row:
    """A row whose goal is that nothing was found; it shows the first three of what was."""
    shown = "\n".join([str(len(found)), *found[:3]]) if found else "0"
    return Row(what, shown, "0", not found)


def at_most(what: str, seconds: Sequence[float], limit: float) -> Row:
    """A row whose goal is that none took longer than `limit` seconds."""
    if not seconds:
        return Row(what, "never measured", f"at most {limit:g} s", False)
    middle = sorted(seconds)[len(seconds) // 2]
    worst = max(seconds)
    return Row(what, f"{worst:.2f} s (median {middle:.2f} s)", f"at most {limit:g} s", worst <= limit)


def table_of(rows: Sequence[tuple[str, Row]]) -> Table:
    """The table: of each row its section and itself."""
    table = Table("part", "what", "measured", "goal", "", title="the worst days")
    last = ""
    for section, row in rows:
        mark = "[green]reached[/]" if row.good else "[red]missed[/]"
        table.add_row(section if section != last else "", row.what, row.measured, row.goal, mark)
        last = section
    return table
