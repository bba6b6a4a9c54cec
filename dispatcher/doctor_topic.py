"""Doctor's question to Pub/Sub: whether messages may be published; none is, since it would be delivered."""

from functools import cache
from urllib.parse import urlsplit

from google.api_core import exceptions as api
from google.cloud import pubsub_v1

from dispatcher.doctor_findings import CALL_SECONDS, DENIED, FINE, Check, Group, Outcome, Verdict, Wanted, needing
from dispatcher.google_errors import translating
from dispatcher.permissions import Resource

_PUBLISH = "pubsub.topics.publish"


def topic_group(url: str, wanted: Wanted) -> Group:
    """The check of a topic, `pubsub://project/topic`."""
    parts = urlsplit(url)
    topic = f"projects/{parts.netloc}/topics/{parts.path.strip('/')}"

    @cache
    def client() -> pubsub_v1.PublisherClient:
        with translating(topic):
            return pubsub_v1.PublisherClient()

    def close() -> None:
        if client.cache_info().currsize:
            client().stop()

    check = Check("topic.publish", f"see that messages may be published to {topic}", lambda: _asked(client(), topic))
    return Group(needing(check, wanted.grant(Resource.TOPIC, _PUBLISH, topic)), close)


def _asked(client: pubsub_v1.PublisherClient, topic: str) -> Verdict:
    with translating(topic):
        try:
            request = {"resource": topic, "permissions": [_PUBLISH]}
            answer = client.test_iam_permissions(request=request, timeout=CALL_SECONDS, retry=None)
        except api.MethodNotImplemented:
            client.get_topic(topic=topic, timeout=CALL_SECONDS, retry=None)
            return Verdict(
                Outcome.UNKNOWN, "emulated", "the topic is there, on an emulator, which checks no permission"
            )
        if _PUBLISH in answer.permissions:
            return FINE
        try:
            # IAM says the same of a topic that is not there.
            client.get_topic(topic=topic, timeout=CALL_SECONDS, retry=None)
        except api.Forbidden:
            return Verdict(Outcome.MISSING, DENIED, f"{topic} may not be published to, or is not there")
    return Verdict(Outcome.MISSING, DENIED, f"{topic} may not be published to")
