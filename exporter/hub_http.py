"""Asks for a file on the hub and follows to the host that has its bytes; the token is for the hub alone.

By requests, which carries the bytes for as little CPU as http.client does; httpx, which huggingface_hub uses, takes
several times as much.
"""

import http.client
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from dispatcher.errors import SourceError

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 8
KEPT_CONNECTIONS = 16
"""To each host, open between answers"""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DRAINED_BYTES = 64 << 10
"""A body that nobody wants is read to keep the connection, up to this size."""
_PORTS = {"http": 80, "https": 443}
_AMBIGUOUS = re.compile(r"[\\\x00-\x20\x7f-\uffff]")

Origin = tuple[str, str, int]
"""Scheme, host and port"""
Headers = Mapping[str, str]
"""By name, in whatever case"""


class RedirectRefused(SourceError):
    """The hub, or a host that it sent us to, sends us where nobody should go."""

    code = "hub_redirect_refused"


class Answer:
    """An answer, its body not read yet.

    Attributes:
        status: Of the last host's answer.
        headers: Of the last host's answer.
        of_hub: The headers of each answer that the hub itself gave, in order.
        from_hub: Whether the last answer is the hub's own.
    """

    def __init__(self, response: "requests.Response", of_hub: list[Headers], *, from_hub: bool) -> None:
        self._response = response
        self.status: int = response.status_code
        self.headers: Headers = response.headers
        self.of_hub = of_hub
        self.from_hub = from_hub

    @property
    def length(self) -> int | None:
        """Bytes of the body that are left; None where they were not told."""
        left: int | None = self._response.raw.length_remaining
        return left

    def receive(self, view: memoryview) -> int:
        """Put what comes next at the beginning of `view`; how many bytes, 0 at the body's end.

        Raises:
            OSError: The connection broke or was silent for too long.
        """
        from urllib3.exceptions import HTTPError

        try:
            data: bytes = self._response.raw.read1(len(view), decode_content=False)
        except HTTPError as error:
            raise ConnectionError(type(error).__name__) from None
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Give the connection back where nothing of the body is left, and else end it."""
        self._response.close()


class Connections:
    """Connections to the hub and to where it sends us, kept open between answers; for many threads at once.

    Args:
        token: For the hub; None asks as anybody.
        timeout_seconds: The longest that a host may be silent.
    """

    def __init__(self, token: str | None, timeout_seconds: float) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        # It would write every URL into the debug log, and a signed one is a key.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)
        self._token = token
        self._timeout_seconds = timeout_seconds
        self._session = requests.Session()
        self._session.auth = _unchanged  # else a login for the host is looked for in ~/.netrc
        self._session.headers.clear()
        self._session.headers.update({"User-Agent": "gemma-export", "Accept-Encoding": "identity"})
        for scheme in _PORTS:
            self._session.mount(f"{scheme}://", HTTPAdapter(pool_maxsize=KEPT_CONNECTIONS, max_retries=0))

    def ask(self, method: str, url: str, range_header: str | None = None) -> Answer:
        """Ask the hub, and follow where it sends us; a HEAD stays with the hub.

        Args:
            method: `GET` or `HEAD`.
            url: On the hub: its origin alone is told the token.
            range_header: The Range header.

        Raises:
            OSError: There is no answer.
            RedirectRefused: It sends us round in circles, off HTTPS, or to what is no URL.
        """
        hub, of_hub = origin_of(url), list[Headers]()
        for _ in range(MAX_REDIRECTS):
            is_hub = origin_of(url) == hub
            headers = {"Range": range_header} if range_header else {}
            if self._token and is_hub:
                headers["Authorization"] = f"Bearer {self._token}"
            response = self._session.request(
                method, url, headers=headers, stream=True, allow_redirects=False, timeout=self._timeout_seconds
            )
            if is_hub:
                of_hub.append(response.headers)
            answer = Answer(response, of_hub, from_hub=is_hub)
            location = response.headers.get("Location")
            if answer.status not in _REDIRECTS or location is None:
                return answer
            try:
                target = followed(url, location)
            except http.client.HTTPException as error:
                answer.close()
                raise RedirectRefused(
                    f"{'the hub' if is_hub else 'the host that the hub sent us to'} redirects to {error}. Check "
                    "HF_ENDPOINT and what stands between here and the hub."
                ) from None
            if method == "HEAD" and origin_of(target) != hub:
                return answer
            if answer.length is not None and answer.length <= _DRAINED_BYTES:
                response.raw.drain_conn()
            answer.close()
            url = target
        raise RedirectRefused(f"the hub redirects more than {MAX_REDIRECTS} times. Check HF_ENDPOINT.")

    def close(self) -> None:
        """End all connections that no answer has; those end with their answers."""
        self._session.close()


def _unchanged(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
    return request


def origin_of(url: str) -> Origin:
    """Scheme, host and port of an absolute URL, as what connects reads it.

    Raises:
        http.client.InvalidURL: It is not one of HTTP, or one that others may read otherwise.
    """
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    _refuse_ambiguous(url)
    try:
        parts = parse_url(url)
    except LocationParseError:
        raise http.client.InvalidURL("not a URL of HTTP") from None
    port = parts.port or _PORTS.get(parts.scheme or "")
    if parts.scheme not in _PORTS or not parts.host or port is None or parts.auth:
        raise http.client.InvalidURL("not a URL of HTTP, or one with an account")
    return parts.scheme, parts.host, port


def followed(url: str, location: str) -> str:
    """Where an answer from `url` sends us.

    Raises:
        http.client.HTTPException: Nowhere, or from HTTPS to HTTP, where anybody could change the bytes.
    """
    _refuse_ambiguous(location)
    target = urljoin(url, location)
    if origin_of(target)[0] == "http" and origin_of(url)[0] == "https":
        raise http.client.HTTPException("HTTP, and was asked by HTTPS")
    return target


def _refuse_ambiguous(url: str) -> None:
    """Refuse what parsers make different hosts of: the token would go to one that only looks like the hub."""
    if _AMBIGUOUS.search(url):
        raise http.client.InvalidURL("a URL with a character that has no place in one")
