"""The table of the chaos run, and what becomes of a part that breaks off."""

import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from tests.chaos import __main__ as chaos
from tests.chaos.rows import Row, at_most, none_of, table_of


def test_a_row_without_a_measurement_misses() -> None:
    """What never happened shows nothing."""
    assert not at_most("x", [], 5.0).good


def test_a_row_shows_what_missed_its_goal() -> None:
    """The worst of the times; of what was found, how much, and the first of it."""
    slow, found = at_most("x", [1.0, 6.0, 2.0], 5.0), none_of("y", ["a", "b", "c", "d"])
    assert (slow.good, found.good) == (False, False)
    assert slow.measured.startswith("6.00 s (median 2.00 s)")
    assert found.measured.splitlines() == ["4", "a", "b", "c"]
    assert none_of("y", []) == Row("y", "0", "0", True)
    written = io.StringIO()
    Console(file=written, width=120).print(table_of([("kills", slow), ("kills", found), ("api", none_of("y", []))]))
    assert written.getvalue().count("missed") == 2
    assert written.getvalue().count("kills") == 1


def test_a_part_that_breaks_off_misses_and_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are run all the same."""

    def measure(root: Path, console: Console) -> None:
        (root / "made").touch()
        raise ValueError("on purpose")

    broken = ModuleType("tests.chaos.broken")
    vars(broken)["measure"] = measure
    monkeypatch.setitem(sys.modules, "tests.chaos.broken", broken)
    monkeypatch.setitem(chaos.SECTIONS, "broken", "as asked")
    monkeypatch.setattr(sys, "argv", ["chaos", "--only", "broken", "--root", str(tmp_path / "root")])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert chaos.main() == 1
    assert not (tmp_path / "root" / "broken").exists()
