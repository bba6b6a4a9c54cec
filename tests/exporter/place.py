"""A laptop's stores around one training job, and ways to disturb an export of it."""

import json
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from dispatcher.artifacts import ArtifactWriter
from dispatcher.contract import ExportRecord, Lease, State
from dispatcher.errors import Unavailable
from dispatcher.lifecycle import Actor, transition
from dispatcher.local_artifacts import LocalArtifacts
from dispatcher.records import update
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.tokens import FileTokens
from exporter.job import ExitCode, Stores, run_job
from exporter.lease import Term, utc_now
from exporter.order import Order
from exporter.stopping import Stop
from tests.exporter.exporting import NOW, QUICK, merged_record, training_document
from tests.gemmas import make_adapter, save_base

EXPORT = "job-1.merged"


class Place:
    """A laptop's stores with one completed training job in them.

    Args:
        root: Where they are.
        models: Where the job's `base` and `adapter` lie; by default in `root`, where they are made.
    """

    def __init__(self, root: Path, models: Path | None = None) -> None:
        self.root = root
        self.records = SqliteRecords(root / "records.db")
        self.artifacts = LocalArtifacts(root / "artifacts")
        self.tokens = FileTokens(root / "tokens")
        self.stop = Stop()
        self.stores = Stores(self.records, self.artifacts, self.tokens, term=Term(60), max_attempts=3, checks=QUICK)
        if models is None:
            models = root
            make_adapter("gemma3_text", save_base("gemma3_text", root / "base"), root / "adapter")
        document = training_document(models / "base", "")
        document["artifacts"] = {"raw": {"adapter": str(models / "adapter")}, "kept": 1}
        assert self.records.put_job("job-1", document)

    def queue(self, **fields: object) -> ExportRecord:
        record = merged_record(**fields)
        assert self.records.create_export(record)
        return record

    def rewrite_job(self, **changes: object) -> None:
        """As the training service may: change the job's document."""
        with closing(sqlite3.connect(self.root / "records.db")) as connection, connection:
            (text,) = connection.execute("SELECT document FROM training_jobs").fetchone()
            connection.execute("UPDATE training_jobs SET document = ?", (json.dumps({**json.loads(text), **changes}),))

    def run(self, **order: object) -> ExitCode:
        wanted = Order(job_id="job-1", execution=f"test-{secrets.token_hex(3)}")
        return run_job(replace(wanted, **order), self.stores, self.stop)  # type: ignore[arg-type]  # fields by name

    def run_on_stalling_disk(self) -> ExitCode:
        """Run while the disk stalls between the weights and the last of the side files."""
        store = Interfering(self.root / "artifacts")

        def stalled() -> None:
            if any(name.endswith("tokenizer.json") for name in self.files()):
                raise Unavailable("the disk stalled")

        store.interfere = stalled
        good, self.stores = self.stores, replace(self.stores, artifacts=store)
        code = self.run()
        self.stores = good
        return code

    def record_change(self, to: State, by: Actor, export_id: str = EXPORT) -> None:
        update(self.records, export_id, lambda record: transition(record, to, by=by, now=utc_now()))

    def launched(self, lease_id: str, seconds: int) -> None:
        """Let the trigger launch an execution under a lease; negative seconds are one that has run out."""
        now = utc_now()
        lease = Lease(lease_id=lease_id, owner="trigger", expires_at=now + timedelta(seconds=seconds))
        update(
            self.records,
            EXPORT,
            lambda record: transition(record, State.STARTING, by=Actor.TRIGGER, now=now, lease=lease),
        )

    def leased(self, owner: str, seconds: int) -> None:
        """Let someone else claim the export; negative seconds are a lease that has run out."""
        now = utc_now()
        lease = Lease(lease_id="theirs", owner=owner, expires_at=now + timedelta(seconds=seconds))
        update(
            self.records,
            EXPORT,
            lambda record: transition(record, State.RUNNING, by=Actor.EXPORTER, now=now, lease=lease, execution=owner),
        )

    def requeue(self) -> None:
        """Ask again, as an operator or a caller does."""
        self.record_change(State.QUEUED, Actor.OPERATOR)

    def record(self, export_id: str = EXPORT) -> ExportRecord:
        record = self.records.get_export(export_id)
        assert record is not None
        return record

    def files(self) -> list[str]:
        root = self.root / "artifacts"
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


class Interfering(LocalArtifacts):
    """A store that does something else whenever a file is begun."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.directory = ""
        self.interfere: Callable[[], object] = lambda: None

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        self.directory = path.rpartition("/")[0]
        self.interfere()
        return super().create(path, size=size)


def expired(record: ExportRecord) -> ExportRecord:
    """The record when its lease has run out."""
    assert record.lease is not None
    lease = record.lease.model_copy(update={"expires_at": NOW})
    return record.model_copy(update={"lease": lease, "revision": record.revision + 1})
