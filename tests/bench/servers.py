"""The hub and the bucket that the bench streams between: as processes of their own, or here, where all is noted."""

import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import requests

from infra.local.hub import serving
from infra.local.hub_state import Hub
from infra.local.servers import STOP_SECONDS, fake_gcs, in_thread
from infra.local.storage import Fault, Request, StorageProxy
from infra.local.uploads import Answer
from tests.bench.deployment import BUCKET, MODEL_ID, REPOSITORY

_NAME = re.compile(rb'"name": ?"([^"]+)"')


@contextmanager
def hub_process(base: Path, *, bytes_per_second: float | None = None) -> Iterator[str]:
    """`python -m infra.local.hub` with one repository, `MODEL_ID`; yields its URL."""
    with _process("infra.local.hub", f"{MODEL_ID}={base}", bytes_per_second) as url:
        _warm(url)
        yield url


@contextmanager
def storage_process(directory: Path, *, bytes_per_second: float | None = None) -> Iterator[str]:
    """`python -m infra.local.storage` with an empty bucket, `BUCKET`; yields its URL."""
    with _process("infra.local.storage", str(directory), bytes_per_second, "--bucket", BUCKET) as url:
        yield url


def _warm(hub_url: str) -> None:
    """Let a hub compute the digests that it tells: it does so once, and not while somebody is measured."""
    requests.get(f"{hub_url}/api/models/{MODEL_ID}?blobs=true", timeout=600).raise_for_status()


@contextmanager
def _process(module: str, what: str, bytes_per_second: float | None, *options: str) -> Iterator[str]:
    pace = [] if bytes_per_second is None else ["--bytes-per-second", str(int(bytes_per_second))]
    command = [sys.executable, "-m", module, what, *options, *pace]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            if not url:
                raise RuntimeError(f"{module} does not come up")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


class NotedStorage(StorageProxy):
    """Cloud Storage that notes which object each byte was for.

    Attributes:
        seen: Every request, without its body.
        bodies_with: Targets of the requests whose body had a secret in it.
        uploaded: Bytes sent for each object, whatever became of them.
        begun: How often each object was begun.
        at_once: How many weight files of artifacts were on their way together at most.
        before: Called before each request is answered.
    """

    def __init__(self, secret: str, bytes_per_second: float | None = None) -> None:
        super().__init__(bytes_per_second)
        self.seen: list[Request] = []
        self.bodies_with: list[str] = []
        self.uploaded: Counter[str] = Counter()
        self.begun: Counter[str] = Counter()
        self.at_once = 0
        self.before: Callable[[Request], object] = lambda request: None
        self._secret = secret.encode()
        self._names: dict[str, str] = {}
        self._open: set[str] = set()
        self._noting = threading.Lock()

    def forget(self) -> None:
        """Begin anew: who uploaded before is dead."""
        with self._noting:
            self.uploaded.clear()
            self.begun.clear()
            self._open.clear()
            self.at_once = 0

    def fault_of(self, request: Request) -> Fault | HTTPStatus | None:
        self.before(request)
        with self._noting:
            self.seen.append(replace(request, body=b""))
            if self._secret in request.body:
                self.bodies_with.append(request.target)
            kind = request.query("uploadType")
            session = request.query("upload_id")
            name = self._names.get(session, "") if session else _named_in(request) if kind else ""
            if name and not session:
                self.begun[name] += 1
            if name and (session or kind == "multipart"):
                self.uploaded[name] += len(request.body)
        if len(request.body) < int(request.headers.get("Content-Length") or 0):
            return Fault.DROPPED  # whoever sent it died; the rest never comes, and no service acts on half a request
        return super().fault_of(request)

    def answer(self, request: Request) -> Answer:
        answer = super().answer(request)
        with self._noting:
            upload_id = parse_qs(urlsplit(answer.headers.get("Location", "")).query).get("upload_id")
            if upload_id:
                name = self._names[upload_id[0]] = _named_in(request)
                if name.startswith("merged_models/") and name.endswith(".safetensors"):
                    self._open.add(name)
                    self.at_once = max(self.at_once, len(self._open))
            elif request.query("upload_id") and answer.status == 200:
                self._open.discard(self._names.get(request.query("upload_id") or "", ""))
        return answer

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who was killed takes no answer
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # passed on as it came


@dataclass(frozen=True)
class Noted:
    """A hub and a bucket in this process."""

    hub: Hub
    storage: NotedStorage


@contextmanager
def noted_servers(base: Path, objects: Path, *, secret: str, bytes_per_second: float | None = None) -> Iterator[Noted]:
    """A hub with the base as `MODEL_ID`, and a bucket `BUCKET`; requests and bytes are noted.

    Args:
        base: The base's directory.
        objects: Where the bucket's objects lie.
        secret: What no request to the bucket should have in its body.
        bytes_per_second: Of each connection, in each direction.

    Raises:
        MissingServerError: fake-gcs-server is not on this machine.
    """
    pace = None if bytes_per_second is None else int(bytes_per_second)
    with (
        serving(Hub(base, bytes_per_second=pace)) as hub,
        NotedStorage(secret, bytes_per_second) as storage,
        fake_gcs(objects, public_url=storage.url) as upstream,
    ):
        storage.upstream, storage.directory = urlsplit(upstream).netloc, objects
        storage.answer(Request("POST", "/storage/v1/b?project=local", {}, f'{{"name": "{BUCKET}"}}'.encode()))
        _warm(hub.url)
        with in_thread(storage):
            yield Noted(hub, storage)


def _named_in(request: Request) -> str:
    """The object that a request begins."""
    found = _NAME.search(request.body[:4096])
    return request.query("name") or (found[1].decode() if found else "")
