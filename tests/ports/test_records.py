"""What every record store promises."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from dispatcher.contract import Artifact, ExportRecord, ExportType, Failure, Lease, State
from dispatcher.errors import Misconfigured, NotFound, SourceError
from dispatcher.lifecycle import Actor, noted, transition
from dispatcher.records import RecordStore, every_export, open_records, update
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


def test_everything_that_an_export_needs_of_a_job_is_read(records: RecordStore) -> None:
    """Whether a store reads the whole document or only what it names."""
    whole = {**JOB, "base_model_revision": "r", "merge_base": "google/other@v", "provider": "unsloth"}
    records.put_job("job", {**whole, "artifacts": {"raw": {"adapter": "/a"}}})
    records.put_job("older", {**whole, "adapter_path": "/b"})
    for job_id, adapter in (("job", "/a"), ("older", "/b")):
        job = records.get_job(job_id)
        assert job is not None
        assert job.model_dump() == {**whole, "job_id": job_id, "adapter_path": adapter}


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


def test_a_result_is_written_into_the_job_and_nothing_else_of_it_changes(
    records: RecordStore, stored_job: Callable[[str], object]
) -> None:
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
    assert stored_job("job") == {
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


def test_what_waits_to_be_collected_is_listed_by_state_the_oldest_first(records: RecordStore) -> None:
    """To the second at least, whatever the time of day; two of one moment by id, and none that was collected."""
    moments = {"a": 3.0, "b": 1.0, "c": 2.000001, "d": 2.0, "e": 1.0, "later": 3.01, "collected": None}
    for name, seconds in moments.items():
        since = None if seconds is None else START + timedelta(seconds=seconds)
        records.create_export(record(State.COMPLETED, export_id=f"{name}.merged", uncollected_since=since))
    records.create_export(record(State.FAILED, export_id="failed.merged", uncollected_since=START))
    until = START + timedelta(seconds=3)
    found = [each.export_id for each in records.list_uncollected({State.COMPLETED}, until=until)]
    assert set(found) == {f"{name}.merged" for name in "abcde"}
    assert (found[:2], found[-1]) == (["b.merged", "e.merged"], "a.merged")
    assert [each.export_id for each in records.list_uncollected(set(State), until=until, limit=2)] == [
        "failed.merged",
        "b.merged",
    ]


def test_no_update_is_lost_between_threads_and_openings(open_again: Callable[[], RecordStore]) -> None:
    """Every one of forty increments is there in the end."""
    stores = [open_again() for _ in range(4)]
    stores[0].create_export(QUEUED)

    def increment(store: RecordStore) -> None:
        for _ in range(5):
            update(store, "job.merged", lambda old: noted(old, START, execution=str(int(old.execution or 0) + 1)))

    threads = [threading.Thread(target=increment, args=(store,)) for store in stores * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = stores[0].get_export("job.merged")
    assert found is not None
    assert (found.execution, found.revision) == ("40", 40)


def test_of_many_contenders_for_one_revision_one_wins(open_again: Callable[[], RecordStore]) -> None:
    """The others are told that they lost, and what is stored is the winner's."""
    stores = [open_again() for _ in range(8)]
    stores[0].create_export(QUEUED)
    ready, won = threading.Barrier(8), []

    def contend(number: int) -> None:
        ready.wait()
        if stores[number].replace_export(QUEUED, noted(QUEUED, START, execution=str(number))):
            won.append(str(number))

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = stores[0].get_export("job.merged")
    assert found is not None
    assert won == [found.execution]


def test_a_record_comes_back_as_it_went_in(records: RecordStore) -> None:
    """Every field, to the microsecond."""
    full = record(
        State.RUNNING,
        stage="merging",
        progress=0.1 + 0.2,
        lease=Lease(lease_id="l", owner="o", expires_at=START + timedelta(microseconds=123_457)),
        artifacts=(
            Artifact(kind=ExportType.MERGED, uri="gs://b/ü", version="v", bytes=2**53 + 1, files=2, manifest=None),
        ),
        summary={"engine": "streaming", "seconds": 1.25, "verified": {"worst_error_ulp": 0.5}, "none": None},
        error=Failure(code="c", message="m\nn", retryable=True),
        version="0123456789ab",
        publications=3,
        uncollected_since=START + timedelta(microseconds=1),
    )
    records.create_export(full)
    assert records.get_export("job.merged") == full


def test_an_update_of_nothing_is_not_found_and_none_leaves_it(records: RecordStore) -> None:
    """`update` is the one loop around compare-and-set."""
    with pytest.raises(NotFound):
        update(records, "job.merged", lambda old: old)
    records.create_export(QUEUED)
    assert update(records, "job.merged", lambda old: None) == QUEUED


@pytest.mark.parametrize(
    "url",
    [
        "mysql://x",
        "firestore://",
        "firestore://project",
        "firestore://project/a/b",
        "firestore://p/(default)?x=1",
        "firestore://p/(default) ",
    ],
)
def test_a_url_that_selects_no_store_is_refused(url: str) -> None:
    """With what was expected."""
    with pytest.raises(Misconfigured) as error:
        open_records(url)
    assert "firestore://project/database" in error.value.message
