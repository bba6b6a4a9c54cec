"""Holding an export: how often its record is written, and that the lease does not run out meanwhile."""

import io
import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Queue

import pytest

from dispatcher.contract import ExportRecord, State
from dispatcher.errors import LeaseHeld, LeaseLost, Unavailable
from dispatcher.lifecycle import Actor, holds_live_lease, transition
from dispatcher.logs import bound, configure
from dispatcher.records import update
from dispatcher.settings import CLOCK_SKEW_SECONDS
from dispatcher.sqlite_records import SqliteRecords
from exporter import lease, stopping
from exporter.lease import Claim, Heartbeat, Term, claim
from exporter.stopping import Stop
from tests.dispatcher.test_lifecycle import record
from tests.exporter.place import expired
from tests.waiting import until

TERM = Term(120)


@pytest.fixture
def records(tmp_path: Path) -> Iterator[SqliteRecords]:
    records = SqliteRecords(tmp_path / "records.db")
    records.create_export(record(State.QUEUED))
    yield records
    records.close()


def claimed(records: SqliteRecords, *, seconds: int = 120) -> Claim:
    return claim(records, "job.merged", execution="e", handed=None, term=Term(seconds))


def stored(records: SqliteRecords) -> ExportRecord:
    found = records.get_export("job.merged")
    assert found is not None
    return found


def moved(records: SqliteRecords, to: State) -> None:
    """As its caller moves it."""
    update(records, "job.merged", lambda found: transition(found, to, by=Actor.CALLER, now=lease.utc_now()))


def test_news_are_written_seldom_however_fast_they_come(
    records: SqliteRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Firestore takes about one write a second to one document; the record is read far more often."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(lease, "WRITE_SECONDS", 0.25)
    ours = claimed(records)
    with Heartbeat(records, ours, stop=Stop()) as heartbeat:
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
    with Heartbeat(records, ours, stop=Stop()):
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
        with bound(export_id="job.merged"), Heartbeat(records, claimed(records), stop=Stop()):
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

    heartbeat = Heartbeat(records, claimed(records), stop=Stop())
    assert heartbeat.is_ours()
    move(State.CANCELLED, Actor.CALLER)
    assert heartbeat.is_ours()
    move(State.QUEUED, Actor.CALLER)
    assert not heartbeat.is_ours()
    claim(records, "job.merged", execution="other", handed=None, term=TERM)
    assert not heartbeat.is_ours()
    move(State.CANCELLED, Actor.CALLER)
    assert not heartbeat.is_ours()


def test_several_tasks_get_one_lease_and_one_task_takes_its_predecessors(records: SqliteRecords) -> None:
    """A retry of the only task stops the zombie before it; of several, the others must go on."""

    def taken(tasks: int) -> Claim:
        return claim(records, "job.merged", execution="e", handed=None, term=TERM, tasks=tasks)

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
        ours = claim(records, "job.merged", execution="e", handed=None, term=TERM, tasks=tasks)
        return Heartbeat(records, ours, stop=Stop())

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
    far, near = (claim(records, "job.merged", execution="e", handed=None, term=TERM, tasks=2) for _ in range(2))
    with Heartbeat(records, far, stop=Stop()) as heartbeat:
        heartbeat.report("merging", 0.8)
        until(lambda: stored(records).progress == 0.8, "the first task's progress")
    with Heartbeat(records, near, stop=Stop()) as heartbeat:
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
    again = claim(records, "job.merged", execution="e", handed=None, term=TERM)
    assert again.record.log_uri == "file:///theirs"
    other = claim(records, "job.merged", execution="by-hand", handed=again.lease_id, term=TERM)
    assert other.record.log_uri is None


@pytest.mark.parametrize("holder_off", [-60, 0, 60])
@pytest.mark.parametrize("contender_off", [-60, 0, 60])
def test_clocks_that_are_a_minute_off_take_nothing_from_a_living_holder(
    records: SqliteRecords, monkeypatch: pytest.MonkeyPatch, holder_off: int, contender_off: int
) -> None:
    """Until the holder itself has noticed that no heartbeat got through; and not for ever after that."""
    term = Term(120, CLOCK_SKEW_SECONDS)
    true = datetime(2026, 1, 1, tzinfo=UTC)

    def at(seconds: float) -> None:
        monkeypatch.setattr(lease, "utc_now", lambda: true + timedelta(seconds=seconds))

    at(holder_off)
    claim(records, "job.merged", execution="holder", handed=None, term=term)
    at(119 + contender_off)
    with pytest.raises(LeaseHeld):
        claim(records, "job.merged", execution="contender", handed=None, term=term)
    at(120 + 2 * CLOCK_SKEW_SECONDS + 1 + contender_off)
    assert claim(records, "job.merged", execution="contender", handed=None, term=term).record.attempt == 2


def test_a_holder_that_slept_stops_before_its_next_write(records: SqliteRecords) -> None:
    """It may not have noticed yet who has the export now."""
    heartbeat = Heartbeat(records, claimed(records, seconds=1), stop=Stop())
    heartbeat.check()
    time.sleep(1.1)
    with pytest.raises(Unavailable) as raised:
        heartbeat.check()
    assert raised.value.error_code == "heartbeat_failed"


def test_of_several_tasks_each_removes_what_it_wrote_once_it_is_cancelled_for_all(records: SqliteRecords) -> None:
    """And none before that, or after somebody else has begun."""
    ours = [claim(records, "job.merged", execution="e", handed=None, term=TERM, tasks=2) for _ in range(2)]
    heartbeats = [Heartbeat(records, each, stop=Stop()) for each in ours]
    assert not any(heartbeat.is_ours() or heartbeat.is_cancelled() for heartbeat in heartbeats)
    update(
        records, "job.merged", lambda found: transition(found, State.CANCELLED, by=Actor.CALLER, now=lease.utc_now())
    )
    assert all(heartbeat.is_ours() and heartbeat.is_cancelled() for heartbeat in heartbeats)
    moved(records, State.QUEUED)
    claim(records, "job.merged", execution="other", handed=None, term=TERM)
    assert not any(heartbeat.is_ours() or heartbeat.is_cancelled() for heartbeat in heartbeats)


def test_a_cancelled_export_whose_work_hangs_is_cleared_and_the_process_ends(
    records: SqliteRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another that it holds is given back to the queue."""
    monkeypatch.setattr(stopping, "WORK_SECONDS", 0.2)
    codes: Queue[int] = Queue()
    stop, ended = Stop(), []
    stop.enforce(leave=codes.put)
    with Heartbeat(records, claimed(records), stop=stop, release=lambda: ended.append("released")) as heartbeat:
        heartbeat.cleared_by(lambda: ended.append("cleared"))
        update(
            records,
            "job.merged",
            lambda found: transition(found, State.CANCELLED, by=Actor.CALLER, now=lease.utc_now()),
        )
        assert codes.get(timeout=10) == stopping.TRY_AGAIN
    assert set(ended) == {"cleared"}
