"""A laptop's state directory in which exporters come to grief: jobs, their exports, and what is left of them."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dispatcher.bootstrap import build
from dispatcher.contract import (
    DEFAULT_QUANTIZATION,
    RESULT_FIELD,
    ExportRecord,
    ExportType,
    State,
    export_id_of,
)
from dispatcher.crc32c import Crc32c
from dispatcher.lifecycle import Actor, transition
from dispatcher.published import ROOTS
from dispatcher.records import update
from dispatcher.settings import Settings
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.tokens import FileTokens
from infra.local.cloud_run import IMAGE_VARIABLES
from infra.local.hub_state import TOKEN
from tests.bench.inputs import Size
from tests.chaos.forked import Exporter
from tests.chaos.steps import Then
from tests.exporter.exporting import merged_record, training_document

MODEL = Size("six shards", 6, 512, 2048, 2, 1, 320, shard_bytes=8 << 20, rank=8)
"""48 MB in six shards, each a layer: large enough that a signal meets it half-written"""
SMALL_MODEL = Size("three shards", 3, 256, 512, 1, 1, 320, shard_bytes=1 << 20, rank=4)
MANIFEST = "export.json"
LIMIT_SECONDS = 120.0
"""What no exporter takes, unless it hangs"""
Artifact = dict[str, tuple[int, str]]
"""Of each file, by its name: bytes and CRC-32C; of the manifest all but its `run`, which says how long it took"""


class Laptop:
    """A state directory, and exporters on it as the embedded runner starts them.

    Args:
        root: Where everything is: records, artifacts, tokens, temporary files, logs.
        base: The base model's directory.
        adapter: The adapter's.
        settings: Further variables of every exporter.
    """

    def __init__(self, root: Path, base: Path, adapter: Path, settings: Mapping[str, str] | None = None) -> None:
        self.home, self.temporary, self.logs = root / "home", root / "tmp", root / "logs"
        for directory in (self.temporary, self.logs):
            directory.mkdir(parents=True)
        self.artifacts = self.home / "artifacts"
        self.records = SqliteRecords(self.home / "records.db")
        self.tokens = FileTokens(self.home / "tokens")
        self._document = training_document(base, adapter)
        self._environment = {
            **{name: os.environ[name] for name in IMAGE_VARIABLES if name in os.environ},
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "HOME": str(root),
            "TMPDIR": str(self.temporary),
            "HF_HUB_OFFLINE": "1",
            "GEMMA_EXPORT_HOME": str(self.home),
            **(settings or {}),
        }

    def submit(self, job_id: str, kinds: Sequence[ExportType] = (ExportType.GGUF, ExportType.MERGED)) -> None:
        """Record a completed training job and a request for each of these, with a token for the hub."""
        assert self.records.put_job(job_id, self._document)
        for kind in kinds:
            export_id = export_id_of(job_id, kind, None)
            quantization = DEFAULT_QUANTIZATION if kind is ExportType.GGUF else None
            ref = self.tokens.put(export_id, TOKEN)
            facts = {"job_id": job_id, "export_id": export_id, "export_type": kind, "quantization": quantization}
            assert self.records.create_export(merged_record(**facts, token_ref=ref))

    def environment(self, execution: str, attempt: int = 0) -> dict[str, str]:
        """All variables of an exporter."""
        return {
            **self._environment,
            "CLOUD_RUN_EXECUTION": execution,
            "CLOUD_RUN_TASK_ATTEMPT": str(attempt),
        }

    def start(
        self,
        job_id: str,
        *options: str,
        execution: str,
        attempt: int = 0,
        then: Sequence[Then] = (),
        clock_seconds: float = 0.0,
    ) -> Exporter:
        """Start an attempt of an execution; arguments as of `Exporter`."""
        log = self.logs / f"{job_id}-{execution}-{attempt}.log"
        environment = self.environment(execution, attempt)
        return Exporter([job_id, *options], environment, log, then=then, clock_seconds=clock_seconds)

    def start_python(self, job_id: str, *, execution: str, attempt: int = 0) -> subprocess.Popen[bytes]:
        """As `start`, but with nothing imported yet: `python -m exporter`, as the platform starts it."""
        with (self.logs / f"{job_id}-{execution}-{attempt}.log").open("ab") as log:
            command = [sys.executable, "-m", "exporter", job_id]
            return subprocess.Popen(command, env=self.environment(execution, attempt), stdout=log, stderr=log)

    def run(
        self, job_id: str, *options: str, execution: str, attempt: int = 0, clock_seconds: float = 0.0
    ) -> int | None:
        """An exporter from beginning to end: its exit status, or None where it hangs."""
        exporter = self.start(job_id, *options, execution=execution, attempt=attempt, clock_seconds=clock_seconds)
        status = exporter.wait(LIMIT_SECONDS)
        exporter.kill()
        return status

    def record(self, export_id: str) -> ExportRecord:
        found = self.records.get_export(export_id)
        assert found is not None, export_id
        return found

    def exports(self, job_id: str) -> list[ExportRecord]:
        """The records of a job's exports."""
        return self.records.list_exports(job_id=job_id)

    def document(self, job_id: str) -> dict[str, Any]:
        """The training job's document, as it is stored."""
        with closing(sqlite3.connect(self.home / "records.db")) as connection:
            query = "SELECT document FROM training_jobs WHERE job_id = ?"
            document: dict[str, Any] = json.loads(connection.execute(query, (job_id,)).fetchone()[0])
        return document

    def is_locked(self) -> bool:
        """Whether somebody is writing to the records, and does not come to the end of it."""
        with closing(sqlite3.connect(self.home / "records.db", timeout=1.0, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            except sqlite3.OperationalError:
                return True
        return False

    def cancel(self, export_id: str) -> None:
        """As its owner does."""
        stack = build(Settings.from_env(self._environment))
        try:
            stack.service.cancel(export_id, "ann")
        finally:
            stack.close()

    def ask_again(self, export_id: str) -> None:
        """As its owner does, after it was cancelled."""
        now = datetime.now(UTC)
        update(self.records, export_id, lambda found: transition(found, State.QUEUED, by=Actor.CALLER, now=now))

    def artifact(self, job_id: str, kind: ExportType) -> Artifact:
        """What is published and what is not, under the job's folder of this type: by path below it."""
        top = self.artifacts / ROOTS[kind] / job_id
        return {str(path.relative_to(top)): _facts(path) for path in sorted(top.rglob("*")) if path.is_file()}

    def faults(self, record: ExportRecord, wanted: Artifact) -> list[str]:
        """In what a job's export is not as if it had been made undisturbed: in words, empty where all is well."""
        name, kind = record.export_id, record.export_type
        if record.state is not State.COMPLETED or record.lease or record.token_ref or record.error:
            return [f"{name} is {record.state}, lease {record.lease}, {record.error}"]
        found = []
        made = self.artifact(record.job_id, kind)
        if made != wanted:
            names = sorted(file for file in made.keys() | wanted.keys() if made.get(file) != wanted.get(file))
            found.append(f"{name} differs from the undisturbed one in {names[:5]}")
        (artifact,) = record.artifacts
        if artifact.uri != (self.artifacts / ROOTS[kind] / record.job_id / artifact.version).as_uri():
            found.append(f"{name} says that its artifact is {artifact.uri}")
        told = self.document(record.job_id).get(RESULT_FIELD[kind])
        if told != artifact.path:
            found.append(f"the training job says that {name} is {told}")
        return found

    def leftovers(self) -> list[str]:
        """What lies about that is no artifact's, no record's and no log's."""
        files = [path for path in self.artifacts.rglob("*") if is_leftover(path)]
        files += (self.home / "tokens").glob("*")
        # torch keeps a cache there, one for all processes.
        files += [path for path in self.temporary.iterdir() if not path.name.startswith("torchinductor_")]
        return sorted(str(path.relative_to(self.home.parent)) for path in files)

    def orphans(self, *, seconds: float = 3.0) -> list[str]:
        """Processes that go on, after so many seconds, at what an exporter that is gone had in a temporary place."""
        last = time.monotonic() + seconds
        while (found := self._processes()) and time.monotonic() < last:
            time.sleep(0.05)
        return found

    def clear(self) -> None:
        """Remove artifacts, and whatever is left over."""
        for directory in (self.artifacts, self.home / "tokens", self.temporary):
            shutil.rmtree(directory, ignore_errors=True)
        self.temporary.mkdir()

    def _processes(self) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(self.temporary) in text:
                    found.append(text)
        return found


def undisturbed(laptop: Laptop) -> dict[ExportType, Artifact]:
    """What is made where nothing happens; the first call in a process waits for the libraries to be imported.

    Raises:
        RuntimeError: It does not succeed, or leaves something over.
    """
    laptop.submit("undisturbed")
    status = laptop.run("undisturbed", execution="undisturbed")
    made = {
        record.export_type: laptop.artifact("undisturbed", record.export_type)
        for record in laptop.exports("undisturbed")
    }
    faults = [
        fault for record in laptop.exports("undisturbed") for fault in laptop.faults(record, made[record.export_type])
    ]
    if status != 0 or faults or laptop.leftovers():
        raise RuntimeError(f"undisturbed, it ends with {status}: {faults}, {laptop.leftovers()}")
    laptop.clear()
    return made


def is_leftover(path: Path) -> bool:
    """Whether a path among artifacts is of a file that is half-written, or of what attempts hand to each other."""
    return path.name.endswith(".partial") or any(part.endswith(".parts") for part in path.parts)


def _facts(path: Path) -> tuple[int, str]:
    content = path.read_bytes()
    if path.name == MANIFEST:
        manifest: dict[str, Any] = json.loads(content)
        del manifest["run"]
        content = json.dumps(manifest, sort_keys=True).encode()
    crc = Crc32c()
    crc.update(content)
    return len(content), crc.text
