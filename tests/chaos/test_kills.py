"""A short run of what `make chaos` does at length: exporters that are killed, stopped, cancelled, and put to sleep."""

from pathlib import Path

import pytest
from rich.console import Console

from dispatcher.contract import ExportType
from tests.chaos import kills, paused, stops
from tests.chaos.laptop import SMALL_MODEL
from tests.chaos.paused import BEFORE_COMMIT, MIDDLE, MINUTE, REMOVAL_STEPS, Meanwhile, Nap
from tests.chaos.rows import Row
from tests.chaos.silent import CASES

QUIET = Console(quiet=True)
# One worker: the process that exporters are forked from imports torch.
pytestmark = pytest.mark.xdist_group("chaos")


def missed(rows: list[Row]) -> list[Row]:
    """The rows whose goal is not reached."""
    return [row for row in rows if not row.good]


def test_killed_exports_are_complete_and_leave_nothing_over(tmp_path: Path) -> None:
    """Merged and GGUF, started again like a task of Cloud Run."""
    outcome = kills.measure(tmp_path, QUIET, kills=6, from_cold=0, size=SMALL_MODEL)
    assert not missed(kills.rows(outcome))


def test_who_sleeps_across_the_end_of_its_lease_changes_nothing(tmp_path: Path) -> None:
    """Taken over in the middle, with clocks a minute off, and while it removes what was cancelled."""
    naps = [
        Nap(MIDDLE, seconds=0.002),
        Nap(BEFORE_COMMIT, clocks=(-MINUTE, MINUTE), margin=120),
        Nap(REMOVAL_STEPS[1], Meanwhile.ASKED_AGAIN, ExportType.MERGED, in_removal=True),
    ]
    outcome = paused.measure(tmp_path, QUIET, naps=naps, clocks=[(-MINUTE, MINUTE)], size=SMALL_MODEL)
    assert not missed(paused.rows(outcome))


def test_who_is_told_to_stop_is_gone_within_five_seconds(tmp_path: Path) -> None:
    """Also while the hub says nothing; and nothing is left of what was cancelled."""
    outcome = stops.measure(tmp_path, QUIET, stops=4, cancels=4, cases=CASES[1:2], size=SMALL_MODEL)
    assert not missed(stops.rows(outcome))
