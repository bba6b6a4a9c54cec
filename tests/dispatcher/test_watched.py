"""What a sweep tells of what waits, and since when an export waits."""

from datetime import timedelta

import pytest

from dispatcher.contract import JobMessage, State
from dispatcher.errors import SweepIncomplete, Unavailable
from dispatcher.watched import STUCK_AFTER, Backlog
from tests.dispatcher.world import START, World

MESSAGE = JobMessage(job_id="job", export_id="job.merged")


def test_an_export_waits_since_it_was_asked_for(world: World) -> None:
    """Sending its message again does not make it any younger."""
    world.job()
    world.submit()
    world.clock.pass_seconds(900)
    world.trigger.sweep()
    assert world.record().published_at == world.clock()
    assert world.record().queued_at == START


def test_a_refused_launch_has_waited_all_the_while(world: World) -> None:
    """Or one that is refused for ever would always have been queued just now."""
    world.job()
    world.submit()
    world.clock.pass_seconds(60)
    world.machines.down = True
    with pytest.raises(Unavailable):
        world.trigger.start(MESSAGE)
    assert (world.record().state, world.record().queued_at) == (State.QUEUED, START)


def test_one_that_ran_waits_anew(world: World) -> None:
    """What its last attempt took is no time that it waited."""
    world.job()
    world.launched()
    world.claim()
    world.clock.pass_seconds(3600)
    world.trigger.sweep()
    assert (world.record().state, world.record().queued_at) == (State.QUEUED, START + timedelta(hours=1))


def test_the_backlog_counts_what_waits_and_what_is_stuck(world: World) -> None:
    """A lease that has just run out is for the next sweep."""
    world.job()
    world.submit()
    waiting = world.record()
    world.trigger.start(MESSAGE)
    launched = world.record()
    assert launched.lease is not None
    for late, stuck in ((timedelta(0), 0), (STUCK_AFTER - timedelta(seconds=1), 0), (STUCK_AFTER, 1)):
        backlog = Backlog()
        backlog.saw(launched, launched.lease.expires_at + late)
        backlog.saw(waiting, START + timedelta(seconds=7))
        assert backlog == Backlog(unfinished=2, oldest_queued_seconds=7, stuck_leases=stuck)


def test_a_record_of_before_waits_since_its_last_change(world: World) -> None:
    """It does not say since when it waits, and may have been made, and have failed, long ago."""
    world.job()
    world.submit()
    old = world.record().model_copy(update={"queued_at": None, "created_at": START - timedelta(days=30)})
    backlog = Backlog()
    backlog.saw(old, START + timedelta(seconds=5))
    assert backlog.oldest_queued_seconds == 5


@pytest.mark.parametrize("ending", ["failed", "cancelled", "stale"])
def test_one_that_is_asked_for_again_waits_since_then(world: World, ending: str) -> None:
    """However long ago it was first asked for."""
    world.job()
    world.launched()
    world.claim()
    if ending == "failed":
        world.fail()
    elif ending == "cancelled":
        world.service.cancel("job.merged", "ann")
    else:
        world.complete()
        world.adapter("adapter-job", b"trained further")
    world.clock.pass_seconds(86400)
    assert world.submit().state is State.QUEUED
    assert world.record().queued_at == START + timedelta(days=1)


@pytest.mark.parametrize("first", ["old", "young"])
def test_the_oldest_is_told_in_whatever_order_they_come(world: World, first: str) -> None:
    """Of several that wait, the longest."""
    for job_id in ("old", "young"):
        world.job(job_id)
        world.submit(job_id)
        world.clock.pass_seconds(60)
    records = [world.record("old.merged"), world.record("young.merged")]
    backlog = Backlog()
    for record in records if first == "old" else reversed(records):
        backlog.saw(record, START + timedelta(seconds=120))
    assert backlog == Backlog(unfinished=2, oldest_queued_seconds=120, stuck_leases=0)


def test_a_sweep_that_did_not_get_through_tells_its_backlog_too(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It swept: what it could not tend is a matter of its own."""
    world.job()
    world.submit()
    world.clock.pass_seconds(600)
    world.queue.down = True
    with caplog.at_level("INFO"), pytest.raises(SweepIncomplete):
        world.trigger.sweep()
    (told,) = (vars(record) for record in caplog.records if vars(record).get("event") == "swept")
    assert (told["unfinished"], told["oldest_queued_seconds"]) == (1, 600)
