"""Holding an export: how often its record is written, and that the lease does not run out meanwhile."""

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher.contract import ExportRecord, State
from dispatcher.errors import LeaseLost, Unavailable
from dispatcher.lifecycle import Actor, holds_live_lease, transition
from dispatcher.logs import bound, configure
from dispatcher.records import update
from dispatcher.sqlite_records import SqliteRecords
from exporter import lease
from exporter.lease import Claim, Heartbeat, claim
from tests.dispatcher.test_lifecycle import record
from tests.exporter.place import expired
from tests.waiting import until


@pytest.fixture
def records(tmp_path: Path) -> Iterator[SqliteRecords]:
    records = SqliteRecords(tmp_path / "records.db")
    records.create_export(record(State.QUEUED))
    yield records
    records.close()


def claimed(records: SqliteRecords, *, seconds: int = 120) -> Claim:
    return claim(records, "job.merged", execution="e", handed=None, seconds=seconds)


def stored(records: SqliteRecords) -> ExportRecord:
    found = records.get_export("job.merged")
    assert found is not None
    return found


def test_news_are_written_seldom_however_fast_they_come(
    records: SqliteRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Firestore takes about one write a second to one document; the record is read far more often."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(lease, "WRITE_SECONDS", 0.25)
    ours = claimed(records)
    with Heartbeat(records, ours, seconds=120, stop=threading.Event()) as heartbeat:
        began = time.monotonic()
        while stored(records).revision < ours.record.revision + 3:
            heartbeat.report("merging", min(1.0, (time.monotonic() - began) / 60))
        took = time.monotonic() - began
    assert took >= 0.7
    assert stored(records).stage == "merging"


def test_without_news_nothing_is_written_until_a_third_of_the_lease_is_gone(
    records: SqliteRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is extended, over and over."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    ours = claimed(records, seconds=1)
    with Heartbeat(records, ours, seconds=1, stop=threading.Event()):
        began = time.monotonic()
        until(lambda: stored(records).revision >= ours.record.revision + 4, "four extensions")
        took = time.monotonic() - began
    assert took >= 1.2
    assert ours.record.lease is not None
    assert (held := stored(records).lease) is not None
    assert held.expires_at > ours.record.lease.expires_at


def test_the_heartbeat_logs_with_the_ids_of_its_export(records: SqliteRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread does not inherit them by itself."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    lines = io.StringIO()
    before = logging.root.handlers[:], logging.root.level
    configure(lines)
    try:
        with bound(export_id="job.merged"), Heartbeat(records, claimed(records), seconds=120, stop=threading.Event()):
            records.close()
            monkeypatch.setattr(records, "get_export", lambda export_id: 1 / 0)
            until(lambda: "the heartbeat failed" in lines.getvalue(), "a line of the heartbeat's")
    finally:
        logging.root.handlers[:], logging.root.level = before
    assert json.loads(lines.getvalue())["export_id"] == "job.merged"


def test_a_cancelled_export_is_ours_only_until_another_claims_it(records: SqliteRecords) -> None:
    """Also when that one is cancelled in turn: its holder may not have noticed yet."""

    def move(to: State, by: Actor) -> None:
        update(records, "job.merged", lambda found: transition(found, to, by=by, now=lease.utc_now()))

    heartbeat = Heartbeat(records, claimed(records), seconds=120, stop=threading.Event())
    assert heartbeat.is_ours()
    move(State.CANCELLED, Actor.CALLER)
    assert heartbeat.is_ours()
    move(State.QUEUED, Actor.CALLER)
    assert not heartbeat.is_ours()
    claim(records, "job.merged", execution="other", handed=None, seconds=120)
    assert not heartbeat.is_ours()
    move(State.CANCELLED, Actor.CALLER)
    assert not heartbeat.is_ours()


def test_several_tasks_get_one_lease_and_one_task_takes_its_predecessors(records: SqliteRecords) -> None:
    """A retry of the only task stops the zombie before it; of several, the others must go on."""

    def taken(tasks: int) -> Claim:
        return claim(records, "job.merged", execution="e", handed=None, seconds=120, tasks=tasks)

    first = taken(4)
    update(records, "job.merged", expired)
    second, third = taken(4), taken(4)
    assert {first.lease_id, second.lease_id, third.lease_id} == {first.lease_id}
    assert holds_live_lease(stored(records), lease.utc_now())
    assert stored(records).attempt == 1
    alone = taken(1)
    assert alone.lease_id != first.lease_id
    assert stored(records).attempt == 2


def test_tasks_settle_on_one_version_and_one_task_has_nobody_to_ask(records: SqliteRecords) -> None:
    """What it finds changed it makes anew, whole."""

    def beat(tasks: int) -> Heartbeat:
        ours = claim(records, "job.merged", execution="e", handed=None, seconds=120, tasks=tasks)
        return Heartbeat(records, ours, seconds=120, stop=threading.Event())

    first, second = beat(2), beat(2)
    first.agree("v1")
    second.agree("v1")
    with pytest.raises(Unavailable):
        second.agree("v2")
    assert stored(records).version == "v1"
    alone = beat(1)
    alone.agree("v1")
    alone.agree("v2")
    assert stored(records).version is None
    with pytest.raises(LeaseLost):
        first.agree("v1")


def test_progress_is_that_of_the_furthest_task(records: SqliteRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes its own, and the record never goes back."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(lease, "WRITE_SECONDS", 0.01)
    far, near = (claim(records, "job.merged", execution="e", handed=None, seconds=120, tasks=2) for _ in range(2))
    with Heartbeat(records, far, seconds=120, stop=threading.Event()) as heartbeat:
        heartbeat.report("merging", 0.8)
        until(lambda: stored(records).progress == 0.8, "the first task's progress")
    with Heartbeat(records, near, seconds=120, stop=threading.Event()) as heartbeat:
        written = stored(records).revision
        heartbeat.report("planning", 0.1)
        until(lambda: stored(records).revision > written, "the second task's report")
        assert not heartbeat.is_ours()
    assert (stored(records).stage, stored(records).progress) == ("merging", 0.8)


def test_a_log_of_another_execution_is_not_shown_as_this_ones(records: SqliteRecords) -> None:
    """An operator's rerun has its own."""
    ours = claimed(records)
    found = ours.record.model_copy(update={"log_uri": "file:///theirs", "revision": ours.record.revision + 1})
    records.replace_export(ours.record, found)
    again = claim(records, "job.merged", execution="e", handed=None, seconds=120)
    assert again.record.log_uri == "file:///theirs"
    other = claim(records, "job.merged", execution="by-hand", handed=again.lease_id, seconds=120)
    assert other.record.log_uri is None
