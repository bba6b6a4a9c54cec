"""A file on the Hugging Face hub, pinned to a commit and its digest, read by ranges."""

import http.client
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Self

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from dispatcher.errors import SourceError, Unavailable
from exporter.hub_errors import changed_on_hub, refuse
from exporter.hub_http import Answer, Connections, Headers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long the hub is asked again."""

    attempts: int = 8
    """In a row without a byte"""
    first_seconds: float = 1.0
    """The longest first wait; each next one may be twice as long. What is waited is drawn from 0 up to that."""
    longest_seconds: float = 30.0
    longest_asked_seconds: float = 300.0
    """What a Retry-After may ask for; the hub counts requests by windows of five minutes."""
    silence_seconds: float = 20.0
    """The longest wait for an answer, or for the next bytes of one."""


@dataclass(frozen=True)
class HubFile:
    """A file of a model at a commit; a `ByteSource`."""

    model_id: str
    commit: str
    name: str
    size: int
    etag: str
    """As the hub tells it, without quotes: sha256 of the content of what is in LFS, else Git's id of the blob."""
    token: str | None = field(default=None, repr=False)
    patience: Patience = field(default=Patience(), compare=False)
    while_waiting: Callable[[], object] = field(default=lambda: None, repr=False, compare=False)
    """Called at least once a second while the hub is not asked again yet; what it raises ends the wait."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.name} of base model {self.model_id!r} at {self.commit[:12]}"

    def open(self, *, whole: bool = False) -> "_HubReader":
        """For reading; nothing is asked before bytes are."""
        return _HubReader(self)

    def prove_access(self) -> None:
        """Ask for the file's metadata with this token: a listing of a gated repository anybody gets.

        Raises:
            SourceError: There is no access, or it is another file by now; as `hub_errors.translating`.
            Unavailable: `hub_unavailable`.
        """
        with self.open() as reader:
            reader.ask_for_metadata()

    def check(self, answer: Answer, start: int, stop: int) -> None:
        """See that an answer to a GET of the bytes from `start` up to `stop` holds them, of this very version."""
        self.check_version(answer)
        told = answer.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told)
        if answer.status == HTTPStatus.PARTIAL_CONTENT and found and int(found[3]) != self.size:
            raise changed_on_hub(self.where, f"it has {found[3]} bytes, expected {self.size}")
        encoding = answer.headers.get("Content-Encoding", "identity")
        if (
            answer.status != HTTPStatus.PARTIAL_CONTENT
            or not found
            or (int(found[1]), int(found[2])) != (start, stop - 1)
            or answer.length is None
            or encoding != "identity"
        ):
            raise SourceError(
                f"bytes {start}-{stop - 1} of {self.where} were asked for, and the answer was status {answer.status} "
                f"with range {told[:80]!r} and encoding {encoding[:20]!r}: something between here and the hub does "
                "not send ranges. Check HF_ENDPOINT and the proxy.",
                code="hub_ranges_unsupported",
            )

    def check_version(self, answer: Answer) -> None:
        """See that all that the hub itself told is of this very version."""
        for headers in answer.of_hub:
            commit = headers.get("X-Repo-Commit", self.commit)
            if commit != self.commit:
                raise changed_on_hub(self.where, f"the hub tells of commit {commit[:40]!r}")
        # The other host's ETag is of its own making, and so may be that of a redirect within the hub.
        last = answer.of_hub[-1]
        etag = _bare(last.get("X-Linked-ETag") or last.get("ETag") or "")
        if etag != self.etag:
            raise changed_on_hub(self.where, f"its ETag is {etag[:80]!r}, expected {self.etag!r}")


class _HubReader:
    def __init__(self, file: HubFile) -> None:
        from huggingface_hub import hf_hub_url

        self._file = file
        self._url = hf_hub_url(file.model_id, file.name, revision=file.commit)
        self._connections = Connections(file.token, file.patience.silence_seconds)

    def read_into(self, view: memoryview, offset: int) -> None:
        with self.stream(offset, offset + len(view)) as stream:
            stream.read_into(view)

    def stream(self, start: int, stop: int) -> "_HubStream":
        return _HubStream(self._file, self._url, self._connections, start, stop)

    def ask_for_metadata(self) -> None:
        def ask() -> None:
            answer = _asked(self._file, self._connections, "HEAD", self._url, None)
            answer.close()
            self._file.check_version(answer)

        _persisting(self._file, ask)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connections.close()


class _HubStream:
    """One long GET, and another from the byte reached where that one breaks off."""

    def __init__(self, file: HubFile, url: str, connections: Connections, start: int, stop: int) -> None:
        self._file, self._url, self._connections = file, url, connections
        self._offset, self._stop = start, stop
        self._answer: Answer | None = None
        self._fruitless = 0
        """Failures since the last byte"""

    def read_into(self, view: memoryview) -> None:
        end = self._offset + len(view)
        if end > self._stop:
            raise ValueError(f"{self._file.name}: byte {end} was asked of a stream that ends at {self._stop}")

        def fill() -> None:
            while self._offset < end:
                self._receive(view[len(view) - (end - self._offset) :])

        _persisting(self._file, fill, lambda: self._fruitless)

    def _receive(self, view: memoryview) -> None:
        self._fruitless += 1
        answer = self._answer or self._begun()
        self._answer = answer
        try:
            count = answer.receive(view)
        except (OSError, http.client.HTTPException) as error:
            self._give_up()
            raise _Interrupted(f"{type(error).__name__} at byte {self._offset}") from None
        if count == 0:
            self._give_up()
            raise _Interrupted(f"the body ended at byte {self._offset}, before {self._stop}")
        self._offset += count
        self._fruitless = 0

    def _begun(self) -> Answer:
        wanted = f"bytes={self._offset}-{self._stop - 1}"
        answer = _asked(self._file, self._connections, "GET", self._url, wanted)
        try:
            self._file.check(answer, self._offset, self._stop)
        except SourceError:
            answer.close()
            raise
        return answer

    def _give_up(self) -> None:
        if self._answer:
            self._answer.close()
            self._answer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up()


class _Interrupted(Exception):
    """No byte came this time; no error yet, since it is asked again."""

    def __init__(self, reason: str, asked_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.asked_seconds = asked_seconds
        """How long the host asks to be left alone."""


def _asked(file: HubFile, connections: Connections, method: str, url: str, wanted: str | None) -> Answer:
    """An answer that may hold the file, or its metadata; what cannot is raised."""
    try:
        answer = connections.ask(method, url, wanted)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"{type(error).__name__} instead of an answer") from None
    if answer.status < HTTPStatus.MULTIPLE_CHOICES or (method == "HEAD" and answer.status < HTTPStatus.BAD_REQUEST):
        return answer
    answer.close()
    host = "the hub" if answer.from_hub else "the host that the hub sent us to"
    if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        raise changed_on_hub(file.where, f"{host} says that it has no {wanted}")
    passing = answer.status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or answer.status >= 500
    # A signed URL that ran out is refused by the other host, which knows no token: the hub gives another.
    if answer.from_hub and not passing:
        refuse(answer.status, dict(answer.headers.items()), url, file.where, has_token=file.token is not None)
    raise _Interrupted(f"status {answer.status} from {host}", _asked_seconds(answer.headers))


def _persisting(file: HubFile, action: Callable[[], None], fruitless: Callable[[], int] | None = None) -> None:
    """Do it again when it was interrupted, after longer and longer waits; progress begins the count anew."""
    patience = file.patience
    longer = wait_random_exponential(multiplier=patience.first_seconds, max=patience.longest_seconds)
    enough = stop_after_attempt(patience.attempts)

    def count(state: RetryCallState) -> None:
        if fruitless:
            state.attempt_number = fruitless()

    def asked(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return error.asked_seconds if isinstance(error, _Interrupted) else 0.0

    def say(state: RetryCallState) -> None:
        reason = state.outcome.exception() if state.outcome else None
        log.info("%s: %s; asking again in %.1f s", file.where, reason, state.upcoming_sleep)

    retrying = Retrying(
        retry=retry_if_exception_type(_Interrupted),
        after=count,  # before `wait` and `stop`, which read the count
        wait=lambda state: asked(state) + longer(state),
        stop=lambda state: enough(state) or asked(state) > patience.longest_asked_seconds,
        before_sleep=say,
        sleep=lambda seconds: _sleep(seconds, file.while_waiting),
        reraise=True,
    )
    try:
        retrying(action)
    except _Interrupted as error:
        raise Unavailable(
            f"the hub did not deliver {file.where}: {error}. Try again later.", code="hub_unavailable"
        ) from None


def _sleep(seconds: float, while_waiting: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        while_waiting()
        time.sleep(min(left, 1.0))
    while_waiting()


def _asked_seconds(headers: Headers) -> float:
    """What Retry-After says, in seconds or as a date; 0 without one.

    Source: https://www.rfc-editor.org/rfc/rfc9110.html#field.retry-after
    """
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')
