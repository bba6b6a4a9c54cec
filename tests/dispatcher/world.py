"""A dispatcher on real SQLite, directories and token files, with a queue and a runner that tests can steer."""

import itertools
import json
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dispatcher import lifecycle
from dispatcher.collector import Collector
from dispatcher.contract import (
    Artifact,
    ExportRecord,
    ExportRequest,
    ExportType,
    Failure,
    JobMessage,
    Lease,
    State,
)
from dispatcher.errors import LaunchInDoubt, Unavailable
from dispatcher.lifecycle import Actor
from dispatcher.local_artifacts import LocalArtifacts
from dispatcher.records import update
from dispatcher.runner import Execution
from dispatcher.service import Service
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.tokens import FileTokens, TokenStore
from dispatcher.trigger import Trigger

START = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """Stands still until it is told to move on."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class HeldQueue:
    """Keeps what is published, encoded, until a test delivers it; refuses while it is down."""

    def __init__(self) -> None:
        self.held: list[tuple[bytes, dict[str, str]]] = []
        self.down = False

    def publish(self, message: JobMessage, attributes: Mapping[str, str]) -> None:
        if self.down:
            raise Unavailable("the queue is down")
        self.held.append((message.model_dump_json().encode(), dict(attributes)))

    def close(self) -> None:
        pass

    def deliver_all(self, trigger: Trigger) -> None:
        held, self.held = self.held, []
        for body, attributes in held:
            trigger.deliver(body, attributes)


class Machines:
    """A runner that remembers its executions; refuses while it is down, loses its answers while in doubt."""

    def __init__(self) -> None:
        self.started: dict[str, tuple[str, dict[str, str]]] = {}
        self.tasks: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.down = False
        self.in_doubt = False
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def start(self, job_id: str, environment: Mapping[str, str], *, tasks: int = 1) -> Execution:
        if self.down:
            raise Unavailable("no machine is to be had")
        with self._lock:
            name = f"execution-{next(self._numbers)}"
            self.started[name] = (job_id, dict(environment))
            self.tasks[name] = tasks
        if self.in_doubt:
            raise LaunchInDoubt("no answer came")
        return Execution(name, f"file:///logs/{name}.log")

    def cancel(self, execution: str) -> None:
        if self.down:
            raise Unavailable("no machine answers")
        self.cancelled.add(execution)

    def close(self) -> None:
        pass


class World:
    """Everything around the service, and what others (the training service, the exporter) do to it."""

    def __init__(
        self, home: Path, *, tokens: TokenStore | None = None, records: SqliteRecords | None = None, **limits: Any
    ) -> None:
        self.home = home
        self.clock = Clock()
        self.records = records or SqliteRecords(home / "records.db")
        self.artifacts = LocalArtifacts(home / "artifacts")
        self.tokens = tokens or FileTokens(home / "tokens")
        self.queue = HeldQueue()
        self.machines = Machines()
        max_unfinished = limits.pop("max_unfinished_per_user", 20)
        self.trigger = Trigger(
            records=self.records,
            queue=self.queue,
            runner=self.machines,
            clock=self.clock,
            **({"max_attempts": 5} | limits),
        )
        self.collector = Collector(self.records, self.artifacts, after=timedelta(days=7), clock=self.clock)
        self.service = Service(
            records=self.records,
            artifacts=self.artifacts,
            runner=self.machines,
            tokens=self.tokens,
            trigger=self.trigger,
            max_unfinished_per_user=max_unfinished,
            clock=self.clock,
        )

    def close(self) -> None:
        self.records.close()

    def adapter(self, name: str = "adapter", content: bytes = b"weights") -> Path:
        """A directory with the two files of an adapter."""
        directory = self.home / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text("{}")
        (directory / "adapter_model.safetensors").write_bytes(content)
        return directory

    def job(self, job_id: str = "job", user: str = "ann", **fields: Any) -> str:
        """A completed training job of `user`, with an adapter."""
        document = {
            "user_id": user,
            "status": "completed",
            "base_model_id": "google/gemma-3-1b-it",
            "adapter_path": str(self.adapter(f"adapter-{job_id}")),
            **fields,
        }
        assert self.records.put_job(job_id, document)
        return job_id

    def submit(self, job_id: str = "job", user: str = "ann", **fields: Any) -> ExportRecord:
        document = {"job_id": job_id, "export_type": "merged", **fields}
        return self.service.submit(ExportRequest.model_validate(document), user)

    def record(self, export_id: str = "job.merged") -> ExportRecord:
        record = self.records.get_export(export_id)
        assert record is not None
        return record

    def launched(self, job_id: str = "job") -> ExportRecord:
        """An export that was submitted and has an execution."""
        record = self.submit(job_id)
        self.queue.deliver_all(self.trigger)
        return self.record(record.export_id)

    def claim(self, export_id: str = "job.merged", *, seconds: int = 120, execution: str | None = None) -> ExportRecord:
        """What the exporter does first."""

        def change(record: ExportRecord) -> ExportRecord:
            owner = execution or record.execution or "by-hand"
            lease = Lease(lease_id="exporter", owner=owner, expires_at=self.clock() + timedelta(seconds=seconds))
            handed = record.lease.lease_id if record.lease else None
            return lifecycle.transition(
                record, State.RUNNING, by=Actor.EXPORTER, now=self.clock(), lease=lease, holding=handed, execution=owner
            )

        return update(self.records, export_id, change)

    def give_back(self, export_id: str = "job.merged") -> ExportRecord:
        """What the exporter does on SIGTERM."""

        def change(record: ExportRecord) -> ExportRecord:
            return lifecycle.transition(record, State.QUEUED, by=Actor.EXPORTER, holding="exporter", now=self.clock())

        return update(self.records, export_id, change)

    def complete(self, export_id: str = "job.merged") -> ExportRecord:
        """What the exporter does last."""
        found = self.record(export_id)
        version = found.force_nonce or "v1"
        is_gguf = found.export_type is ExportType.GGUF
        directory = f"{'gguf_models' if is_gguf else 'merged_models'}/{export_id}/{version}"
        file = f"model-{str(found.quantization).upper()}.gguf" if is_gguf else "model.safetensors"
        manifest = {"files": [{"name": file, "bytes": 7, "crc32c": "AAAAAA=="}]}
        for name, content in ((file, b"weights"), ("export.json", json.dumps(manifest).encode())):
            writer = self.artifacts.create(f"{directory}/{name}")
            writer.write(content)
            writer.commit()
        artifact = Artifact(
            kind=found.export_type,
            uri=self.artifacts.uri(directory),
            file=self.artifacts.uri(f"{directory}/{file}") if is_gguf else None,
            version=version,
            bytes=7,
            files=1,
            manifest=self.artifacts.uri(f"{directory}/export.json"),
        )

        def change(record: ExportRecord) -> ExportRecord:
            return lifecycle.completed(record, holding="exporter", artifacts=(artifact,), now=self.clock())

        return update(self.records, export_id, change)

    def fail(self, export_id: str = "job.merged", *, retryable: bool = False) -> ExportRecord:
        """The exporter's other ending."""
        error = Failure(code="adapter_mismatch", message="does not fit", retryable=retryable)

        def change(record: ExportRecord) -> ExportRecord:
            return lifecycle.failed(record, by=Actor.EXPORTER, error=error, now=self.clock(), holding="exporter")

        return update(self.records, export_id, change)
