"""One seed of failing ports: a user asks for a merged model and a GGUF, and goes on asking until both are there."""

import json
import logging
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from dispatcher import bootstrap
from dispatcher.errors import ExportError
from dispatcher.jobqueue import InlineQueue
from dispatcher.local_artifacts import LocalArtifacts
from dispatcher.serve import local_app
from dispatcher.service import Service
from dispatcher.settings import Settings
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.sweep import swept
from dispatcher.tokens import FileTokens
from dispatcher.trigger import Trigger
from exporter.job import Stores
from tests.chaos.faults import Dice, FaultyQueue, FaultyRecords, FaultyRunner, FaultyTokens
from tests.chaos.faulty_artifacts import FaultyArtifacts
from tests.chaos.in_process import ThreadRunner
from tests.chaos.watch import Watch, WatchedRecords
from tests.exporter.exporting import QUICK, training_document

JOB = "job-1"
USER = "ann"
TOKEN = "hf_token-of-a-storm"
EXPORTS = {"merged": {"export_type": "merged"}, "gguf.q8_0": {"export_type": "gguf", "quantization": "q8_0"}}
"""The requests, by what their export ids end with"""
STORMY_ROUNDS = 25
"""After that nothing fails any more"""
CALM_ROUNDS = 25
"""In which all has to come to its end then"""
LONG = timedelta(hours=1)
"""Longer than any lease, and than a message may be under way"""
VERY_LONG = timedelta(days=8)
"""Longer than what is left of an export is kept, and all rounds together are not as long"""
ENDS_SECONDS = 60.0


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


class Deployment:
    """A whole stack in one directory, of which every port fails as the dice has it.

    Args:
        root: Where its stores are.
        models: Where `base` and `adapter` lie.
        dice: Decides what fails.
        lease_seconds: Of all leases.
    """

    def __init__(self, root: Path, models: Path, dice: Dice, *, lease_seconds: int) -> None:
        self.root = root
        self.dice = dice
        self.watch = Watch()
        self.records = SqliteRecords(root / "records.db")
        self.artifacts = LocalArtifacts(root / "artifacts")
        self.tokens = FileTokens(root / "tokens")
        self._lease_seconds = lease_seconds
        self.runner = ThreadRunner(self._stores)
        self.queue = InlineQueue(self._deliver, first_delay=0.002, longest_delay=0.02)
        settings = Settings.from_env({"GEMMA_EXPORT_HOME": str(root)})
        queue, runner = FaultyQueue(self.queue, dice, "queue"), FaultyRunner(self.runner, dice, "runner")
        records, tokens = self._records("dispatcher"), FaultyTokens(self.tokens, dice, "dispatcher")
        artifacts = FaultyArtifacts(self.artifacts, dice, "dispatcher")
        trigger = Trigger(
            records=records,
            queue=queue,
            runner=runner,
            lease_seconds=lease_seconds,
            max_attempts=settings.max_attempts,
            several_tasks=False,
        )
        service = Service(records=records, artifacts=artifacts, runner=runner, tokens=tokens, trigger=trigger)
        self.stack = bootstrap.Stack(
            settings,
            records,
            artifacts,
            tokens,
            queue,
            runner,
            trigger=trigger,
            service=service,
        )
        self._max_attempts = settings.max_attempts
        document = training_document(models / "base", models / "adapter")
        assert self.records.put_job(JOB, {**document, "kept": {"as": "it is"}})

    def close(self) -> None:
        self.queue.close()
        self.records.close()

    def settled(self) -> bool:
        """Wait until no message is under way and nothing runs; whether that came."""
        deadline = time.monotonic() + ENDS_SECONDS
        while time.monotonic() < deadline:
            if not self.queue.drained(deadline - time.monotonic()):
                return False
            if self.runner.idle(0) and self.queue.drained(0):
                return True
            self.runner.idle(deadline - time.monotonic())
        return False

    def pass_time(self, passed: timedelta) -> None:
        """Let time pass for every record, by making all that they tell of it so much longer ago."""
        with closing(sqlite3.connect(self.root / "records.db", timeout=10)) as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            for export_id, text in connection.execute("SELECT export_id, document FROM exports").fetchall():
                aged = json.dumps(_aged(json.loads(text), passed))
                connection.execute("UPDATE exports SET document = ? WHERE export_id = ?", (aged, export_id))

    def _deliver(self, body: bytes, attributes: Any) -> None:
        self.stack.trigger.deliver(body, attributes)

    def _records(self, caller: str) -> FaultyRecords:
        return FaultyRecords(WatchedRecords(self.records, self.watch, caller), self.dice, caller)

    def _stores(self, execution: str, attempt: int) -> Stores:
        caller = f"{execution}/{attempt}"

        def writes(path: str) -> None:
            kind = "gguf.q8_0" if path.startswith("gguf_models/") else "merged"
            self.watch.writes(caller, f"{JOB}.{kind}", path)

        return Stores(
            self._records(caller),
            FaultyArtifacts(self.artifacts, self.dice, caller, writes),
            FaultyTokens(self.tokens, self.dice, caller),
            lease_seconds=self._lease_seconds,
            max_attempts=self._max_attempts,
            checks=QUICK,
        )


def _aged(value: Any, passed: timedelta, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _aged(item, passed, key) for key, item in value.items()}
    return (datetime.fromisoformat(value) - passed).isoformat() if name.endswith(("_at", "_since")) and value else value


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


@dataclass(frozen=True)
class Weather:
    """How bad it gets."""

    rate: float
    """How many of all calls fail, from 0 to 1"""
    lease_seconds: int
    lapses: float
    """How often, from 0 to 1, time passes while somebody is at work"""


CALM = Weather(0.0, 30, 0.0)


def weather(seed: int) -> Weather:
    """The weather of a seed: from 1 in 200 calls that fails to 1 in 7."""
    dice = random.Random(seed)
    return Weather(0.005 * 30 ** dice.random(), dice.choice((2, 30)), dice.choice((0.0, 0.0, 0.3)))


def storm(seed: int, root: Path, models: Path, weather: Weather) -> tuple[Seen, Deployment]:
    """Run one seed to its end; what was seen on the way, and the deployment as it is left, closed.

    Args:
        seed: Decides what fails, and when time passes.
        root: A directory with no stores in it.
        models: Where `base` and `adapter` lie.
        weather: How bad it gets.
    """
    seen = Seen(seed, weather.rate)
    began = time.monotonic()
    dice = Dice(seed, weather.rate)
    deployment = Deployment(root, models, dice, lease_seconds=weather.lease_seconds)
    bootstrap.install(deployment.stack)
    try:
        with _exceptions_noted(seen), _client() as client:
            _driven(deployment, User(client, seen), seen, random.Random(f"time {seed}"), weather.lapses)
    finally:
        bootstrap.install(None)
        deployment.close()
    seen.seconds = time.monotonic() - began
    seen.faults = sum(count for fate, count in dice.thrown.items() if fate.name != "FINE")
    seen.executions, seen.attempts = len(deployment.runner.asked), len(deployment.runner.ended)
    seen.doubled += deployment.watch.doubled
    seen.inconsistent += deployment.watch.inconsistent
    seen.unexpected += deployment.runner.faults
    return seen, deployment


def _driven(deployment: Deployment, user: User, seen: Seen, dice: random.Random, lapses: float) -> None:
    done: set[str] = set()
    for number in range(STORMY_ROUNDS + CALM_ROUNDS):
        deployment.dice.calm = number >= STORMY_ROUNDS
        for kind in EXPORTS.keys() - done:
            found = user.look(kind) if kind in user.accepted else None
            if kind not in user.accepted or (found and found["state"] == "failed"):
                if found and not found["error"]["retryable"]:
                    seen.lost.append(f"{kind} failed for good: {found['error']}")
                user.ask(kind)
            elif found and found["state"] == "completed":
                done.add(kind)
        if done == EXPORTS.keys():
            break
        if dice.random() < lapses:
            time.sleep(dice.uniform(0.0, 0.5))
            deployment.pass_time(LONG)  # for those who are at work, too
            _swept(deployment)
        if not deployment.settled():
            seen.lost.append(f"after {ENDS_SECONDS:g} s something is still at work")
            return
        deployment.pass_time(LONG)
        _swept(deployment)
    else:
        seen.lost += [f"{kind} is not completed" for kind in EXPORTS.keys() - done]
    deployment.settled()
    deployment.dice.calm = True
    for kind in EXPORTS:
        if (state := user.ask(kind)) != "completed":
            seen.lost.append(f"{kind} was completed, and is {state} when it is asked for again")
    deployment.pass_time(VERY_LONG)
    _swept(deployment)
    deployment.settled()


def _swept(deployment: Deployment) -> None:
    try:
        swept(deployment.stack.trigger, deployment.stack.collector)
    except ExportError as error:
        logging.getLogger(__name__).info("the sweep did not get through: %s", error)


@contextmanager
def _client() -> Iterator[httpx.Client]:
    """The dispatcher's HTTP target, called in this process."""
    transport = httpx.WSGITransport(app=local_app(USER), raise_app_exceptions=False)
    with httpx.Client(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


@contextmanager
def _exceptions_noted(seen: Seen) -> Iterator[None]:
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
