"""A whole stack in one directory of this process, of which every port can fail."""

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from dispatcher import bootstrap
from dispatcher.artifacts import ArtifactStore
from dispatcher.jobqueue import InlineQueue
from dispatcher.local_artifacts import LocalArtifacts
from dispatcher.records import RecordStore
from dispatcher.service import Service
from dispatcher.settings import Settings
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.tokens import FileTokens
from dispatcher.trigger import Trigger
from exporter.job import Stores
from exporter.lease import Term
from tests.chaos.faults import Dice, FaultyQueue, FaultyRecords, FaultyRunner, FaultyTokens
from tests.chaos.faulty_artifacts import FaultyArtifacts
from tests.chaos.in_process import ThreadRunner
from tests.chaos.watch import Watch
from tests.exporter.exporting import QUICK, training_document

JOB = "job-1"
ENDS_SECONDS = 60.0
"""What nothing that is under way takes"""


class Deployment:
    """A whole stack in one directory, of which every port fails as the dice has it.

    Args:
        root: Where its stores are.
        models: Where `base` and `adapter` lie.
        dice: Decides what fails.
        lease_seconds: Of all leases.
        records: Instead of SQLite; closed with the deployment.
        artifacts: Instead of a directory.
        base: The base's directory among the models; its name tells how many tasks make an export.
        adapter: Where the adapter lies instead.
        delays: Seconds before a message is delivered again, at first and at most.

    Attributes:
        on_write: Called whenever an exporter begins a file.
    """

    def __init__(
        self,
        root: Path,
        models: Path,
        dice: Dice,
        *,
        lease_seconds: int,
        records: RecordStore | None = None,
        artifacts: ArtifactStore | None = None,
        base: str = "base",
        adapter: str | None = None,
        delays: tuple[float, float] = (0.002, 0.02),
    ) -> None:
        self.root = root
        self.dice = dice
        self.watch = Watch()
        self.on_write: Callable[[], object] = lambda: None
        self.records = records or SqliteRecords(root / "records.db")
        self.artifacts = artifacts or LocalArtifacts(root / "artifacts")
        self.tokens = FileTokens(root / "tokens")
        self._lease_seconds = lease_seconds
        self.runner = ThreadRunner(self._stores)
        self.queue = InlineQueue(self._deliver, first_delay=delays[0], longest_delay=delays[1])
        settings = Settings.from_env({"GEMMA_EXPORT_HOME": str(root)})
        queue, runner = FaultyQueue(self.queue, dice, "queue"), FaultyRunner(self.runner, dice, "runner")
        found, tokens = self._records("dispatcher"), FaultyTokens(self.tokens, dice, "dispatcher")
        stored = FaultyArtifacts(self.artifacts, dice, "dispatcher")
        trigger = Trigger(
            records=found,
            queue=queue,
            runner=runner,
            lease_seconds=lease_seconds,
            max_attempts=settings.max_attempts,
        )
        service = Service(records=found, artifacts=stored, runner=runner, tokens=tokens, trigger=trigger)
        self.stack = bootstrap.Stack(
            settings,
            found,
            stored,
            tokens,
            queue,
            runner,
            trigger=trigger,
            service=service,
        )
        self._max_attempts = settings.max_attempts
        document = training_document(models / base, adapter or models / "adapter")
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
        return FaultyRecords(self.records, self.dice, caller, self.watch)

    def _stores(self, caller: str) -> Stores:
        def writes(path: str) -> None:
            kind = "gguf.q8_0" if path.startswith("gguf_models/") else "merged"
            self.watch.writes(caller, f"{JOB}.{kind}", path)
            self.on_write()

        return Stores(
            self._records(caller),
            FaultyArtifacts(self.artifacts, self.dice, caller, writes),
            FaultyTokens(self.tokens, self.dice, caller),
            term=Term(self._lease_seconds),
            max_attempts=self._max_attempts,
            checks=QUICK,
        )


def _aged(value: Any, passed: timedelta, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _aged(item, passed, key) for key, item in value.items()}
    return (datetime.fromisoformat(value) - passed).isoformat() if name.endswith(("_at", "_since")) and value else value
