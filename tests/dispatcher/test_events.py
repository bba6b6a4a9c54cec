"""`start_export`, as functions-framework calls it with Pub/Sub's CloudEvents."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import functions_framework
import pytest
from werkzeug.test import Client

from dispatcher import bootstrap, main
from dispatcher.settings import Settings
from tests.dispatcher.world import World


@pytest.fixture
def events(world: World) -> Iterator[Client]:
    """A client of the CloudEvent target."""
    stack = bootstrap.Stack(
        settings=Settings.from_env({"GEMMA_EXPORT_HOME": str(world.home)}),
        records=world.records,
        artifacts=world.artifacts,
        tokens=world.tokens,
        queue=world.queue,
        runner=world.machines,
        trigger=world.trigger,
        service=world.service,
    )
    bootstrap.install(stack)
    source = str(Path(main.__file__))
    yield Client(functions_framework.create_app("start_export", source, "cloudevent"))
    bootstrap.install(None)


def push(events: Client, data: Any) -> int:
    headers = {
        "ce-id": "event-1",
        "ce-source": "//pubsub.googleapis.com/projects/p/topics/t",
        "ce-specversion": "1.0",
        "ce-type": "google.cloud.pubsub.topic.v1.messagePublished",
    }
    return events.post("/", json=data, headers=headers).status_code


def envelope(body: bytes, **attributes: str) -> dict[str, Any]:
    data = base64.b64encode(body).decode()
    return {"message": {"data": data, "attributes": attributes, "messageId": "message-1"}, "subscription": "s"}


BODY = json.dumps({"schema_version": 1, "job_id": "job", "export_id": "job.merged"}).encode()


def test_a_published_message_starts_its_export_once(world: World, events: Client) -> None:
    """Delivered three times, it has one execution, which carries its trace."""
    world.job()
    world.submit()
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    for _ in range(3):
        assert push(events, envelope(BODY, traceparent=trace)) == 200
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
    world: World, events: Client, caplog: pytest.LogCaptureFixture, data: Any
) -> None:
    """It would come back until the end of its retention."""
    assert push(events, data) == 200
    assert world.machines.started == {}
    assert any(getattr(record, "message_id", None) for record in caplog.records)
