"""What only a file can show: other processes, locks, damage."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from dispatcher.contract import State
from dispatcher.errors import ExportError, SourceError, Unavailable
from dispatcher.lifecycle import noted
from dispatcher.records import every_export, open_records
from dispatcher.sqlite_records import SqliteRecords
from tests.dispatcher.world import START
from tests.ports.test_records import JOB, QUEUED, named


def test_another_process_sees_what_this_one_wrote(tmp_path: Path) -> None:
    """The exporter is one."""
    url = f"sqlite://{tmp_path / 'records.db'}"
    store = open_records(url)
    store.create_export(QUEUED)
    program = f"from dispatcher.records import *; s = open_records({url!r}); print(s.get_export('job.merged').state)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "queued"
    assert isinstance(store, SqliteRecords)
    store.close()


def test_a_locked_database_is_unavailable_and_nothing_is_written(tmp_path: Path) -> None:
    """The vendor's error is kept as the cause."""
    store = SqliteRecords(tmp_path / "records.db", busy_seconds=0.05)
    store.create_export(QUEUED)
    other = sqlite3.connect(tmp_path / "records.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as error:
        store.replace_export(QUEUED, noted(QUEUED, START, execution="e"))
    assert isinstance(error.value.__cause__, sqlite3.OperationalError)
    other.execute("ROLLBACK")
    other.close()
    assert store.get_export("job.merged") == QUEUED
    store.close()


def test_what_is_no_database_or_no_place_is_unavailable(tmp_path: Path) -> None:
    """Whether damaged, or not to be made."""
    (tmp_path / "records.db").write_bytes(b"no database" * 1000)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "records.db", tmp_path / "file" / "records.db"):
        with pytest.raises(Unavailable):
            SqliteRecords(path).get_export("job.merged")


def test_a_record_of_another_schema_says_so(tmp_path: Path) -> None:
    """A newer version's record is not misread."""
    store = SqliteRecords(tmp_path / "records.db")
    store.create_export(QUEUED)
    other = sqlite3.connect(tmp_path / "records.db", isolation_level=None)
    other.execute("UPDATE exports SET document = json_set(document, '$.schema_version', 2)")
    other.close()
    with pytest.raises(ExportError) as error:
        store.get_export("job.merged")
    assert error.value.error_code == "record_invalid"
    store.close()


NOT_DOCUMENTS = [b"{", b"", b"[1]", b'"text"', b"null", b"\xff\xfe", b"[" * 100_000]


def damage(path: Path, statement: str, stored: bytes) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute(statement, (stored,))
    other.close()


@pytest.mark.parametrize("stored", NOT_DOCUMENTS)
def test_a_damaged_training_job_is_a_fault_of_the_source(tmp_path: Path, stored: bytes) -> None:
    """Neither reading it nor writing a result into it crashes, and no record is made beside it."""
    store = SqliteRecords(tmp_path / "records.db")
    store.put_job("job", JOB)
    damage(tmp_path / "records.db", "UPDATE training_jobs SET document = CAST(? AS TEXT)", stored)
    for use in (lambda: store.get_job("job"), lambda: store.create_export(QUEUED, job_result={"merged_path": "/m"})):
        with pytest.raises(SourceError) as error:
            use()
        assert error.value.error_code == "job_document_invalid"
    assert store.get_export("job.merged") is None
    store.close()


@pytest.mark.parametrize("stored", NOT_DOCUMENTS)
def test_an_unreadable_record_does_not_hide_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: bytes
) -> None:
    """A listing leaves it out, names it in the log, and its pages stay full; asked for by name it is an error."""
    store = SqliteRecords(tmp_path / "records.db")
    for number in range(6):
        store.create_export(named(f"job{number}.merged", uncollected_since=START))
    statement = "UPDATE exports SET document = CAST(? AS TEXT) WHERE export_id IN ('job1.merged', 'job2.merged')"
    damage(tmp_path / "records.db", statement, stored)
    readable = [f"job{number}.merged" for number in (0, 3, 4, 5)]
    assert [found.export_id for found in store.list_exports()] == readable
    assert [found.export_id for found in store.list_exports(limit=2)] == readable[:2]
    assert [found.export_id for found in store.list_exports(limit=1, after="job0.merged")] == ["job3.merged"]
    assert [found.export_id for found in every_export(store, {State.QUEUED}, page=1)] == readable
    assert [found.export_id for found in store.list_uncollected({State.QUEUED}, until=START, limit=4)] == readable
    with pytest.raises(ExportError):
        store.list_exports(strict=True)
    errors = {line.getMessage() for line in caplog.records if line.levelname == "ERROR"}
    assert all(any(f"job{number}.merged" in message for message in errors) for number in (1, 2))
    with pytest.raises(ExportError) as error:
        store.get_export("job1.merged")
    assert error.value.error_code == "record_invalid"
    store.close()
