"""`start_export` and `fail_export`, as functions-framework calls them: with CloudEvents, and with raw pushes."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import functions_framework
import pytest
from werkzeug.test import Client

from dispatcher import bootstrap, main
from dispatcher.contract import State
from dispatcher.errors import LaunchInDoubt
from dispatcher.settings import Settings
from tests.dispatcher.server import stack_of
from tests.dispatcher.world import World

SOURCE = str(Path(main.__file__))


@pytest.fixture
def stack(world: World) -> Iterator[None]:
    """The world's stores, where the targets look for them."""
    settings = Settings.from_env({"GEMMA_EXPORT_HOME": str(world.home)})
    bootstrap.install(stack_of(world, settings))
    yield
    bootstrap.install(None)


@pytest.fixture
def events(stack: None) -> Client:
    """A client of the target that starts exports."""
    return Client(functions_framework.create_app("start_export", SOURCE, "cloudevent"))


@pytest.fixture
def dead_letters(stack: None) -> Client:
    """A client of the target that gives exports up."""
    return Client(functions_framework.create_app("fail_export", SOURCE, "cloudevent"))


def push(events: Client, data: Any) -> int:
    """Eventarc's form."""
    headers = {
        "ce-id": "event-1",
        "ce-source": "//pubsub.googleapis.com/projects/p/topics/t",
        "ce-specversion": "1.0",
        "ce-type": "google.cloud.pubsub.topic.v1.messagePublished",
    }
    return events.post("/", json=data, headers=headers).status_code


def push_raw(events: Client, data: Any) -> int:
    """What a push subscription sends by itself."""
    return events.post("/projects/p/topics/t", json=data).status_code


def envelope(body: bytes, **attributes: str) -> dict[str, Any]:
    data = base64.b64encode(body).decode()
    return {"message": {"data": data, "attributes": attributes, "messageId": "message-1"}, "subscription": "s"}


BODY = json.dumps({"schema_version": 1, "job_id": "job", "export_id": "job.merged"}).encode()


Push = Callable[[Client, Any], int]
either_form = pytest.mark.parametrize("send", [push, push_raw])


@either_form
def test_a_published_message_starts_its_export_once(world: World, events: Client, send: Push) -> None:
    """Delivered three times, it has one execution, which carries its trace."""
    world.job()
    world.submit()
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    for _ in range(3):
        assert send(events, envelope(BODY, traceparent=trace)) == 200
    assert len(world.machines.started) == 1
    assert world.machines.started["execution-1"][1]["TRACEPARENT"] == trace


def test_a_launch_that_fails_is_not_acknowledged(world: World, events: Client) -> None:
    """The next delivery tries again."""
    world.job()
    world.submit()
    world.machines.down = True
    assert push(events, envelope(BODY)) == 500
    world.machines.down = False
    assert push(events, envelope(BODY)) == 200
    assert world.record().execution == "execution-1"


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        {"message": None},
        {"message": {"data": "%%%"}},
        {"message": {"data": 7}},
        {"message": {"attributes": 7}},
        envelope(b"no json"),
        envelope(b"{}"),
        envelope(b'{"job_id": "a", "export_id": "b.merged"}'),
    ],
)
def test_a_malformed_message_is_acknowledged_and_logged_with_its_id(
    world: World, events: Client, dead_letters: Client, caplog: pytest.LogCaptureFixture, data: Any
) -> None:
    """It would come back until the end of its retention."""
    for target in (events, dead_letters):
        caplog.clear()
        assert push(target, data) == 200
        assert any(getattr(record, "message_id", None) for record in caplog.records)
    assert world.machines.started == {}


@either_form
def test_a_dead_letter_fails_its_export(world: World, dead_letters: Client, send: Push) -> None:
    """Its owner learns of it, and may ask again."""
    world.job()
    world.submit()
    assert send(dead_letters, envelope(BODY)) == 200
    error = world.record().error
    assert error is not None
    assert (error.code, error.retryable) == ("could_not_start", True)
    assert world.submit().state is State.QUEUED


def test_a_dead_letter_changes_nothing_that_is_under_way_or_done(world: World, dead_letters: Client) -> None:
    """Nor what does not exist."""
    world.job()
    assert push(dead_letters, envelope(BODY)) == 200
    launched = world.launched()
    assert push(dead_letters, envelope(BODY)) == 200
    assert world.record() == launched
    world.claim()
    done = world.complete()
    assert push(dead_letters, envelope(BODY)) == 200
    assert world.record() == done


def test_a_dead_letter_waits_for_a_launch_that_may_still_succeed(world: World, dead_letters: Client) -> None:
    """It comes again; once the launch's lease has run out, the export is given up."""
    world.job()
    world.submit()
    world.machines.in_doubt = True
    with pytest.raises(LaunchInDoubt):
        world.queue.deliver_all(world.trigger)
    assert push(dead_letters, envelope(BODY)) == 500
    assert world.record().state is State.STARTING
    world.clock.pass_seconds(1000)
    assert push(dead_letters, envelope(BODY)) == 200
    assert world.record().state is State.FAILED
