"""Someone who asks for a merged model and a GGUF over HTTP, and what they and we saw of it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from dispatcher.errors import ExportError
from dispatcher.serve import local_app
from tests.chaos.deployment import JOB

USER = "ann"
TOKEN = "hf_token-of-a-storm"
EXPORTS = {"merged": {"export_type": "merged"}, "gguf.q8_0": {"export_type": "gguf", "quantization": "q8_0"}}
"""The requests, by what their export ids end with"""


@dataclass
class Seen:
    """What came of one seed."""

    seed: int
    rate: float = 0.0
    faults: int = 0
    executions: int = 0
    attempts: int = 0
    requests: int = 0
    tokens: int = 0
    """Left to their time to live, because their deletion failed"""
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    inconsistent: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    """Exceptions that are no ExportError, and answers of 500"""

    @property
    def is_good(self) -> bool:
        return not any((self.lost, self.doubled, self.inconsistent, self.leftovers, self.unexpected))


class User:
    """Asks over HTTP, again after every 503, as the answer says.

    Args:
        client: Whom to ask.
        seen: Added to.
    """

    def __init__(self, client: httpx.Client, seen: Seen) -> None:
        self._client = client
        self._seen = seen
        self.accepted: set[str] = set()

    def ask(self, kind: str) -> str | None:
        """Ask for an export once; what state the answer tells, or None where it is 503."""
        body = {"job_id": JOB, "hf_token": TOKEN, **EXPORTS[kind]}
        answer = self._answered("POST", "/export", body)
        if answer is None:
            return None
        if answer.status_code not in (200, 202):
            self._seen.lost.append(f"POST {kind}: {answer.status_code} {answer.text[:200]}")
            return None
        self.accepted.add(kind)
        return str(answer.json()["status"])

    def look(self, kind: str) -> dict[str, Any] | None:
        """An export's status; None where there was none to be had just now."""
        answer = self._answered("GET", f"/exports/{JOB}.{kind}")
        if answer is None:
            return None
        if answer.status_code == 404 and kind not in self.accepted:
            return None
        if answer.status_code != 200:
            self._seen.lost.append(f"GET {kind}: {answer.status_code} {answer.text[:200]}")
            return None
        document: dict[str, Any] = answer.json()
        return document

    def _answered(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response | None:
        self._seen.requests += 1
        answer = self._client.request(method, path, json=body)
        if answer.status_code == 500:
            self._seen.unexpected.append(f"{method} {path}: 500 {answer.text[:200]}")
        return None if answer.status_code in (500, 503) else answer


@contextmanager
def client_of() -> Iterator[httpx.Client]:
    """The dispatcher's HTTP target, called in this process."""
    transport = httpx.WSGITransport(app=local_app(USER), raise_app_exceptions=False)
    with httpx.Client(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


@contextmanager
def exceptions_noted(seen: Seen) -> Iterator[None]:
    """Notes every exception that is logged and is none of ours."""

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            if error is not None and not isinstance(error, ExportError):
                seen.unexpected.append(f"{record.name}: {record.getMessage()}: {type(error).__name__}: {error}")

    handler = Noting()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
