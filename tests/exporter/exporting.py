"""Runs the recipe of a merged model in this process, on real directories."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactStore, path_of
from dispatcher.contract import ExportRecord, ExportType, State, TrainingJob
from dispatcher.local_artifacts import LocalArtifacts
from exporter.artifact import Result
from exporter.making import Checks
from exporter.merged import export_merged

QUICK = Checks(logits=False)
"""Without the logits, which take a whole model or two; they have tests of their own."""
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Undisturbed:
    """A hold on an export that nobody contends for."""

    def report(self, stage: str, progress: float) -> None:
        pass

    def is_ours(self) -> bool:
        return True


def training_document(base: Path | str, adapter: Path | str) -> dict[str, Any]:
    """The document of a completed training job of user `ann`."""
    return {"user_id": "ann", "status": "completed", "base_model_id": str(base), "adapter_path": str(adapter)}


def merged_record(**fields: object) -> ExportRecord:
    """The record of `job-1.merged`, queued."""
    return ExportRecord.model_validate(
        {
            "export_id": "job-1.merged",
            "job_id": "job-1",
            "user_id": "ann",
            "export_type": ExportType.MERGED,
            "state": State.QUEUED,
            "adapter_fingerprint": "unknown",
            "created_at": NOW,
            "updated_at": NOW,
            **fields,
        }
    )


def export(
    base: Path | str,
    adapter: Path | str,
    store: Path | ArtifactStore,
    *,
    engine: str = "streaming",
    checks: Checks = QUICK,
    **document: Any,
) -> Result:
    """Export base + adapter into an artifact store, or into the one in a directory.

    Args:
        base: The training job's `base_model_id`.
        adapter: Where its adapter lies.
        store: Where to.
        engine: Which engine.
        checks: How much is verified.
        document: Further fields of the training job's document.

    Raises:
        ExportError: As `export_merged`.
    """
    return export_merged(
        LocalArtifacts(store) if isinstance(store, Path) else store,
        TrainingJob.from_document("job-1", {**training_document(base, adapter), **document}),
        merged_record(),
        engine=engine,
        token=lambda: None,
        hold=Undisturbed(),
        checks=checks,
    )


def merged_into(base: Path | str, adapter: Path, store: Path, *, engine: str = "streaming", **document: Any) -> Path:
    """As `export`; the directory of the merged model."""
    return path_of(export(base, adapter, store, engine=engine, **document).artifact.uri)
