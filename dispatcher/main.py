"""The functions-framework targets: `export_api` answers HTTP, `start_export` takes the queue's messages, `fail_export`
its dead letters; `sweep` is called by Cloud Scheduler.

An `http` target is called for every path and method, so this file routes and refuses by itself.
"""

import base64
import binascii
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from dispatcher import answers, bootstrap
from dispatcher.answers import export_request
from dispatcher.contract import ExportRequest, State, is_export_id, is_job_id
from dispatcher.errors import (
    BodyTooLarge,
    ExportError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Unauthenticated,
)
from dispatcher.identity import caller
from dispatcher.limits import MAX_BODY_BYTES, PAGE, RETRY_AFTER_SECONDS
from dispatcher.logs import bound, clean, traceparent_of
from dispatcher.service import Service
from dispatcher.sweep import swept

if TYPE_CHECKING:
    import flask
    from cloudevents.http import CloudEvent

logger = logging.getLogger("dispatcher")

MAX_DRAIN_BYTES = 1 << 20
"""Of a refused body this much is read, so that a client that is still sending gets to read the answer."""
LOCAL_USER_KEY = "gemma_export.local_user"
"""WSGI environ key that `gemma-export serve` sets; no HTTP header can."""

IDS_KEY = "gemma_export.ids"
"""WSGI environ key for what a request turned out to be about, which is logged with it."""

Answer = tuple[str | Iterator[str], int, dict[str, str]]
Handler = Callable[["flask.Request", str], Answer]


def export_api(request: "flask.Request") -> Answer:
    """Answer one HTTP request; every fault becomes a problem document (RFC 9457)."""
    return _answered(request, _routed)


def sweep(request: "flask.Request") -> Answer:
    """Sweep once, for Cloud Scheduler to POST to every five minutes: 200 and counts, 503 if not all got through.

    Nothing of the request is read. It is IAM that keeps others out: Scheduler's service account alone may invoke this.
    """
    return _answered(request, _swept)


def _answered(request: "flask.Request", handler: Callable[["flask.Request"], Answer]) -> Answer:
    began = time.perf_counter()
    with bound(traceparent=traceparent_of(request.headers.get("traceparent"))):
        try:
            answer = handler(request)
        except ExportError as error:
            answer = _problem(error)
        except Exception as error:  # noqa: BLE001  # the entry point: nothing may end without an answer
            answer = _problem(error)
        milliseconds = round((time.perf_counter() - began) * 1000)
        ids = request.environ.get(IDS_KEY, {})
        method, path = clean(request.method, limit=20), clean(request.path, limit=300)
        logger.info("%s %s -> %d in %d ms", method, path, answer[1], milliseconds, extra=ids)
    return answer


def _unrouted(_: Exception) -> Answer:
    """What Flask has no route for, as a path with a line break in it."""
    return _problem(NotFound("there is no such route", code="route_not_found"))


def start_export(cloud_event: "CloudEvent") -> None:
    """Start the execution that a Pub/Sub message asks for; an answer of 503 asks for another delivery."""
    message = _pushed(cloud_event)
    with _delivered(message):
        bootstrap.current().trigger.deliver(message.body, message.attributes, message_id=message.message_id)


def fail_export(cloud_event: "CloudEvent") -> None:
    """Fail the export that a dead letter names; an answer of 503 asks for another delivery."""
    message = _pushed(cloud_event)
    with _delivered(message):
        bootstrap.current().trigger.deliver_dead(message.body, message_id=message.message_id)


@contextmanager
def _delivered(message: "_Pushed") -> Iterator[None]:
    """Says a refusal in HTTP's words: of an error, Flask would log a traceback, and no ids."""
    from werkzeug.exceptions import ServiceUnavailable  # here, since whoever called has loaded it already

    with bound(message_id=message.message_id, traceparent=message.attributes.get("traceparent")):
        try:
            yield
        except ExportError as error:
            raise ServiceUnavailable(clean(error.message, limit=1000)) from error


@dataclass(frozen=True)
class _Pushed:
    message_id: str
    body: bytes
    attributes: dict[str, str]


def _pushed(cloud_event: "CloudEvent") -> _Pushed:
    """The Pub/Sub message in a CloudEvent, be it Eventarc's or one that functions-framework made of a raw push."""
    data = cloud_event.data
    message = data.get("message") if isinstance(data, dict) else None
    message = message if isinstance(message, dict) else {}
    message_id = str(message.get("messageId") or message.get("message_id") or cloud_event["id"])
    attributes = message.get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    try:
        body = base64.b64decode(message.get("data") or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        body = b""  # which is no JobMessage either, and is dropped as such
    return _Pushed(message_id, body, {str(name): str(value) for name, value in attributes.items()})


def _routed(request: "flask.Request") -> Answer:
    handlers, argument = _route(request.path)
    allowed = sorted({*handlers, "OPTIONS"} | ({"HEAD"} if "GET" in handlers else set()))
    if request.method == "OPTIONS":
        return "", HTTPStatus.NO_CONTENT, {"Allow": ", ".join(allowed)}
    handler = handlers.get("GET" if request.method == "HEAD" else request.method)
    if handler is None:
        message = f"{clean(request.path, limit=200)} takes {', '.join(allowed)}, not {clean(request.method, limit=20)}"
        raise MethodNotAllowed(message, headers={"Allow": ", ".join(allowed)})
    return handler(request, argument)


def _route(path: str) -> tuple[dict[str, Handler], str]:
    match path.split("/")[1:]:
        case ["health"]:
            return {"GET": _health}, ""
        case ["export"]:
            return {"POST": _submit}, ""
        case ["exports"]:
            return {"GET": _list}, ""
        case ["exports", export_id] if export_id:
            return {"GET": _status}, export_id
        case ["exports", export_id, "cancel"] if export_id:
            return {"POST": _cancel}, export_id
    raise NotFound(f"there is no route {clean(path, limit=200)}", code="route_not_found")


def _swept(request: "flask.Request") -> Answer:
    if request.method != "POST":
        message = f"a sweep is asked for with POST, not {clean(request.method, limit=20)}"
        raise MethodNotAllowed(message, headers={"Allow": "POST"})
    stack = bootstrap.current()
    request.environ[IDS_KEY] = done = swept(stack.trigger, stack.collector)
    return _json(done)


def _health(request: "flask.Request", _: str) -> Answer:
    return _json(answers.Health().model_dump())


def _submit(request: "flask.Request", _: str) -> Answer:
    service, user = _caller(request)
    wanted = _export_request(_body(request))
    request.environ[IDS_KEY] = ids = {"job_id": wanted.job_id, "export_id": wanted.export_id}
    with bound(**ids):
        record = service.submit(wanted, user, traceparent=traceparent_of(request.headers.get("traceparent")))
    answer = answers.submitted(record, service.now())
    if record.state is State.COMPLETED:
        return _json(answer)
    return _json(answer, HTTPStatus.ACCEPTED, {"Location": f"/exports/{record.export_id}"})


def _list(request: "flask.Request", _: str) -> Answer:
    service, user = _caller(request)
    job_id, after = request.args.get("job_id"), request.args.get("after")
    if job_id is not None and not is_job_id(job_id):
        raise InvalidRequest("job_id in the query has not the form of a job id")
    if after is not None and not is_export_id(after):
        raise InvalidRequest("after in the query has not the form of an export id")
    records = service.list_exports(user, job_id=job_id, limit=PAGE, after=after)
    following = records[-1].export_id if len(records) == PAGE else None
    return _json(answers.page(records, service.now(), following=following))


def _status(request: "flask.Request", export_id: str) -> Answer:
    service, user = _caller(request)
    request.environ[IDS_KEY] = {"export_id": export_id}
    record = service.status(export_id, user)
    return _json(answers.status(record, service.now(), service.downloads(record)))


def _cancel(request: "flask.Request", export_id: str) -> Answer:
    service, user = _caller(request)
    request.environ[IDS_KEY] = {"export_id": export_id}
    return _json(answers.status(service.cancel(export_id, user), service.now()))


def _caller(request: "flask.Request") -> tuple[Service, str]:
    stack = bootstrap.current()
    # With any cloud setting there is no local user, whoever started the server.
    local_user = request.environ.get(LOCAL_USER_KEY) if stack.settings.embedded else None
    return stack.service, caller(request.headers, local_user, stack.settings.jwt)


def _body(request: "flask.Request") -> bytes:
    """The whole body, chunked or not.

    Raises:
        BodyTooLarge: It is over 64 KiB.
        InvalidRequest: The client went away in the middle of it (`body_incomplete`).
    """
    from werkzeug.exceptions import ClientDisconnected  # here, since whoever called has loaded it already

    announced = request.content_length or 0
    body, read = b"", 0
    try:
        while read < MAX_DRAIN_BYTES and (block := request.stream.read(MAX_BODY_BYTES)):
            read += len(block)
            body = body + block if read <= MAX_BODY_BYTES else b""
    except ClientDisconnected:
        pass  # what came by then is short of what was announced
    if max(announced, read) > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body is over {MAX_BODY_BYTES} bytes")
    if read < announced:
        raise InvalidRequest(f"the body ends after {read} of {announced} bytes", code="body_incomplete")
    return body


def _export_request(body: bytes) -> ExportRequest:
    """The request in a body; no piece of what cannot be read is repeated.

    Raises:
        InvalidRequest: It is no JSON object, or a field is missing, unknown or wrong.
    """
    try:
        document = json.loads(body)
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except ValueError as error:
        # Not the parser's own message: it may repeat a piece of the body, and with it of a token.
        raise InvalidRequest("the body is no JSON: expected an object with job_id and export_type") from error
    if not isinstance(document, dict):
        raise InvalidRequest("the body is no JSON object: expected job_id and export_type")
    return export_request(document)


def _problem(error: Exception) -> Answer:
    """The answer to a fault: ours are logged under an id that the answer carries, and not described."""
    refusal = error if isinstance(error, ExportError) else ExportError("")
    problem = refusal.problem()
    if refusal.status is HTTPStatus.INTERNAL_SERVER_ERROR:
        fault_id = uuid.uuid4().hex
        logger.error("fault %s", fault_id, exc_info=error, extra={"fault_id": fault_id})
        problem["detail"] = f"a fault of ours; quote {fault_id} when you report it"
        problem["instance"] = f"urn:uuid:{fault_id}"
    elif isinstance(error, Unauthenticated):
        logger.warning("refused: %s", refusal.message)
    elif refusal.status is HTTPStatus.SERVICE_UNAVAILABLE:
        logger.warning("unavailable: %s", refusal.message, exc_info=error)
    seconds = RETRY_AFTER_SECONDS.get(refusal.status)
    headers = {"Retry-After": str(seconds)} if seconds else {}
    headers |= {**refusal.headers, "Content-Type": "application/problem+json"}
    text = json.dumps(answers.problem(problem))
    if refusal.error_code not in (BodyTooLarge.code, "body_incomplete"):
        return text, refusal.status, headers
    # functions-framework reads what is left of a body, if it can, unless the answer is a stream.
    return iter([text]), refusal.status, {**headers, "Content-Length": str(len(text)), "Connection": "close"}


def _json(document: dict[str, Any], status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Answer:
    return json.dumps(document), status, {**(headers or {}), "Content-Type": "application/json"}


def _handle_unrouted() -> None:
    """functions-framework runs this file in its app's context; whoever else imports it has none, and no Flask."""
    if "flask" in sys.modules:
        import flask

        if flask.has_app_context():
            flask.current_app.register_error_handler(HTTPStatus.NOT_FOUND, _unrouted)


_handle_unrouted()
