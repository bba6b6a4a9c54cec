"""Messages through Pub/Sub; a push subscription delivers them to `main.start_export`."""

import threading
from collections.abc import Mapping
from concurrent.futures import TimeoutError as Unanswered
from typing import TYPE_CHECKING

from dispatcher.contract import JobMessage
from dispatcher.errors import Unavailable

if TYPE_CHECKING:
    from google.cloud.pubsub_v1 import PublisherClient

PUBLISH_SECONDS = 10.0
"""How long a publish is repeated before its caller is told to ask again."""


class PubSubQueue:
    """A topic.

    Args:
        project: Google Cloud project id.
        topic: Topic id.
    """

    def __init__(self, project: str, topic: str) -> None:
        self._topic = f"projects/{project}/topics/{topic}"
        self._client: PublisherClient | None = None
        self._lock = threading.Lock()

    def publish(self, message: JobMessage, attributes: Mapping[str, str]) -> None:
        from google.api_core.retry import Retry

        from dispatcher.google_errors import FAULTS, translated

        body = message.model_dump_json().encode()
        retry = Retry(initial=0.1, maximum=2.0, timeout=PUBLISH_SECONDS)
        try:
            sent = self._publisher().publish(self._topic, body, retry=retry, timeout=PUBLISH_SECONDS, **attributes)
            # The client sends in the background: only its answer says that the message is kept.
            sent.result(timeout=PUBLISH_SECONDS + 1)
        except Unanswered as error:
            raise Unavailable(f"{self._topic} does not answer: ask again") from error
        except FAULTS as error:
            # Whatever the reason, the record is there and waits for the message: asking again sends it.
            fault = translated(error, self._topic)
            raise Unavailable(fault.message, code=fault.error_code) from error

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.stop()
                self._client = None

    def _publisher(self) -> "PublisherClient":
        with self._lock:
            if self._client is None:
                # Here, since most requests to a dispatcher publish nothing, and this costs half a second.
                from google.cloud import pubsub_v1

                self._client = pubsub_v1.PublisherClient(
                    batch_settings=pubsub_v1.types.BatchSettings(max_messages=1, max_latency=0)
                )
            return self._client
