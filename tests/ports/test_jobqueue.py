"""What every queue promises: at least once, through a real encoding, again when refused."""

import json
import threading
from collections.abc import Iterator, Mapping

import pytest

from dispatcher.contract import JobMessage
from dispatcher.errors import Misconfigured, Unavailable
from dispatcher.jobqueue import InlineQueue, open_queue

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


@pytest.fixture(params=["inline"])
def queue(request: pytest.FixtureRequest, receiver: Receiver) -> Iterator[InlineQueue]:
    assert request.param == "inline"
    queue = InlineQueue(receiver, first_delay=0.001)
    yield queue
    queue.close()


def test_a_message_arrives_as_json_with_its_attributes(queue: InlineQueue, receiver: Receiver) -> None:
    """What is delivered was really encoded."""
    queue.publish(MESSAGE, {"export_type": "merged"})
    assert queue.drained(10)
    ((body, attributes),) = receiver.delivered
    assert JobMessage.model_validate_json(body) == MESSAGE
    assert attributes == {"export_type": "merged"}


def test_a_refused_message_comes_again_and_holds_up_no_other(queue: InlineQueue, receiver: Receiver) -> None:
    """Until it is accepted."""
    receiver.refusals["job.merged"] = 3
    queue.publish(MESSAGE, {})
    queue.publish(OTHER, {})
    assert queue.drained(10)
    assert sorted(receiver.accepted) == ["job.merged", "other.merged"]
    assert len(receiver.delivered) == 5


def test_a_message_that_is_always_refused_ends() -> None:
    """Its record stays, and a sweep publishes it again."""
    receiver = Receiver()
    receiver.refusals["job.merged"] = 99
    queue = InlineQueue(receiver, first_delay=0.001, max_deliveries=4)
    queue.publish(MESSAGE, {})
    assert queue.drained(10)
    assert len(receiver.delivered) == 4
    queue.close()


def test_closing_delivers_what_is_due_and_takes_nothing_more() -> None:
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


def test_a_url_selects_the_queue() -> None:
    """Pub/Sub is named, and says that it is not there yet."""
    with pytest.raises(Misconfigured) as error:
        open_queue("pubsub://project/topic", Receiver())
    assert error.value.error_code == "not_available_yet"
    with pytest.raises(Misconfigured):
        open_queue("redis://x", Receiver())
