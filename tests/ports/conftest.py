"""The implementations that each port's one suite runs over; another one is one more parameter here."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dispatcher.artifacts import ArtifactStore, open_artifacts
from dispatcher.records import RecordStore, SqliteRecords, open_records
from dispatcher.tokens import TokenStore, open_tokens


@pytest.fixture(params=["sqlite"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], RecordStore]]:
    """Opens one and the same record store, each time as another process would."""
    opened: list[RecordStore] = []

    def open_store() -> RecordStore:
        assert request.param == "sqlite"
        opened.append(open_records(f"sqlite://{tmp_path / 'records.db'}"))
        return opened[-1]

    yield open_store
    for store in opened:
        if isinstance(store, SqliteRecords):
            store.close()


@pytest.fixture
def records(open_again: Callable[[], RecordStore]) -> RecordStore:
    return open_again()


@pytest.fixture(params=["file"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    assert request.param == "file"
    return open_artifacts((tmp_path / "artifacts").as_uri())


@pytest.fixture(params=["file"])
def tokens(request: pytest.FixtureRequest, tmp_path: Path) -> TokenStore:
    assert request.param == "file"
    return open_tokens((tmp_path / "tokens").as_uri())
