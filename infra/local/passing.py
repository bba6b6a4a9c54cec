"""What stands between a caller and a server in Google Cloud: it answers by itself, or passes a request on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from infra.local.servers import HOST, in_thread

OF_A_CONNECTION = frozenset({"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})
"""Headers, in small letters, that end where a connection ends"""

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Request:
    """What a caller asks."""

    method: str
    target: str
    """Path and query, as they came"""
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What the caller gets."""

    status: int
    headers: Headers
    body: bytes


def passed_on(request: Request, address: str, *, seconds: float) -> Answer:
    """What a server answers.

    Args:
        request: Its headers are sent as they are, but those of a connection.
        address: The server, http://host:port; a path in it is none of this function's.
        seconds: How long it may take.

    Raises:
        TimeoutError: It took longer.
    """
    server = urlsplit(address)
    connection = HTTPConnection(str(server.hostname), server.port, timeout=seconds)
    try:
        connection.putrequest(request.method, request.target, skip_accept_encoding=True)
        for name, value in request.headers:
            if name.lower() not in OF_A_CONNECTION:
                connection.putheader(name, value)
        connection.endheaders(request.body)
        answer = connection.getresponse()
        return Answer(answer.status, answer.getheaders(), answer.read())
    finally:
        connection.close()


def refusal(status: HTTPStatus, content_type: str, body: bytes) -> Answer:
    """An answer of whoever stands between."""
    return Answer(status, [("Content-Type", content_type)], body)


@contextmanager
def answering(answer: Callable[[Request], Answer]) -> Iterator[str]:
    """A server on a free port; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = answer(Request(self.command, self.path, list(self.headers.items()), body))
            self.send_response_only(found.status)
            for name, value in found.headers:
                if name.lower() not in OF_A_CONNECTION | {"content-length"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(found.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(found.body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _handle

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server, in_thread(server):
        yield f"http://{HOST}:{server.server_port}"
