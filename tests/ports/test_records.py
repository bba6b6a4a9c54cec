"""What every record store promises."""

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatcher.contract import ExportRecord, State
from dispatcher.errors import ExportError, Misconfigured, NotFound, SourceError, Unavailable
from dispatcher.lifecycle import Actor, noted, transition
from dispatcher.records import RecordStore, SqliteRecords, every_export, open_records, update
from tests.dispatcher.test_lifecycle import record
from tests.dispatcher.world import START

JOB = {"user_id": "ann", "status": "completed", "base_model_id": "google/gemma-3-1b-it"}
QUEUED = record(State.QUEUED)


def named(export_id: str, **fields: Any) -> ExportRecord:
    return record(State.QUEUED, export_id=export_id, **fields)


def test_a_job_is_created_once(records: RecordStore) -> None:
    """A second put changes nothing."""
    assert records.get_job("job") is None
    assert records.put_job("job", JOB)
    assert not records.put_job("job", {**JOB, "user_id": "mallory"})
    job = records.get_job("job")
    assert job is not None
    assert job.user_id == "ann"


@pytest.mark.parametrize("document", [{}, {**JOB, "user_id": None}, {**JOB, "status": 3}, {**JOB, "provider": "x"}])
def test_a_job_that_cannot_be_used_says_which_field(records: RecordStore, document: dict[str, Any]) -> None:
    """It is somebody else's document, so its faults are an answer and no crash."""
    records.put_job("job", document)
    with pytest.raises(SourceError) as error:
        records.get_job("job")
    assert error.value.error_code == "job_document_invalid"


def test_an_export_is_created_once_and_replaced_by_revision(records: RecordStore) -> None:
    """Who read an older revision does not get to write."""
    assert records.create_export(QUEUED)
    assert not records.create_export(QUEUED)
    first = noted(QUEUED, START, published_at=START)
    second = transition(QUEUED, State.CANCELLED, by=Actor.CALLER, now=START)
    assert records.replace_export(QUEUED, first)
    assert not records.replace_export(QUEUED, second)
    assert records.get_export("job.merged") == first
    assert not records.replace_export(named("nobody.merged"), named("nobody.merged"))


def test_a_result_is_written_into_the_job_and_nothing_else_of_it_changes(records: RecordStore) -> None:
    """Only the dotted paths, and only together with the record."""
    document = {**JOB, "artifacts": {"raw": {"adapter": "/a"}, "other": [1, 2.5, None]}, "unknown": {"ü": True}}
    records.put_job("job", document)
    records.create_export(QUEUED, job_result={"adapter_path": "/b"})
    result = {"merged_path": "/m", "artifacts.raw.merged": "/m", "artifacts.file.gguf": "/g"}
    lost = noted(QUEUED, START, published_at=START)
    assert records.replace_export(QUEUED, lost)
    assert not records.replace_export(QUEUED, lost, job_result={"merged_path": "/lost"})
    update(records, "job.merged", lambda old: noted(old, START, execution="e"), job_result=result)
    job = records.get_job("job")
    assert job is not None
    assert job.adapter_path == "/a"
    if isinstance(records, SqliteRecords):
        with records._connection() as connection:
            (found,) = connection.execute("SELECT json(document) FROM training_jobs").fetchone()
        assert json.loads(found) == {
            **document,
            "adapter_path": "/b",
            "merged_path": "/m",
            "artifacts": {
                "raw": {"adapter": "/a", "merged": "/m"},
                "other": [1, 2.5, None],
                "file": {"gguf": "/g"},
            },
        }


def test_a_result_for_a_job_that_is_gone_does_not_undo_the_export(records: RecordStore) -> None:
    """The training service may delete what is its own."""
    assert records.create_export(QUEUED, job_result={"merged_path": "/m"})
    assert records.get_job("job") is None


def test_exports_are_listed_by_owner_job_and_state_in_pages(records: RecordStore) -> None:
    """Ordered by id, each page after the last id of the one before."""
    for number in range(7):
        user = "ann" if number % 2 else "bob"
        records.create_export(named(f"job{number}.merged", job_id=f"job{number}", user_id=user))
    update(records, "job3.merged", lambda old: transition(old, State.CANCELLED, by=Actor.CALLER, now=START))
    ids = [found.export_id for found in every_export(records, set(State), page=2)]
    assert ids == [f"job{number}.merged" for number in range(7)]
    assert [found.export_id for found in records.list_exports(user_id="ann")] == [f"job{n}.merged" for n in (1, 3, 5)]
    assert [found.export_id for found in records.list_exports(user_id="ann", states={State.QUEUED}, limit=1)] == [
        "job1.merged"
    ]
    assert [found.export_id for found in records.list_exports(job_id="job2")] == ["job2.merged"]
    assert records.list_exports(states=set()) == []


def test_no_update_is_lost_between_threads_and_openings(open_again: Callable[[], RecordStore]) -> None:
    """Every one of two hundred increments is there in the end."""
    stores = [open_again() for _ in range(4)]
    stores[0].create_export(QUEUED)

    def increment(store: RecordStore) -> None:
        for _ in range(25):
            update(store, "job.merged", lambda old: noted(old, START, execution=str(int(old.execution or 0) + 1)))

    threads = [threading.Thread(target=increment, args=(store,)) for store in stores * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = stores[0].get_export("job.merged")
    assert found is not None
    assert (found.execution, found.revision) == ("200", 200)


def test_an_update_of_nothing_is_not_found_and_none_leaves_it(records: RecordStore) -> None:
    """`update` is the one loop around compare-and-set."""
    with pytest.raises(NotFound):
        update(records, "job.merged", lambda old: old)
    records.create_export(QUEUED)
    assert update(records, "job.merged", lambda old: None) == QUEUED


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
    other.execute("UPDATE exports SET document = json_set(document, '$.new_field', 1)")
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
        store.create_export(named(f"job{number}.merged"))
    statement = "UPDATE exports SET document = CAST(? AS TEXT) WHERE export_id IN ('job1.merged', 'job2.merged')"
    damage(tmp_path / "records.db", statement, stored)
    readable = [f"job{number}.merged" for number in (0, 3, 4, 5)]
    assert [found.export_id for found in store.list_exports()] == readable
    assert [found.export_id for found in store.list_exports(limit=2)] == readable[:2]
    assert [found.export_id for found in store.list_exports(limit=1, after="job0.merged")] == ["job3.merged"]
    assert [found.export_id for found in every_export(store, {State.QUEUED}, page=1)] == readable
    errors = {line.getMessage() for line in caplog.records if line.levelname == "ERROR"}
    assert all(any(f"job{number}.merged" in message for message in errors) for number in (1, 2))
    with pytest.raises(ExportError) as error:
        store.get_export("job1.merged")
    assert error.value.error_code == "record_invalid"
    store.close()


def test_a_url_selects_the_store() -> None:
    """Firestore is named, and says that it is not there yet."""
    with pytest.raises(Misconfigured) as error:
        open_records("firestore://project/database")
    assert error.value.error_code == "not_available_yet"
    with pytest.raises(Misconfigured):
        open_records("mysql://x")
