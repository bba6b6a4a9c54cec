"""Carries a message from the request that was accepted to the trigger that starts its job."""

import heapq
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dispatcher.contract import JobMessage
from dispatcher.errors import Misconfigured, Unavailable

logger = logging.getLogger(__name__)

Handler = Callable[[bytes, Mapping[str, str]], None]
"""Takes a message's JSON and attributes; returning acknowledges it, raising asks for another delivery."""


class JobQueue(Protocol):
    """Delivers each message at least once."""

    def publish(self, message: JobMessage, attributes: Mapping[str, str]) -> None:
        """Hand the message over.

        Raises:
            Unavailable: It was not acknowledged; it may or may not be delivered.
        """

    def close(self) -> None:
        """Stop, after what was accepted had its turn."""


@dataclass(order=True)
class _Delivery:
    due: float
    number: int
    body: bytes = field(compare=False)
    attributes: Mapping[str, str] = field(compare=False)
    attempt: int = field(default=1, compare=False)


class InlineQueue:
    """A queue in this process: one worker thread, at-least-once delivery with exponential backoff.

    Args:
        handler: Called in the worker thread, one message at a time.
        max_deliveries: After so many refusals a message is dropped; its record stays queued, and a rescan or
            a sweep publishes it again.
        first_delay: Seconds before the second delivery; it doubles up to `longest_delay`.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        max_deliveries: int = 12,
        first_delay: float = 0.2,
        longest_delay: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handler = handler
        self._max_deliveries = max_deliveries
        self._first_delay = first_delay
        self._longest_delay = longest_delay
        self._clock = clock
        self._numbers = itertools.count()
        self._waiting: list[_Delivery] = []
        self._busy = False
        self._closing = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="inline-queue", daemon=True)
        self._worker.start()

    def publish(self, message: JobMessage, attributes: Mapping[str, str]) -> None:
        body = message.model_dump_json().encode()
        with self._changed:
            if self._closing:
                raise Unavailable("the queue is closing: ask again")
            delivery = _Delivery(self._clock(), next(self._numbers), body, dict(attributes))
            heapq.heappush(self._waiting, delivery)
            self._changed.notify_all()

    def drained(self, timeout: float | None = None) -> bool:
        """Wait until no message is left, those waiting for another delivery included; whether that came."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def close(self) -> None:
        """Deliver what is due now, drop what waits for another delivery, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def _work(self) -> None:
        while (delivery := self._next()) is not None:
            refused = self._refused(delivery)
            with self._changed:
                self._busy = False
                if refused:
                    self._again(delivery)
                self._changed.notify_all()

    def _next(self) -> _Delivery | None:
        with self._changed:
            while True:
                now = self._clock()
                if self._waiting and self._waiting[0].due <= now:
                    self._busy = True
                    return heapq.heappop(self._waiting)
                if self._closing:
                    return None
                self._changed.wait(self._waiting[0].due - now if self._waiting else None)

    def _refused(self, delivery: _Delivery) -> bool:
        try:
            self._handler(delivery.body, delivery.attributes)
        except Exception as error:  # noqa: BLE001  # an entry point: whatever the handler raises means "again"
            logger.warning("delivery %d of a message was refused: %s", delivery.attempt, error)
            return True
        return False

    def _again(self, delivery: _Delivery) -> None:
        if delivery.attempt >= self._max_deliveries:
            logger.error("a message was dropped after %d deliveries: %r", delivery.attempt, delivery.body)
            return
        delivery.due = self._clock() + min(self._first_delay * 2 ** (delivery.attempt - 1), self._longest_delay)
        delivery.attempt += 1
        heapq.heappush(self._waiting, delivery)


def open_queue(url: str, handler: Handler) -> JobQueue:
    """The queue that a URL selects: `inline:` (delivers to `handler`) or `pubsub://project/topic`."""
    if url == "inline:":
        return InlineQueue(handler)
    match = re.fullmatch(r"pubsub://([a-z0-9:.-]+)/([A-Za-z0-9._~+%-]+)", url)
    if match:
        from dispatcher.pubsub_queue import PubSubQueue

        return PubSubQueue(match[1], match[2])
    raise Misconfigured(f"queue {url!r}: expected inline: or pubsub://project/topic")
