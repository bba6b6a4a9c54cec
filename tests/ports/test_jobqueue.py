"""What every queue promises: at least once, through a real encoding, again when refused."""

import json
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest

from dispatcher.contract import JobMessage
from dispatcher.errors import Misconfigured, Unavailable
from dispatcher.jobqueue import InlineQueue, JobQueue, open_queue
from infra.local.servers import free_port
from infra.local.topics import pushed, topic
from tests.ports.push import listening
from tests.waiting import until

MESSAGE = JobMessage(job_id="job", export_id="job.merged")
OTHER = JobMessage(job_id="other", export_id="other.merged")


class Receiver:
    """Remembers what was delivered; refuses each message as often as it is told."""

    def __init__(self) -> None:
        self.refusals: dict[str, int] = {}
        self.delivered: list[tuple[bytes, Mapping[str, str]]] = []
        self.accepted: list[str] = []

    def __call__(self, body: bytes, attributes: Mapping[str, str]) -> None:
        self.delivered.append((body, attributes))
        export_id = json.loads(body)["export_id"]
        if self.refusals.get(export_id, 0) > 0:
            self.refusals[export_id] -= 1
            raise Unavailable("not now")
        self.accepted.append(export_id)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture(params=["inline", "pubsub"])
def queue(request: pytest.FixtureRequest, receiver: Receiver) -> Iterator[JobQueue]:
    """An empty queue of each kind, whose messages go to the receiver."""
    with ExitStack() as stack:
        if request.param == "inline":
            queue: JobQueue = InlineQueue(receiver, first_delay=0.001)
        else:
            request.getfixturevalue("pubsub_server")
            project = f"project-{secrets.token_hex(6)}"
            stack.enter_context(topic(project, "exports"))
            stack.enter_context(pushed(project, "exports", stack.enter_context(listening(receiver))))
            queue = open_queue(f"pubsub://{project}/exports", receiver)
        stack.callback(queue.close)
        yield queue


def test_a_message_arrives_as_json_with_its_attributes(queue: JobQueue, receiver: Receiver) -> None:
    """What is delivered was really encoded."""
    queue.publish(MESSAGE, {"export_type": "merged", "traceparent": "00-a-b-01"})
    until(lambda: receiver.accepted, "the message")
    ((body, attributes),) = receiver.delivered
    assert JobMessage.model_validate_json(body) == MESSAGE
    assert attributes == {"export_type": "merged", "traceparent": "00-a-b-01"}


def test_a_refused_message_comes_again_and_holds_up_no_other(queue: JobQueue, receiver: Receiver) -> None:
    """Until it is accepted."""
    receiver.refusals["job.merged"] = 2
    queue.publish(MESSAGE, {})
    queue.publish(OTHER, {})
    until(lambda: len(receiver.accepted) == 2, "both messages")
    assert receiver.accepted == ["other.merged", "job.merged"]
    assert len(receiver.delivered) == 4


def test_a_closed_queue_may_be_closed_again(queue: JobQueue) -> None:
    """Whoever cleans up need not know who did before."""
    queue.publish(MESSAGE, {})
    queue.close()
    queue.close()


class TestInline:
    """What only a queue in this process can show."""

    def test_a_message_that_is_always_refused_ends(self) -> None:
        """Its record stays, and a sweep publishes it again."""
        receiver = Receiver()
        receiver.refusals["job.merged"] = 99
        queue = InlineQueue(receiver, first_delay=0.001, max_deliveries=4)
        queue.publish(MESSAGE, {})
        assert queue.drained(10)
        assert len(receiver.delivered) == 4
        queue.close()

    def test_closing_delivers_what_is_due_and_takes_nothing_more(self) -> None:
        """A message that waits for another delivery does not hold it up."""
        entered, go = threading.Event(), threading.Event()
        receiver = Receiver()
        receiver.refusals["other.merged"] = 1

        def slow(body: bytes, attributes: Mapping[str, str]) -> None:
            entered.set()
            assert go.wait(10)
            receiver(body, attributes)

        queue = InlineQueue(slow, first_delay=1000)
        queue.publish(OTHER, {})
        queue.publish(MESSAGE, {})
        assert entered.wait(10)
        closing = threading.Thread(target=queue.close)
        closing.start()
        go.set()
        closing.join(10)
        assert not closing.is_alive()
        assert receiver.accepted == ["job.merged"]
        with pytest.raises(Unavailable):
            queue.publish(MESSAGE, {})


class TestPubSub:
    """What only a queue elsewhere can show."""

    def test_a_publish_that_is_not_acknowledged_is_unavailable(
        self, pubsub_server: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No such topic, or nobody there; in bounded time."""
        monkeypatch.setattr("dispatcher.pubsub_queue.PUBLISH_SECONDS", 0.5)
        nowhere = open_queue("pubsub://project/nowhere", lambda body, attributes: None)
        with pytest.raises(Unavailable) as error:
            nowhere.publish(MESSAGE, {})
        assert error.value.error_code == "resource_missing"
        nowhere.close()
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", f"127.0.0.1:{free_port()}")
        nobody = open_queue("pubsub://project/topic", lambda body, attributes: None)
        with pytest.raises(Unavailable):
            nobody.publish(MESSAGE, {})
        nobody.close()


@pytest.mark.parametrize(
    "url", ["redis://x", "pubsub:", "pubsub://project", "pubsub://project/a/b", "pubsub:///t", "pubsub://p/t t"]
)
def test_a_url_that_selects_no_queue_is_refused(url: str) -> None:
    """With what was expected."""
    with pytest.raises(Misconfigured) as error:
        open_queue(url, Receiver())
    assert "pubsub://project/topic" in error.value.message
