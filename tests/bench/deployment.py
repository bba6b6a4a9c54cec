"""A deployment between a hub and a bucket on this machine: records, and the exporter started as Cloud Run starts it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client

from dispatcher.contract import ExportRecord
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.tokens import FileTokens
from infra.local.cloud_run import IMAGE_VARIABLES
from tests.exporter.exporting import merged_record, training_document

MODEL_ID = "google/tiny"
BUCKET = "bench-bucket"
ADAPTER = "adapters/1"
REPOSITORY = Path(__file__).parents[2]
MANIFEST = "export.json"


class Deployment:
    """Training jobs of one adapter, their exports' records, and a bucket.

    Args:
        root: Where records, tokens, logs and the tasks' disks are.
        hub_url: Where the base is, as `google/tiny`.
        storage_url: Where the bucket `BUCKET` is.
        adapter: A directory; copied into the bucket.
        settings: Further variables of every task.
    """

    def __init__(
        self, root: Path, hub_url: str, storage_url: str, adapter: Path, settings: Mapping[str, str] | None = None
    ) -> None:
        self.logs, self.disks = root / "logs", root / "disks"
        for directory in (self.logs, self.disks):
            directory.mkdir(parents=True, exist_ok=True)
        self.records = SqliteRecords(root / "records.db")
        self.tokens = FileTokens(root / "tokens")
        self.storage_url = storage_url
        self._bucket = Client("local", AnonymousCredentials(), client_options={"api_endpoint": storage_url}).bucket(
            BUCKET
        )
        for file in adapter.iterdir():
            self._bucket.blob(f"{ADAPTER}/{file.name}").upload_from_filename(file)
        self._variables = {
            **{name: os.environ[name] for name in IMAGE_VARIABLES if name in os.environ},
            "PYTHONPATH": str(REPOSITORY),
            "STORAGE_EMULATOR_HOST": storage_url,
            "HF_ENDPOINT": hub_url,
            "HF_HUB_DISABLE_XET": "1",
            "GEMMA_EXPORT_HOME": str(root),
            "RECORDS_URL": f"sqlite://{root / 'records.db'}",
            "TOKENS_URL": (root / "tokens").as_uri(),
            "ARTIFACTS_URL": f"gs://{BUCKET}",
            **(settings or {}),
        }

    def submit(self, job_id: str, token: str | None = None) -> None:
        """Record a completed training job and a request for its merged model, with a token for the hub."""
        export_id = f"{job_id}.merged"
        assert self.records.put_job(job_id, training_document(MODEL_ID, f"gs://{BUCKET}/{ADAPTER}"))
        token_ref = self.tokens.put(export_id, token) if token else None
        assert self.records.create_export(merged_record(job_id=job_id, export_id=export_id, token_ref=token_ref))

    def record(self, job_id: str) -> ExportRecord:
        found = self.records.get_export(f"{job_id}.merged")
        assert found is not None
        return found

    def command(self, job_id: str) -> list[str]:
        """What a task runs."""
        return [sys.executable, "-m", "exporter", job_id]

    def environment(
        self,
        job_id: str,
        *,
        attempt: int = 0,
        index: int = 0,
        count: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """All variables of a task, whose disk is `disk` of the same arguments."""
        disk = self.disk(job_id, attempt, index)
        places = {"HOME": disk / "home", "TMPDIR": disk / "tmp", "HF_HOME": disk / "hf"}
        for place in places.values():
            place.mkdir(parents=True)
        return {
            **self._variables,
            **{name: str(place) for name, place in places.items()},
            "CLOUD_RUN_EXECUTION": f"execution-of-{job_id}",
            "CLOUD_RUN_TASK_INDEX": str(index),
            "CLOUD_RUN_TASK_COUNT": str(count),
            "CLOUD_RUN_TASK_ATTEMPT": str(attempt),
            **(settings or {}),
        }

    def disk(self, job_id: str, attempt: int = 0, index: int = 0) -> Path:
        """Where a task's own files are."""
        return self.disks / f"{job_id}-{index}-{attempt}"

    def start(self, job_id: str, *, attempt: int = 0, index: int = 0, count: int = 1) -> subprocess.Popen[bytes]:
        """Start a task; what it prints goes to a file in `logs`."""
        environment = self.environment(job_id, attempt=attempt, index=index, count=count)
        with (self.logs / f"{job_id}-{index}-{attempt}.log").open("wb") as log:
            return subprocess.Popen(self.command(job_id), env=environment, stdout=log, stderr=log)

    def said(self, job_id: str, *, attempt: int = 0, index: int = 0) -> str:
        """What a task printed."""
        return (self.logs / f"{job_id}-{index}-{attempt}.log").read_text()

    def objects(self, prefix: str = "") -> dict[str, int]:
        """What is in the bucket: names without the prefix, and bytes."""
        return {blob.name.removeprefix(prefix): int(blob.size) for blob in self._bucket.list_blobs(prefix=prefix)}

    def artifact(self, job_id: str) -> dict[str, str]:
        """A merged model: of each file size and CRC-32C, as the bucket tells; of the manifest all but its `run`."""
        prefix = f"merged_models/{job_id}/"
        found = {}
        for blob in self._bucket.list_blobs(prefix=prefix):
            version, _, name = blob.name.removeprefix(prefix).partition("/")
            found[f"{version}/{name}"] = f"{blob.size} bytes, {blob.crc32c}"
            if name == MANIFEST:
                manifest = json.loads(blob.download_as_bytes())
                del manifest["run"]
                found[f"{version}/{name}"] = json.dumps(manifest, sort_keys=True)
        return found

    def delete(self, prefix: str) -> None:
        for blob in self._bucket.list_blobs(prefix=prefix):
            blob.delete()
