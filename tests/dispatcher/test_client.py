"""Following an export in this process ends, also when the exporter or the runner does not do its part."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dispatcher.bootstrap import Stack
from dispatcher.client import EmbeddedClient, Refused, follow
from dispatcher.errors import ExportError, InvalidRequest, Misconfigured
from dispatcher.jobqueue import InlineQueue
from dispatcher.runner import ProcessRunner
from dispatcher.service import Service
from dispatcher.settings import Settings
from dispatcher.trigger import Trigger
from tests.dispatcher.world import World

CRASH = "import sys; sys.exit(3)"
BODY = {"job_id": "job", "export_type": "merged"}


@dataclass
class Desk:
    """An embedded client over a world's stores, whose exporter is the given program."""

    world: World

    def client(self, program: str, *, log_dir: Path | None = None) -> EmbeddedClient:
        world = self.world

        def deliver(body: bytes, attributes: Mapping[str, str]) -> None:
            trigger.deliver(body, attributes)

        queue = InlineQueue(deliver, first_delay=0.001, max_deliveries=2)
        runner = ProcessRunner(
            log_dir or world.home / "logs", {}, retry_delay=0.001, program=(sys.executable, "-c", program)
        )
        trigger = Trigger(records=world.records, queue=queue, runner=runner, max_attempts=4)
        service = Service(
            records=world.records, artifacts=world.artifacts, runner=runner, tokens=world.tokens, trigger=trigger
        )
        settings = Settings.from_env({"GEMMA_EXPORT_HOME": str(world.home)})
        stack = Stack(settings, world.records, world.artifacts, world.tokens, queue, runner, trigger, service)
        return EmbeddedClient(stack, "ann")


@pytest.fixture
def desk(world: World) -> Desk:
    world.job()
    return Desk(world)


def test_an_exporter_that_dies_without_a_verdict_is_told_with_its_log(desk: Desk) -> None:
    """After its retries; nobody waits for a lease to run out."""
    client = desk.client(CRASH)
    client.submit(BODY)
    with pytest.raises(ExportError) as error:
        follow(client, "job.merged", interval=0.01)
    assert error.value.error_code == "exporter_died"
    assert ".log" in error.value.message
    client.close()


def test_an_exporter_that_cannot_be_started_is_told(desk: Desk) -> None:
    """After a few more tries than the queue's own."""
    desk.world.home.joinpath("file").write_text("")
    client = desk.client(CRASH, log_dir=desk.world.home / "file" / "logs")
    client.submit(BODY)
    with pytest.raises(ExportError) as error:
        follow(client, "job.merged", interval=0.01)
    assert error.value.error_code == "not_started"
    client.close()


def test_a_message_that_died_with_an_earlier_process_is_sent_again(desk: Desk) -> None:
    """Queued just now, by a command that was killed: asking again does not wait five minutes."""
    desk.world.clock.now = datetime.now(UTC)
    desk.world.submit()
    client = desk.client(CRASH)
    client.submit(BODY)
    with pytest.raises(ExportError, match="no verdict"):
        follow(client, "job.merged", interval=0.01)
    client.close()


def test_a_finished_export_is_shown_once_and_returned(desk: Desk) -> None:
    """Each status that differs from the last is shown."""
    client = desk.client(CRASH)
    client.submit({**BODY, "export_type": "adapter"})
    shown: list[str] = []
    final = follow(client, "job.adapter", show=lambda document: shown.append(document["state"]))
    assert final["state"] == "completed"
    assert shown == ["completed"]
    assert [document["export_id"] for document in client.list_exports(None)] == ["job.adapter"]
    client.close()


def test_a_bad_request_is_refused_as_over_http(desk: Desk) -> None:
    """With the field's name."""
    client = desk.client(CRASH)
    with pytest.raises(InvalidRequest, match="job_id"):
        client.submit({**BODY, "job_id": "a/b"})
    client.close()


def test_without_the_embedded_queue_there_is_nothing_to_follow_here(world: World) -> None:
    """Google's tell this process nothing."""
    settings = Settings.from_env({"GEMMA_EXPORT_HOME": str(world.home)})
    stack = Stack(
        settings,
        world.records,
        world.artifacts,
        world.tokens,
        world.queue,
        world.machines,
        world.trigger,
        world.service,
    )
    with pytest.raises(Misconfigured, match="--url"):
        EmbeddedClient(stack, "ann")


def test_the_gateways_own_refusal_is_told_as_it_says_it() -> None:
    """Its form is not ours: `{"code": 401, "message": …}`."""
    refused = Refused(401, {"code": 401, "message": "Jwt is missing"})
    assert (refused.message, refused.error_code) == ("Jwt is missing", "refused")
    assert refused.problem() == {
        **ExportError("Jwt is missing", code="refused").problem(),
        "title": "Refused",
        "status": 401,
        "detail": "Jwt is missing",
    }
