"""Asks for a file on the hub and follows to the host that has its bytes; the token is for the hub alone.

By http.client: it reads into memory of the caller's as bytes come, and it logs no URL, where a signed one is a key.
httpx, which huggingface_hub uses, takes six times the CPU for the same bytes.
"""

import base64
import http.client
import ssl
import threading
from contextlib import suppress
from email.message import Message
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

MAX_REDIRECTS = 8
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DRAINED_BYTES = 64 << 10
"""A body that nobody wants is read to keep the connection, up to this size."""
_PORTS = {"http": 80, "https": 443}

Origin = tuple[str, str, int]
"""Scheme, host and port"""


class _Response(http.client.HTTPResponse):
    def receive(self, view: memoryview) -> int:
        # `readinto` waits until the view is full, and forgets how far it came when the connection breaks.
        count: int = self.fp.readinto1(view[: self.length])
        if self.length is not None:
            self.length -= count
        return count


class Answer:
    """An answer, its body not read yet.

    Attributes:
        status: Of the last host's answer.
        headers: Of the last host's answer.
        of_hub: The headers of each answer that the hub itself gave, in order.
        from_hub: Whether the last answer is the hub's own.
        url: What was asked for at last; a secret, since it may be signed.
    """

    def __init__(
        self, connections: "Connections", held: "_Held", response: _Response, url: str, of_hub: list[Message]
    ) -> None:
        self._connections, self._held, self._response = connections, held, response
        self.status, self.headers, self.url, self.of_hub = response.status, response.headers, url, of_hub
        self.from_hub = response.headers is of_hub[-1]

    @property
    def length(self) -> int | None:
        """Bytes of the body that are left; None where they were not told."""
        return self._response.length

    def receive(self, view: memoryview) -> int:
        """Put what comes next at the beginning of `view`; how many bytes, 0 at the body's end.

        Raises:
            OSError, http.client.HTTPException: The connection broke or was silent for too long.
        """
        return self._response.receive(view)

    def close(self) -> None:
        """Give the connection back where nothing of the body is left, and else end it."""
        keep = self._response.length == 0 and not self._response.will_close
        self._response.close()
        self._connections.release(self._held, keep=keep)


class _Held:
    """A connection that one answer has."""

    def __init__(self, origin: Origin, connection: http.client.HTTPConnection) -> None:
        self.origin = origin
        self.connection = connection


class Connections:
    """Connections to the hub and to where it sends us, kept open between answers; for many threads at once.

    Args:
        token: For the hub; None asks as anybody.
        timeout_seconds: The longest that a host may be silent.
    """

    def __init__(self, token: str | None, timeout_seconds: float) -> None:
        self._token = token
        self._timeout_seconds = timeout_seconds
        self._idle: dict[Origin, list[_Held]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._tls: ssl.SSLContext | None = None

    def ask(self, method: str, url: str, range_header: str | None = None) -> Answer:
        """Ask the hub, and follow where it sends us; a HEAD stays with the hub.

        Args:
            method: `GET` or `HEAD`.
            url: On the hub: its origin alone is told the token.
            range_header: The Range header.

        Raises:
            OSError, http.client.HTTPException: There is no answer, or it sends us round in circles or off HTTPS.
        """
        hub, of_hub = origin_of(url), list[Message]()
        for _ in range(MAX_REDIRECTS):
            held, response = self._exchange(method, url, range_header, with_token=origin_of(url) == hub)
            if origin_of(url) == hub:
                of_hub.append(response.headers)
            answer = Answer(self, held, response, url, of_hub)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return answer
            target = followed(url, location)
            if method == "HEAD" and origin_of(target) != hub:
                return answer
            if response.length is not None and response.length <= _DRAINED_BYTES:
                response.read()
            answer.close()
            url = target
        raise http.client.HTTPException(f"more than {MAX_REDIRECTS} redirects")

    def release(self, held: _Held, *, keep: bool) -> None:
        """Take back a connection that an answer had."""
        with self._lock:
            keep = keep and not self._closed
            if keep:
                self._idle.setdefault(held.origin, []).append(held)
        if not keep:
            held.connection.close()

    def close(self) -> None:
        """End all connections that no answer has; those end with their answers."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for held in (held for several in idle.values() for held in several):
            held.connection.close()

    def _exchange(
        self, method: str, url: str, range_header: str | None, *, with_token: bool
    ) -> tuple[_Held, _Response]:
        headers = {"User-Agent": "gemma-export", "Accept-Encoding": "identity"}
        if range_header:
            headers["Range"] = range_header
        if self._token and with_token:
            headers["Authorization"] = f"Bearer {self._token}"
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        held = self._take(origin_of(url))
        reused = held is not None
        held = held or _Held(origin_of(url), self._connected_to(parts))
        try:
            held.connection.request(method, target, headers=headers)
            response = held.connection.getresponse()
        except BaseException as error:
            held.connection.close()
            if not (reused and isinstance(error, ConnectionError)):
                raise
            # The host has ended it meanwhile, as it does with idle ones: no reason to wait.
            return self._exchange(method, url, range_header, with_token=with_token)
        assert isinstance(response, _Response)  # noqa: S101  # the connection's response_class
        return held, response

    def _take(self, origin: Origin) -> _Held | None:
        with self._lock:
            several = self._idle.get(origin)
            return several.pop() if several else None

    def _connected_to(self, parts: SplitResult) -> http.client.HTTPConnection:
        scheme, host, port = origin_of(parts.geturl())
        # As huggingface_hub does, so that its requests and ours take one way.
        proxy = None if proxy_bypass(host) else getproxies().get(scheme)
        through = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
        near = (through.hostname or "", through.port or 80) if through else (host, port)
        if scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                *near, timeout=self._timeout_seconds, context=self._trusted()
            )
        else:
            connection = http.client.HTTPConnection(*near, timeout=self._timeout_seconds)
        connection.response_class = _Response
        if through:
            account = f"{unquote(through.username or '')}:{unquote(through.password or '')}".encode()
            known = {"Proxy-Authorization": f"Basic {base64.b64encode(account).decode()}"} if through.username else {}
            connection.set_tunnel(host, port, known)
        return connection

    def _trusted(self) -> ssl.SSLContext:
        import httpx

        with self._lock:
            # Whom huggingface_hub's own requests trust.
            self._tls = self._tls or httpx.create_ssl_context()
            return self._tls


def origin_of(url: str) -> Origin:
    """Scheme, host and port of an absolute URL.

    Raises:
        http.client.InvalidURL: It is not one of HTTP.
    """
    parts, port = urlsplit(url), None
    with suppress(ValueError):
        port = parts.port or _PORTS.get(parts.scheme)
    if parts.scheme not in _PORTS or not parts.hostname or port is None:
        raise http.client.InvalidURL("not a URL of HTTP")
    return parts.scheme, parts.hostname, port


def followed(url: str, location: str) -> str:
    """Where an answer from `url` sends us.

    Raises:
        http.client.HTTPException: Nowhere, or from HTTPS to HTTP, where anybody could change the bytes.
    """
    target = urljoin(url, location)
    if origin_of(target)[0] == "http" and origin_of(url)[0] == "https":
        raise http.client.HTTPException("a redirect from HTTPS to HTTP")
    return target
