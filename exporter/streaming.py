"""The streaming engine from end to end: plan, fold, verify, account for everything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dispatcher.artifacts import ArtifactWriter, StoredFile
from exporter import merge
from exporter.adapter import Adapter, read_adapter, refuse_not_finite
from exporter.attempt import Attempt
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.gemma import Family, family_of
from exporter.lease import Report
from exporter.ledger import LEDGER_NAME, encoded, ledger_of, refuse_unchanged
from exporter.lora import Delta
from exporter.making import WRITE_FROM, WRITE_TO, Checks, Made, checked_logits
from exporter.model_config import merged_config
from exporter.plan import OutputFile, Plan, plan_merge
from exporter.sidefiles import side_files, write_model_files, write_side_files
from exporter.sources import Base
from exporter.verify import verify_merged
from exporter.vocabulary import refuse_vocabulary_that_differs


def version() -> str:
    """What decides this engine's bytes, besides base and adapter."""
    return f"{merge.VERSION}+torch-{torch.__version__}"


def planned(base: Base, checkpoint: Checkpoint, adapter_dir: Path) -> tuple[Plan, Adapter, Family, dict[str, Any]]:
    """The plan of a merge, what it was made from, and the output's config.json; nothing is written.

    Raises:
        ExportError: As `read_adapter`, `plan_merge` and `refuse_vocabulary_that_differs`.
    """
    adapter = read_adapter(adapter_dir)
    family = family_of(base.config)
    plan = plan_merge(checkpoint, adapter, family, base.config)
    config = merged_config(base.config, plan)
    refuse_vocabulary_that_differs(plan.vocabulary, config, side_files(base.directory, adapter_dir))
    return plan, adapter, family, config


def stream(attempt: Attempt, base: Base, adapter_dir: Path, report: Report, checks: Checks) -> Made:
    """Merge block by block into an artifact's directory.

    Raises:
        ExportError: As `planned`, or a failed check.
    """
    checkpoint = open_checkpoint(base.directory)
    plan, adapter, family, config = planned(base, checkpoint, adapter_dir)
    refuse_not_finite(adapter.file)
    files, deltas = _write_shards(attempt, plan, adapter, report)
    refuse_unchanged(deltas)
    files += write_model_files(attempt, base, config, plan.index)
    files += write_side_files(attempt, base.directory, adapter_dir)
    report("verifying", WRITE_TO)
    verified = verify_merged(attempt.store, attempt.directory, plan, adapter, files)
    logits = checked_logits(attempt, files, base, checkpoint, adapter_dir, config, checks)
    ledger = ledger_of(plan, adapter, family, deltas)
    files.append(attempt.publish(LEDGER_NAME, lambda writer: writer.write(encoded(ledger))))
    tensors: dict[str, Any] = {operation: plan.count(operation) for operation in Plan.operations}
    tensors |= {"bytes": plan.nbytes, "towers": ledger["towers"]}
    if plan.tower:
        tensors["mapped_to_tower"] = plan.tower
    if plan.untied:
        tensors["untied"] = True
    return Made(files, tensors, verified, config, logits)


def _write_shards(
    attempt: Attempt, plan: Plan, adapter: Adapter, report: Report
) -> tuple[list[StoredFile], dict[str, Delta]]:
    torch.set_num_threads(1)  # the workers are the threads
    done = 0
    deltas: dict[str, Delta] = {}

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        report("merging", WRITE_FROM + (WRITE_TO - WRITE_FROM) * done / max(1, plan.nbytes))

    stored = [
        attempt.publish(file.name, _filled(file, adapter, deltas, on_bytes), size=file.size) for file in plan.files
    ]
    return stored, deltas


def _filled(
    file: OutputFile, adapter: Adapter, deltas: dict[str, Delta], on_bytes: merge.OnBytes
) -> Callable[[ArtifactWriter], None]:
    def fill(writer: ArtifactWriter) -> None:
        deltas.update(merge.write_merged(file, adapter, writer, on_bytes))

    return fill
