"""One way to talk to a dispatcher, be it in this process or behind a URL, and to follow an export to its end."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dispatcher import answers
from dispatcher.contract import UNFINISHED, ExportRecord, State
from dispatcher.errors import ExportError, InvalidRequest, Misconfigured, Unavailable
from dispatcher.jobqueue import InlineQueue
from dispatcher.lifecycle import holds_live_lease
from dispatcher.runner import ProcessRunner

if TYPE_CHECKING:
    from dispatcher.bootstrap import Stack

POLL_SECONDS = 0.1
NUDGES = 3
FINISHED = frozenset(State) - UNFINISHED
Document = dict[str, Any]


class Client(Protocol):
    """What the CLI asks of a dispatcher; the documents are those of the HTTP answers."""

    def submit(self, body: Document) -> Document: ...

    def status(self, export_id: str) -> Document: ...

    def list_exports(self, job_id: str | None) -> list[Document]: ...

    def cancel(self, export_id: str) -> Document: ...

    def tend(self, export_id: str) -> None: ...

    def close(self) -> None: ...


def follow(
    client: Client,
    export_id: str,
    *,
    show: Callable[[Document], None] = lambda document: None,
    interval: float = POLL_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Document:
    """Read an export's status until it is finished, and hand each that differs from the last to `show`.

    Returns:
        The last status, whose `state` is completed, failed or cancelled.

    Raises:
        ExportError: The export cannot come to its end by itself, or the dispatcher refused an answer.
    """
    last: Document | None = None
    while True:
        document = client.status(export_id)
        if document != last:
            show(document)
        if document["state"] in FINISHED:
            return document
        last = document
        client.tend(export_id)
        sleep(interval)


class EmbeddedClient:
    """The dispatcher in this process; the exporter still runs as its own.

    Raises:
        Misconfigured: The settings name Google Cloud's queue or runner, which tell this process nothing.
    """

    def __init__(self, stack: "Stack", user: str) -> None:
        if not isinstance(stack.queue, InlineQueue) or not isinstance(stack.runner, ProcessRunner):
            raise Misconfigured("this needs the embedded queue and runner: give --url, or unset the cloud settings")
        self._stack = stack
        self._queue = stack.queue
        self._runner = stack.runner
        self._user = user
        self._nudges = 0

    def submit(self, body: Document) -> Document:
        service = self._stack.service
        before = service.now()
        record = service.submit(answers.export_request(body), self._user)
        if record.state in UNFINISHED and (record.published_at is None or record.published_at < before):
            # Published by an earlier process, perhaps, and gone with it; delivered twice it does no harm.
            self._stack.trigger.nudge(record.export_id)
        return answers.submitted(record, service.now())

    def status(self, export_id: str) -> Document:
        service = self._stack.service
        record = service.status(export_id, self._user)
        return answers.status(record, service.now(), service.downloads(record))

    def list_exports(self, job_id: str | None) -> list[Document]:
        service = self._stack.service
        found: list[ExportRecord] = []
        while page := service.list_exports(self._user, job_id=job_id, after=found[-1].export_id if found else None):
            found.extend(page)
        return [answers.status(record, service.now()) for record in found]

    def cancel(self, export_id: str) -> Document:
        service = self._stack.service
        return answers.status(service.cancel(export_id, self._user), service.now())

    def tend(self, export_id: str) -> None:
        """Start an unfinished export again that nothing drives any more.

        Raises:
            ExportError: Its exporter ended without a verdict (`exporter_died`), or never starts
                (`not_started`).
        """
        record = self._stack.service.status(export_id, self._user)
        code = self._runner.wait(record.execution, timeout=0) if record.execution else None
        driven = self._runner.is_busy(record.job_id) or not self._queue.drained(0)
        # Read again: a verdict is written before the exit, and a launch before its message is done.
        record = self._stack.service.status(export_id, self._user)
        if record.state not in UNFINISHED or driven:
            return
        if code and record.execution is not None:
            message = f"the exporter ended with {code} and left no verdict; its log is {record.log_uri}"
            raise ExportError(message, code="exporter_died")
        if holds_live_lease(record, self._stack.service.now()):
            return
        if self._nudges >= NUDGES:
            raise ExportError(f"export {export_id} does not start; the log says why", code="not_started")
        self._nudges += 1
        self._stack.trigger.nudge(export_id)

    def close(self) -> None:
        self._stack.close()


class HttpClient:
    """A dispatcher behind a URL.

    Args:
        url: Where it answers, with or without a path.
        token: Sent as a bearer token, for a gateway or Cloud Run that asks for one.
        headers: Sent with every request.
    """

    def __init__(self, url: str, token: str | None = None, *, headers: Mapping[str, str] | None = None) -> None:
        import httpx

        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"{url!r} is no URL of a dispatcher: expected http:// or https://")
        self.headers = dict(headers or {})
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        self._http: httpx.Client = httpx.Client(base_url=url, headers={**authorization, **self.headers}, timeout=30)

    def submit(self, body: Document) -> Document:
        return self._asked("POST", "/export", json=body)

    def status(self, export_id: str) -> Document:
        return self._asked("GET", f"/exports/{export_id}")

    def list_exports(self, job_id: str | None) -> list[Document]:
        query = {"job_id": job_id} if job_id else {}
        found: list[Document] = []
        while True:
            page = self._asked("GET", "/exports", params=query)
            found.extend(page["exports"])
            if page["next"] is None:
                return found
            query["after"] = page["next"]

    def cancel(self, export_id: str) -> Document:
        return self._asked("POST", f"/exports/{export_id}/cancel")

    def tend(self, export_id: str) -> None:
        """The dispatcher looks after its exports by itself."""

    def close(self) -> None:
        self._http.close()

    def _asked(self, method: str, path: str, **arguments: Any) -> Document:
        import httpx

        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise Unavailable(f"the dispatcher at {self._http.base_url} does not answer: {error}") from error
        try:
            document = response.json()
        except ValueError:
            document = None
        if response.is_success and isinstance(document, dict):
            return document
        raise Refused(response.status_code, document if isinstance(document, dict) else {})


class Refused(ExportError):
    """A dispatcher said no; its problem document is passed on as it came."""

    def __init__(self, status: int, problem: Document) -> None:
        if isinstance(problem.get("code"), int):  # the gateway's own form, which has the status for a code
            problem = {"detail": problem.get("message")}
        detail = str(problem.get("detail") or f"the dispatcher answered {status} and no more")
        super().__init__(detail, code=str(problem.get("code") or "refused"))
        self._status = status
        self._problem = problem

    def problem(self) -> Document:
        return {**super().problem(), "title": "Refused", "status": self._status, **self._problem}
