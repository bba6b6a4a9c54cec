"""`start_export` and `fail_export`, as functions-framework calls them: with CloudEvents, and with raw pushes."""

import base64
import io
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import functions_framework
import pytest
from werkzeug.test import Client

from dispatcher import bootstrap, main
from dispatcher.contract import State
from dispatcher.errors import LaunchInDoubt, Unavailable
from dispatcher.logs import configure
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
    assert push(events, envelope(BODY)) == 503
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


def test_an_export_that_no_runner_takes_is_given_up_with_its_message(
    world: World, events: Client, dead_letters: Client
) -> None:
    """Each refusal gave the lease back; the message was out all the while."""
    world.job()
    world.submit()
    world.machines.down = True
    for _ in range(5):
        assert push(events, envelope(BODY)) == 503
    assert push(dead_letters, envelope(BODY)) == 200
    assert world.record().state is State.FAILED


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


def test_a_dead_letter_waits_for_a_launch_that_may_still_succeed_and_then_launches_again(
    world: World, dead_letters: Client
) -> None:
    """The message was refused for the sake of that launch; only when launch after launch dies, it is given up."""
    world.job()
    world.submit()
    world.machines.in_doubt = True
    for launches in range(1, 6):
        with pytest.raises(LaunchInDoubt):
            world.queue.deliver_all(world.trigger)
        assert push(dead_letters, envelope(BODY)) == 503
        assert (world.record().state, world.record().launches) == (State.STARTING, launches)
        world.clock.pass_seconds(1000)
        assert push(dead_letters, envelope(BODY)) == 200
    error = world.record().error
    assert error is not None
    assert (error.code, error.retryable) == ("could_not_start", True)
    assert world.queue.held == []


def test_a_dead_letter_of_an_export_whose_next_message_was_never_sent_sends_it(
    world: World, dead_letters: Client
) -> None:
    """The queue was down when it was queued again."""
    world.job()
    world.queue.down = True
    with pytest.raises(Unavailable):
        world.submit()
    assert push(dead_letters, envelope(BODY)) == 503
    world.queue.down = False
    assert push(dead_letters, envelope(BODY)) == 200
    assert len(world.queue.held) == 1
    assert world.record().state is State.QUEUED


def test_a_dead_letter_of_a_record_that_cannot_be_read_is_dropped(
    world: World, dead_letters: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead letter has no dead letters of its own, so it would come back for a week."""
    world.job()
    world.submit()
    with closing(sqlite3.connect(world.home / "records.db", isolation_level=None)) as database:
        database.execute("UPDATE exports SET document = '{}'")
    assert push(dead_letters, envelope(BODY)) == 200
    assert any("record_invalid" in record.getMessage() for record in caplog.records if record.levelname == "ERROR")


def test_a_refusal_is_one_line_with_its_ids_and_code(world: World, events: Client) -> None:
    """Flask's own line for an error would have a traceback and no ids."""
    world.job()
    world.submit()
    world.machines.down = True
    lines = io.StringIO()
    before = logging.root.handlers[:], logging.root.level
    configure(lines, project_id="p")
    try:
        assert push(events, envelope(BODY, traceparent=f"00-{'a' * 32}-{'b' * 16}-01")) == 503
    finally:
        logging.root.handlers[:], logging.root.level = before
    (line,) = [json.loads(line) for line in lines.getvalue().splitlines() if "not acknowledged" in line]
    assert line["severity"] == "WARNING"
    assert (line["job_id"], line["export_id"], line["message_id"]) == ("job", "job.merged", "message-1")
    assert line["code"] == "unavailable"
    assert line["logging.googleapis.com/trace"] == f"projects/p/traces/{'a' * 32}"
    assert "Traceback" not in lines.getvalue()


def test_a_trace_that_is_none_goes_no_further(world: World, events: Client) -> None:
    """Into no environment, whoever published the message."""
    world.job()
    world.submit()
    assert push(events, envelope(BODY, traceparent="hf_secret\nEVIL=1")) == 200
    assert "TRACEPARENT" not in world.machines.started["execution-1"][1]
