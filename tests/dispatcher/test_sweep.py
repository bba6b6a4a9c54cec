"""A whole sweep, and the function target that Cloud Scheduler calls."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import functions_framework
import pytest
from werkzeug.test import Client

from dispatcher import bootstrap, main
from dispatcher.artifacts import publish
from dispatcher.contract import State
from dispatcher.errors import SweepIncomplete, Unavailable
from dispatcher.settings import Settings
from dispatcher.sweep import swept
from tests.dispatcher.server import stack_of
from tests.dispatcher.world import START, World

NOTHING = {"requeued": 0, "failed": 0, "published": 0, "collected": 0}


@pytest.fixture
def scheduler(world: World) -> Iterator[Client]:
    """A client of the target that sweeps."""
    bootstrap.install(stack_of(world, Settings.from_env({"GEMMA_EXPORT_HOME": str(world.home)})))
    yield Client(functions_framework.create_app("sweep", str(Path(main.__file__)), "http"))
    bootstrap.install(None)


def leave_behind(world: World, job_id: str) -> str:
    """A file of an attempt that was given up when it was cancelled, a year and some months ago."""
    path = f"merged_models/{job_id}/0123456789ab/config.json"
    publish(world.artifacts, path, lambda writer: writer.write(b"{}"))
    world.job(job_id)
    world.submit(job_id)
    world.service.cancel(f"{job_id}.merged", "ann")
    return world.artifacts.uri(path)


def test_scheduler_is_told_what_was_done(world: World, scheduler: Client) -> None:
    """A message is sent again, and what a cancelled export left is collected, by the real clock."""
    left = leave_behind(world, "old")
    world.job()
    world.submit()
    world.clock.pass_seconds(300)
    answer = scheduler.post("/")
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    assert answer.get_json() == {**NOTHING, "published": 1, "collected": 1}
    assert not world.artifacts.exists(left)
    assert scheduler.post("/", data=b"\xff" * 100_000).get_json() == NOTHING


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_only_a_post_sweeps(world: World, scheduler: Client, method: str) -> None:
    """Whatever a browser or a health check tries changes nothing."""
    world.job()
    world.submit()
    world.queue.held.clear()
    world.clock.pass_seconds(300)
    answer = scheduler.open("/", method=method)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert world.queue.held == []


def test_scheduler_is_asked_to_come_again_when_something_did_not_get_through(world: World, scheduler: Client) -> None:
    """What was done is said all the same; and the messages do not keep the collector from its work."""
    left = leave_behind(world, "old")
    world.job()
    world.submit()
    world.clock.pass_seconds(300)
    world.queue.down = True
    answer = scheduler.post("/")
    assert (answer.status_code, answer.mimetype) == (503, "application/problem+json")
    problem = json.loads(answer.data)
    assert problem["code"] == "sweep_incomplete"
    assert problem["detail"] == "1 collected; 1 left to the next sweep: job.merged: the queue is down"
    assert not world.artifacts.exists(left)


def test_a_store_that_is_away_is_said(world: World, scheduler: Client) -> None:
    """It tells no exports at all."""
    world.records.close()
    (world.home / "records.db").unlink(missing_ok=True)
    (world.home / "records.db").write_bytes(b"no database" * 1000)
    for name in ("records.db-wal", "records.db-shm"):
        (world.home / name).unlink(missing_ok=True)
    answer = scheduler.post("/")
    assert answer.status_code == 503
    assert "does not answer" in json.loads(answer.data)["detail"]


def test_what_a_sweep_misses_of_both_is_said_together(world: World) -> None:
    """Of messages and of versions."""
    leave_behind(world, "old")
    world.job()
    world.submit()
    world.clock.pass_seconds(3600)
    world.queue.down = True

    def refuse(path: str) -> list[str]:
        raise Unavailable("the bucket is away")

    world.artifacts.children = refuse  # type: ignore[method-assign]
    with pytest.raises(SweepIncomplete) as error:
        swept(world.trigger, world.collector)
    assert error.value.missed == ["job.merged: the queue is down", "old.merged: the bucket is away"]
    assert error.value.done == NOTHING


def test_no_record_of_a_sweep_looks_like_news_of_the_export(world: World) -> None:
    """Its owner reads in `updated_at` when it ended."""
    leave_behind(world, "old")
    world.clock.pass_seconds(3600)
    assert swept(world.trigger, world.collector) == {**NOTHING, "collected": 1}
    record = world.record("old.merged")
    assert (record.state, record.updated_at, record.uncollected_since) == (State.CANCELLED, START, None)
    world.clock.now += timedelta(days=30)
    assert swept(world.trigger, world.collector) == NOTHING
