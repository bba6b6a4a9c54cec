"""What a sweep tells of what waits, and since when an export waits."""

from datetime import timedelta

import pytest

from dispatcher.contract import JobMessage, State
from dispatcher.errors import Unavailable
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


def test_a_record_of_before_waits_since_it_was_made(world: World) -> None:
    """It does not say since when it waits."""
    world.job()
    world.submit()
    backlog = Backlog()
    backlog.saw(world.record().model_copy(update={"queued_at": None}), START + timedelta(seconds=5))
    assert backlog.oldest_queued_seconds == 5
