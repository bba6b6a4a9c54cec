"""A gRPC server between a client and one of Google's emulators: it answers as IAM would, which they leave out.

Everything else is passed on as it is, both ways; so what is refused here is a call that the client has really made, and
what is not refused has really been done. Which permissions a call needs says
https://cloud.google.com/firestore/docs/security/iam
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.cloud.firestore_v1 import types
from google.iam.v1 import iam_policy_pb2

from infra.local.rpc import abort, deny, serving

FIRESTORE = "/google.firestore.v1.Firestore/"
TEST_PERMISSIONS = "/google.iam.v1.IAMPolicy/TestIamPermissions"
GET_TOPIC = "/google.pubsub.v1.Publisher/GetTopic"
_ENTITIES = "datastore.entities."
_RESERVED = (":", "grpc-", "user-agent", "content-type", "te")


@dataclass
class Iam:
    """What callers may do."""

    denied: set[str] = field(default_factory=set)
    """The permissions that they lack."""
    checks: bool = True
    """Whether TestIamPermissions of Pub/Sub is answered, as the service does, or not, as the emulator."""
    lenient: bool = False
    """Whether commits are done without a look at their preconditions."""
    unindexed: set[tuple[str, ...]] = field(default_factory=set)
    """The fields of queries for which there is no index."""
    address: str = ""
    calls: list[str] = field(default_factory=list)
    """Every method called."""


@contextmanager
def interposed(upstream: str) -> Iterator[Iam]:
    """A server on a free port in front of the one at `upstream`, `host:port`; nothing is denied at first."""
    iam = Iam()
    with grpc.insecure_channel(upstream) as channel, serving(_Handler(iam, channel)) as iam.address:
        yield iam


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # it has no types
    def __init__(self, iam: Iam, channel: grpc.Channel) -> None:
        self._iam = iam
        self._channel = channel

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:
        method = handler_call_details.method

        def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            # Every call of these has one message in, and is the same on the wire as a stream of one.
            request = next(requests)
            self._iam.calls.append(method)
            if method == TEST_PERMISSIONS and self._iam.checks:
                yield _tested(self._iam, request)
                return
            self._refuse(method, request, context)
            yield from self._passed_on(method, request, context)

        return grpc.stream_stream_rpc_method_handler(answer)

    def _refuse(self, method: str, request: bytes, context: grpc.ServicerContext) -> None:
        for permission in _needed(method, request):
            if permission in self._iam.denied:
                deny(context, permission, "the resource")
        if method == f"{FIRESTORE}RunQuery" and _fields(request) in self._iam.unindexed:
            abort(context, grpc.StatusCode.FAILED_PRECONDITION, "The query requires an index.")

    def _passed_on(self, method: str, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        if method == f"{FIRESTORE}Commit" and self._iam.lenient:
            request = _unconditional(request)
        metadata = [(name, value) for name, value in context.invocation_metadata() if not name.startswith(_RESERVED)]
        call: Callable[..., Any] = self._channel.stream_stream(method)
        answers = call(iter([request]), metadata=metadata, timeout=context.time_remaining())
        try:
            yield from answers
        except grpc.RpcError as error:
            abort(context, error.code(), error.details())


def _unconditional(request: bytes) -> bytes:
    commit = types.CommitRequest.deserialize(request)
    for write in commit.writes:
        write.current_document = None
    changed: bytes = types.CommitRequest.serialize(commit)
    return changed


def _tested(iam: Iam, request: bytes) -> bytes:
    asked = iam_policy_pb2.TestIamPermissionsRequest.FromString(request)
    held = sorted(set(asked.permissions) - iam.denied)
    answer: bytes = iam_policy_pb2.TestIamPermissionsResponse(permissions=held).SerializeToString()
    return answer


def _needed(method: str, request: bytes) -> list[str]:
    """The permissions that a call needs."""
    match method.removeprefix(FIRESTORE):
        case "BatchGetDocuments":
            return [f"{_ENTITIES}get"]
        case "RunQuery":
            return [f"{_ENTITIES}get", f"{_ENTITIES}list"]
        case "Commit":
            writes = types.CommitRequest.deserialize(request).writes
            return [f"{_ENTITIES}{_verb(write)}" for write in writes]
    return ["pubsub.topics.get"] if method == GET_TOPIC else []


def _verb(write: types.Write) -> str:
    condition = write.current_document
    return "create" if "exists" in condition and not condition.exists else "update"


def _fields(request: bytes) -> tuple[str, ...]:
    """The fields that a query filters by."""
    where = types.RunQueryRequest.deserialize(request).structured_query.where
    filters = where.composite_filter.filters or [where]
    return tuple(each.field_filter.field.field_path for each in filters)
