"""A stand-in for API Gateway: routes, checks tokens and forwards as a rendered infra/openapi.yaml tells it to.

What it does with headers and how it refuses is what ESPv2 does, the proxy that API Gateway is made of:
https://github.com/GoogleCloudPlatform/esp-v2. Where that is stricter (it sends back header names with an underscore),
this is not, so that nothing relies on it. It has no retries and no quota.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import jwt

from dispatcher.bearer import ALGORITHMS, FORWARDED_HEADER
from dispatcher.identity import USERINFO_HEADER
from infra.local.servers import HOST, in_thread
from infra.swagger import Document

OWN_TOKEN = "the-gateways-own-id-token"  # noqa: S105  # stands for what Cloud Run checks, and is none
_OF_A_CONNECTION = {"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """What the caller gets."""

    status: int
    headers: Headers
    body: bytes


class Refused(Exception):
    """The gateway says no by itself: in its own form, which is no problem document."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status

    def answer(self) -> Answer:
        body = json.dumps({"code": self.status, "message": str(self)}).encode()
        return Answer(self.status, [("Content-Type", "application/json")], body)


class Gateway:
    """One API.

    Args:
        document: infra/openapi.yaml with its variables filled in; the backend's address is http://host:port.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        self._backend = document["x-google-backend"]
        [self._issuer] = document["securityDefinitions"].values()
        self._keys = jwt.PyJWKClient(self._issuer["x-google-jwks_uri"])

    def answer(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        """Forward one request, or refuse it."""
        try:
            operation = self._operation(method, urlsplit(target).path)
            required = operation.get("security", self._document["security"])
            token = self._checked(dict(headers)) if required else None
        except Refused as refusal:
            return refusal.answer()
        return self._forwarded(method, target, self._passed_on(headers, token), body)

    def _operation(self, method: str, path: str) -> Document:
        for template, operations in self._document["paths"].items():
            pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))
            if re.fullmatch(pattern, path):
                operation: Document | None = operations.get(method.lower())
                if operation is None:
                    raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{template} is defined, but not with this method")
                return operation
        raise Refused(HTTPStatus.NOT_FOUND, "the current request is not defined by this API")

    def _checked(self, headers: dict[str, str]) -> str:
        [place] = self._issuer["x-google-jwt-locations"]
        value, prefix = headers.get(place["header"], ""), place["value_prefix"]
        if not value.startswith(prefix):
            raise Refused(HTTPStatus.UNAUTHORIZED, "Jwt is missing")
        token = value.removeprefix(prefix)
        try:
            jwt.decode(
                token,
                self._keys.get_signing_key_from_jwt(token),
                algorithms=ALGORITHMS,
                issuer=self._issuer["x-google-issuer"],
                audience=[audience.strip() for audience in self._issuer["x-google-audiences"].split(",")],
                options={"require": ["iss", "sub", "aud", "iat", "exp"]},
            )
        except jwt.PyJWTError as error:
            raise Refused(HTTPStatus.UNAUTHORIZED, f"Jwt is not good: {error}") from error
        return token

    def _passed_on(self, headers: Headers, token: str | None) -> Headers:
        own = {"authorization": f"Bearer {OWN_TOKEN}"}
        for name, value in headers:
            if name.lower() == "authorization":
                own[FORWARDED_HEADER.lower()] = value
        if token is not None:
            # As it stands in the token, without padding. Where none is asked for, a caller's header is left alone.
            own[USERINFO_HEADER.lower()] = token.split(".")[1]
        kept = [(name, value) for name, value in headers if name.lower() not in own.keys() | _OF_A_CONNECTION]
        return kept + list(own.items())

    def _forwarded(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        backend = urlsplit(self._backend["address"])
        connection = HTTPConnection(str(backend.hostname), backend.port, timeout=self._backend["deadline"])
        try:
            connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, answer.getheaders(), answer.read())
        except TimeoutError:
            return Refused(HTTPStatus.GATEWAY_TIMEOUT, "upstream request timeout").answer()
        finally:
            connection.close()


@contextmanager
def gateway(document: Document) -> Iterator[str]:
    """A gateway on a free port; yields its URL."""
    api = Gateway(document)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = api.answer(self.command, self.path, list(self.headers.items()), body)
            self.send_response_only(answer.status)
            for name, value in answer.headers:
                if name.lower() not in _OF_A_CONNECTION | {"content-length"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _handle

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server, in_thread(server):
        yield f"http://{HOST}:{server.server_port}"
