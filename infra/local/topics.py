"""Topics and push subscriptions as a deployment has them, made in Pub/Sub's emulator."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from google.cloud import pubsub_v1

RETENTION = timedelta(days=7)
"""How far back a replay can go."""


@contextmanager
def topic(project: str, name: str) -> Iterator[str]:
    """A new topic; yields its full name."""
    with pubsub_v1.PublisherClient() as publisher:
        path = publisher.topic_path(project, name)
        publisher.create_topic(name=path)
        yield path
        publisher.delete_topic(topic=path)


@contextmanager
def pushed(
    project: str, name: str, endpoint: str, *, dead_letters: str | None = None, deliveries: int = 5
) -> Iterator[str]:
    """A subscription that pushes a topic's messages to an endpoint; yields its full name.

    Args:
        project: Google Cloud project id.
        name: The topic's id; the subscription's is that and `-push`.
        endpoint: The URL that takes the messages.
        dead_letters: The full name of the topic for messages that are not acknowledged in so many `deliveries`.
        deliveries: At least 5, the least that Pub/Sub takes.
    """
    with pubsub_v1.SubscriberClient() as subscriber:
        path = subscriber.subscription_path(project, f"{name}-push")
        request = {
            "name": path,
            "topic": subscriber.topic_path(project, name),
            "push_config": {"push_endpoint": endpoint},
            "ack_deadline_seconds": 60,
            "retain_acked_messages": True,
            "message_retention_duration": RETENTION,
            "retry_policy": {"minimum_backoff": timedelta(seconds=0), "maximum_backoff": timedelta(seconds=1)},
        }
        if dead_letters:
            request["dead_letter_policy"] = {"dead_letter_topic": dead_letters, "max_delivery_attempts": deliveries}
        subscriber.create_subscription(request=request)
        yield path
        subscriber.delete_subscription(subscription=path)


def seek(subscription: str, to: datetime) -> None:
    """Deliver again what was published since a moment, acknowledged or not: an operator's replay."""
    with pubsub_v1.SubscriberClient() as subscriber:
        subscriber.seek(request={"subscription": subscription, "time": to.astimezone(UTC)})
