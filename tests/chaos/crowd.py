"""Many at once: a thousand identical requests over HTTP, and a thousand deliveries of one message."""

import http.client
import json
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from dispatcher import bootstrap, lifecycle
from dispatcher.contract import UNFINISHED, ExportRequest, ExportType, JobMessage
from dispatcher.errors import ExportError
from dispatcher.jobqueue import InlineQueue
from dispatcher.local_artifacts import LocalArtifacts
from dispatcher.records import RecordStore, open_records
from dispatcher.serve import local_app, open_server
from dispatcher.service import Service
from dispatcher.settings import Settings
from dispatcher.tokens import FileTokens
from dispatcher.trigger import Trigger
from infra.local import servers
from tests.chaos.rows import Row
from tests.dispatcher.world import Machines

USER = "ann"
CROWD = 1000
CROWD_ON_FIRESTORE = 100
"""Its emulator is slow"""
EXPORTS, ASKED_EACH, LIMIT = 50, 4, 20
"""Different exports of one user, how often each is asked for at once, and how many may be unfinished"""
STACK_BYTES = 512 << 10
"""Of each thread; by default it is 8 MiB"""
PATIENCE_SECONDS = 120.0
"""For each request and delivery, tried again as the answer says"""


@dataclass
class Crowd:
    """What came of one crowd."""

    what: str
    size: int
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    """First answers, by HTTP status or error code"""
    unanswered: int = 0
    """Who was refused to the end"""
    exports: int = 0
    executions: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of all."""

    crowds: list[Crowd]
    bounded: Crowd
    """Of one user with a bound"""


def measure(root: Path, console: Console, *, size: int = CROWD, on_firestore: int = CROWD_ON_FIRESTORE) -> Outcome:
    """Let a crowd ask, and deliver, at once.

    Args:
        root: An empty directory.
        console: Told of each crowd.
        size: How many, where records are in SQLite.
        on_firestore: How many, where they are in Firestore's emulator; 0 is none.
    """
    crowds: list[Crowd] = []
    bounded: list[Crowd] = []

    def told(crowd: Crowd) -> Crowd:
        console.print(f"{crowd.what}, {crowd.size} at once: {crowd.seconds:.1f} s, first answers {dict(crowd.answers)}")
        return crowd

    with Place(root / "sqlite", f"sqlite://{root / 'records.db'}") as place:
        crowds += [told(place.requests(size)), told(place.deliveries(size))]
        bounded.append(told(place.bounded()))
    if on_firestore:
        with firestore() as project, Place(root / "firestore", f"firestore://{project}/(default)") as place:
            crowds += [told(place.requests(on_firestore)), told(place.deliveries(on_firestore))]
    return Outcome(crowds, bounded[0])


def rows(outcome: Outcome) -> list[Row]:
    """One export, one execution; and no more unfinished exports than a user may have."""
    found = []
    for crowd in outcome.crowds:
        measured = f"{crowd.exports} export, {crowd.executions} execution, {crowd.unanswered} refused to the end"
        good = (crowd.exports, crowd.executions, crowd.unanswered) == (1, 1, 0)
        found.append(Row(f"{crowd.size} {crowd.what} at once", measured, "1 export, 1 execution, 0 refused", good))
    many = outcome.bounded
    measured = f"{many.exports} unfinished, {many.executions} executions"
    good = many.exports == many.executions == LIMIT
    found.append(Row(f"{many.size} {many.what}", measured, f"{LIMIT} of each", good))
    return found


@contextmanager
def firestore() -> Iterator[str]:
    """Firestore's emulator, that of the environment or a new one; yields a project of its own.

    Raises:
        MissingServerError: It is not on this machine.
    """
    with ExitStack() as stack:
        if "FIRESTORE_EMULATOR_HOST" not in os.environ:
            os.environ["FIRESTORE_EMULATOR_HOST"] = stack.enter_context(servers.firestore())
            stack.callback(os.environ.pop, "FIRESTORE_EMULATOR_HOST")
        yield f"project-{secrets.token_hex(6)}"


class Place:
    """A dispatcher behind HTTP, and a runner that only notes what it was asked.

    Args:
        root: Where everything but the records is.
        records_url: Where these are.
    """

    def __init__(self, root: Path, records_url: str) -> None:
        self._root = root
        self._open = ExitStack()
        self.records: RecordStore = open_records(records_url)
        self._open.callback(self.records.close)
        self.machines = Machines()
        self.queue = InlineQueue(self._deliver, first_delay=0.05, longest_delay=1.0)
        self._open.callback(self.queue.close)
        self.trigger = Trigger(
            records=self.records, queue=self.queue, runner=self.machines, max_attempts=4, several_tasks=False
        )
        self._adapter = root / "adapter"
        self._adapter.mkdir(parents=True)
        (self._adapter / "adapter_config.json").write_text("{}")
        (self._adapter / "adapter_model.safetensors").write_bytes(b"weights")
        self._port = 0

    def __enter__(self) -> "Place":
        artifacts, tokens = LocalArtifacts(self._root / "artifacts"), FileTokens(self._root / "tokens")
        service = Service(
            records=self.records,
            artifacts=artifacts,
            runner=self.machines,
            tokens=tokens,
            trigger=self.trigger,
            max_unfinished_per_user=LIMIT,
        )
        settings = Settings.from_env({"GEMMA_EXPORT_HOME": str(self._root)})
        bootstrap.install(
            bootstrap.Stack(settings, self.records, artifacts, tokens, self.queue, self.machines, self.trigger, service)
        )
        self._open.callback(bootstrap.install, None)
        server = open_server(local_app(USER), 0)
        self._open.callback(server.server_close)
        self._open.enter_context(servers.in_thread(server))
        self._port = server.server_port
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def requests(self, size: int) -> Crowd:
        """Identical requests; then, once nothing is under way, what there is."""
        crowd = Crowd(f"identical requests, {type(self.records).__name__}", size)
        self._job("asked")
        _at_once(crowd, [lambda: self._asked("asked")] * size)
        self._counted(crowd, "asked")
        return crowd

    def deliveries(self, size: int) -> Crowd:
        """Deliveries of one message, of an export that nothing was started for yet."""
        crowd = Crowd(f"deliveries of one message, {type(self.records).__name__}", size)
        self._job("delivered")
        request = ExportRequest(job_id="delivered", export_type=ExportType.MERGED)
        now = datetime.now(UTC)
        record = lifecycle.requested(request, user_id=USER, adapter_fingerprint="any", token_ref=None, now=now)
        assert self.records.create_export(record)
        message = JobMessage(job_id="delivered", export_id="delivered.merged").model_dump_json().encode()
        _at_once(crowd, [lambda: self._delivered(message)] * size)
        self._counted(crowd, "delivered")
        return crowd

    def bounded(self) -> Crowd:
        """More exports of one user than may be unfinished, each asked for several times, in no order."""
        for record in self.records.list_exports(user_id=USER):
            self._cancel(record.export_id)
        crowd = Crowd(f"requests of {EXPORTS} exports, {LIMIT} allowed", EXPORTS * ASKED_EACH)
        names = [f"many-{number}" for number in range(EXPORTS)]
        for name in names:
            self._job(name)
        before = len(self.machines.started)
        _at_once(crowd, [lambda name=name: self._asked(name) for name in names * ASKED_EACH])  # type: ignore[misc]
        assert self.queue.drained(PATIENCE_SECONDS)
        crowd.exports = len(self.records.list_exports(user_id=USER, states=UNFINISHED))
        crowd.executions = len(self.machines.started) - before
        return crowd

    def _counted(self, crowd: Crowd, job_id: str) -> None:
        assert self.queue.drained(PATIENCE_SECONDS)
        crowd.exports = len(self.records.list_exports(job_id=job_id))
        crowd.executions = sum(started == job_id for started, _ in self.machines.started.values())

    def _job(self, job_id: str) -> None:
        document = {"user_id": USER, "status": "completed", "base_model_id": "google/gemma-3-1b-it"}
        assert self.records.put_job(job_id, {**document, "adapter_path": str(self._adapter)})

    def _asked(self, job_id: str) -> str:
        return str(self._posted("/export", {"job_id": job_id, "export_type": "merged"}))

    def _cancel(self, export_id: str) -> None:
        assert self._posted(f"/exports/{export_id}/cancel", {}) == 200

    def _posted(self, path: str, body: dict[str, str]) -> int:
        connection = http.client.HTTPConnection(servers.HOST, self._port, timeout=PATIENCE_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body))
            return connection.getresponse().status
        finally:
            connection.close()

    def _delivered(self, body: bytes) -> str:
        try:
            self.trigger.deliver(body, {})
        except ExportError as error:
            return error.error_code
        return "acknowledged"

    def _deliver(self, body: bytes, attributes: object) -> None:
        self.trigger.deliver(body, {})


FINAL = {"200", "202", "429", "acknowledged"}
"""After these nobody asks again"""


def _at_once(crowd: Crowd, acts: list[Callable[[], str]]) -> None:
    """Do all of these at the same moment, each again until it is answered for good."""
    ready = threading.Barrier(len(acts) + 1)
    answers: list[list[str]] = [[] for _ in acts]

    def run(act: Callable[[], str], said: list[str]) -> None:
        ready.wait()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not FINAL.intersection(said) and time.monotonic() < deadline:
            if said:
                time.sleep(0.2)
            try:
                said.append(act())
            except (OSError, http.client.HTTPException) as error:
                said.append(type(error).__name__)

    before = threading.stack_size(STACK_BYTES)
    try:
        threads = [
            threading.Thread(target=run, args=(act, said), daemon=True) for act, said in zip(acts, answers, strict=True)
        ]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        ready.wait()
        for thread in threads:
            thread.join()
    finally:
        threading.stack_size(before)
    crowd.seconds = time.monotonic() - began
    crowd.answers.update(said[0] for said in answers)
    crowd.unanswered = sum(not FINAL.intersection(said) for said in answers)
