"""A short version of what `make chaos` does with crowds."""

import secrets
from pathlib import Path

from tests.chaos.crowd import Place

CROWD = 100
CROWD_ON_FIRESTORE = 20


def test_a_crowd_gets_one_export_and_one_execution(tmp_path: Path) -> None:
    """However many ask over HTTP at once, and however often its message is delivered at once."""
    with Place(tmp_path / "place", f"sqlite://{tmp_path / 'records.db'}") as place:
        for crowd in (place.requests(CROWD), place.deliveries(CROWD)):
            assert (crowd.exports, crowd.executions, crowd.unanswered) == (1, 1, 0), crowd


def test_a_crowd_on_firestore_gets_one_export_and_one_execution(tmp_path: Path, firestore_server: str) -> None:
    """As on SQLite."""
    with Place(tmp_path, f"firestore://project-{secrets.token_hex(6)}/(default)") as place:
        for crowd in (place.requests(CROWD_ON_FIRESTORE), place.deliveries(CROWD_ON_FIRESTORE)):
            assert (crowd.exports, crowd.executions, crowd.unanswered) == (1, 1, 0), crowd
