"""Runs the recipes of a merged model and of a GGUF in this process, on real directories."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactStore, path_of
from dispatcher.contract import ExportRecord, ExportType, State, TrainingJob
from dispatcher.local_artifacts import LocalArtifacts
from exporter.artifact import Result
from exporter.gguf_export import export_gguf
from exporter.gguf_file import PART_WEIGHTS
from exporter.lease import Hold
from exporter.making import Checks
from exporter.merged import export_merged
from exporter.shared_pass import Share, SharedPass
from exporter.tasks import Tasks

QUICK = Checks(logits=False)
"""Without the logits, which take a whole model or two; they have tests of their own."""
ONE = Tasks()
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Undisturbed:
    """A hold on an export that nobody contends for."""

    def report(self, stage: str, progress: float) -> None:
        pass

    def check(self) -> None:
        pass

    def agree(self, version: str, *, instead_of: str | None = None) -> None:
        pass

    def cleared_by(self, clear: Callable[[], object]) -> None:
        pass

    def is_ours(self) -> bool:
        return True

    def is_cancelled(self) -> bool:
        return False


def training_document(base: Path | str, adapter: Path | str) -> dict[str, Any]:
    """The document of a completed training job of user `ann`."""
    return {"user_id": "ann", "status": "completed", "base_model_id": str(base), "adapter_path": str(adapter)}


def training_job(base: Path | str, adapter: Path | str, **document: Any) -> TrainingJob:
    """The job of `training_document`, with further fields."""
    return TrainingJob.from_document("job-1", {**training_document(base, adapter), **document})


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
    artifacts = LocalArtifacts(store) if isinstance(store, Path) else store
    result = export_part(base, adapter, artifacts, Tasks(), engine=engine, checks=checks, **document)
    assert result is not None
    return result


def export_part(
    base: Path | str,
    adapter: Path | str,
    store: ArtifactStore,
    tasks: Tasks,
    *,
    engine: str = "streaming",
    checks: Checks = QUICK,
    hold: Hold | None = None,
    **document: Any,
) -> Result | None:
    """As `export`, what one of several tasks does; None where others are still at theirs."""
    return export_merged(
        store,
        training_job(base, adapter, **document),
        merged_record(),
        engine=engine,
        token=lambda: None,
        hold=hold or Undisturbed(),
        checks=checks,
        tasks=tasks,
        base_cache=True,
    )


def gguf_record(quantization: str, **fields: object) -> ExportRecord:
    """The record of `job-1.gguf.{quantization}`, queued."""
    export_id = f"job-1.gguf.{quantization}"
    return merged_record(export_id=export_id, export_type=ExportType.GGUF, quantization=quantization, **fields)


def gguf_of(
    store: ArtifactStore,
    job: TrainingJob,
    quantization: str,
    *,
    tasks: Tasks = ONE,
    part_weights: int = PART_WEIGHTS,
    shared: SharedPass | None = None,
    engine: str = "auto",
    hold: Hold | None = None,
    base_cache: bool = True,
) -> Result | None:
    """Do one task's part of a GGUF export; arguments, result and errors as of `export_gguf`."""
    share = Share(shared)
    try:
        return export_gguf(
            store,
            job,
            gguf_record(quantization),
            engine=engine,
            token=lambda: None,
            hold=hold or Undisturbed(),
            checks=QUICK,
            share=share,
            tasks=tasks,
            base_cache=base_cache,
            part_weights=part_weights,
        )
    finally:
        share.leave()


def export_gguf_of(
    base: Path | str,
    adapter: Path | str,
    store: Path | ArtifactStore,
    quantizations: Sequence[str] = ("q8_0",),
    *,
    engine: str = "auto",
    shared: SharedPass | None = None,
    **document: Any,
) -> list[Result]:
    """Export base + adapter as GGUF, in all quantizations at once, as a job does; arguments as of `export`.

    Args:
        shared: The pass that they share; by default one of just these.

    Raises:
        ExportError: As `export_gguf`, of the first that failed, when all have ended.
    """
    shared = shared or SharedPass(len(quantizations))
    artifacts = LocalArtifacts(store) if isinstance(store, Path) else store
    job = training_job(base, adapter, **document)

    def run(quantization: str) -> Result:
        result = gguf_of(artifacts, job, quantization, engine=engine, shared=shared)
        assert result is not None
        return result

    with ThreadPoolExecutor(len(quantizations)) as pool:
        return list(pool.map(run, quantizations))


def file_of(result: Result) -> Path:
    """The GGUF of a finished export in a directory."""
    assert result.artifact.file is not None
    return path_of(result.artifact.file)


def merged_into(base: Path | str, adapter: Path, store: Path, *, engine: str = "streaming", **document: Any) -> Path:
    """As `export`; the directory of the merged model."""
    return path_of(export(base, adapter, store, engine=engine, **document).artifact.uri)
