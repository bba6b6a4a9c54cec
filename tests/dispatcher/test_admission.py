"""A user's unfinished exports are bounded, however many requests come at once."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dispatcher.contract import UNFINISHED, ExportRecord, State
from dispatcher.errors import TooManyExports, Unavailable
from dispatcher.sqlite_records import SqliteRecords
from tests.dispatcher.world import World

BOUND = 5


class Overtaken(SqliteRecords):
    """A store in which others' records are written just before the next queued one: what a race may come to."""

    others: tuple[ExportRecord, ...] = ()
    together: threading.Barrier | None = None
    """Where all wait for each other before they write their records, and once more after."""

    def create_export(self, record: ExportRecord, *, job_result: Mapping[str, str] | None = None) -> bool:
        self._overtake()
        if self.together is not None:
            self.together.wait(timeout=30)
        created = super().create_export(record, job_result=job_result)
        if self.together is not None:
            self.together.wait(timeout=30)
        return created

    def replace_export(
        self, old: ExportRecord, new: ExportRecord, *, job_result: Mapping[str, str] | None = None
    ) -> bool:
        if new.state is State.QUEUED:
            self._overtake()
        return super().replace_export(old, new, job_result=job_result)

    def _overtake(self) -> None:
        others, self.others = self.others, ()
        for other in others:
            assert super().create_export(other)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, records=Overtaken(tmp_path / "records.db"), max_unfinished_per_user=BOUND)
    yield world
    world.close()


def overtake(world: World) -> None:
    """Lets as many exports of ann's be accepted as may be, between the next request's count and its record."""
    assert isinstance(world.records, Overtaken)
    unfinished = []
    for number in range(BOUND):
        world.job(f"other{number}", user="eve")
        record = world.submit(f"other{number}", user="eve")
        unfinished.append(record.model_copy(update={"user_id": "ann", "export_id": f"a{number}.merged"}))
    world.queue.held.clear()
    world.records.others = tuple(unfinished)


def asked_at_once(world: World, number: int) -> int:
    """How many of so many exports of ann's, each asked for by a thread of its own, were accepted."""
    for job in range(number):
        world.job(f"job{job}")

    def ask(job: int) -> bool:
        try:
            world.submit(f"job{job}", hf_token="hf_" + "x" * 20)
        except TooManyExports:
            return False
        return True

    with ThreadPoolExecutor(number) as pool:
        return sum(pool.map(ask, range(number)))


@pytest.mark.parametrize("counted_before", [True, False])
def test_of_a_crowd_as_many_are_accepted_as_may_be(world: World, counted_before: bool) -> None:
    """Not one more, and not one fewer, though all may have counted before any had written; of the others nothing is
    published, and no token is kept."""
    assert isinstance(world.records, Overtaken)
    world.records.together = threading.Barrier(30) if counted_before else None
    accepted = asked_at_once(world, 30)
    unfinished = world.records.list_exports(states=UNFINISHED)
    assert accepted == len(unfinished) == len(world.queue.held) == BOUND
    refused = world.records.list_exports(states={State.CANCELLED})
    assert len(refused) == 30 - BOUND or not counted_before
    assert all(record.error and record.error.code == "too_many_exports" for record in refused)
    assert all(record.token_ref is None for record in refused)
    assert len([*(world.home / "tokens").iterdir()]) == BOUND


def test_a_request_that_was_overtaken_is_withdrawn(world: World) -> None:
    """It counted too early; its record says why it is cancelled, and asking again later goes through."""
    world.job()
    overtake(world)
    with pytest.raises(TooManyExports):
        world.submit()
    record = world.record()
    assert (record.state, record.error and record.error.code) == (State.CANCELLED, "too_many_exports")
    assert world.queue.held == []
    world.service.cancel("a0.merged", "ann")
    assert world.submit().state is State.QUEUED


def test_what_was_there_before_a_withdrawn_request_is_there_again(world: World) -> None:
    """A finished export whose adapter has changed since keeps its artifact."""
    world.job()
    world.launched()
    world.claim()
    done = world.complete()
    (world.home / "adapter-job" / "adapter_model.safetensors").write_bytes(b"other weights")
    overtake(world)
    with pytest.raises(TooManyExports):
        world.submit()
    same = {"revision", "updated_at"}
    assert world.record().model_dump(exclude=same) == done.model_dump(exclude=same)


@pytest.mark.parametrize("retryable", [True, False])
def test_a_withdrawn_requests_token_stays_where_a_retry_needs_one(world: World, retryable: bool) -> None:
    """It is newer than the one that the failed export had, and goes where no retry is to come."""
    world.job()
    world.submit(hf_token="hf_" + "o" * 20)
    world.queue.deliver_all(world.trigger)
    world.claim()
    world.fail(retryable=retryable)
    overtake(world)
    with pytest.raises(TooManyExports):
        world.submit(hf_token="hf_" + "n" * 20)
    record = world.record()
    assert record.state is State.FAILED
    if retryable:
        assert world.tokens.get(str(record.token_ref)) == "hf_" + "n" * 20
    else:
        assert list((world.home / "tokens").iterdir()) == []


def test_what_is_unfinished_may_be_asked_for_again_at_the_bound(world: World) -> None:
    """Also where its message was never sent, since the queue was down."""
    for number in range(BOUND):
        world.job(f"job{number}")
        if number:
            world.submit(f"job{number}")
    world.queue.down = True
    with pytest.raises(Unavailable, match="queue is down"):
        world.submit("job0")
    world.queue.down = False
    for number in range(BOUND):
        assert world.submit(f"job{number}").state is State.QUEUED
    assert len(world.queue.held) == BOUND
