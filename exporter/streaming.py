"""The streaming engine from end to end: plan, fold, verify, account for everything."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exporter import merge
from exporter.adapter import Adapter, read_adapter, refuse_not_finite
from exporter.attempt import Attempt
from exporter.checkpoint import Checkpoint
from exporter.gemma import Family, family_of
from exporter.lease import Report
from exporter.ledger import LEDGER_NAME, encoded, ledger_of, refuse_unchanged
from exporter.making import WRITE_TO, Checks, Made, checked_logits
from exporter.model_config import merged_config
from exporter.parts import Part, Parts
from exporter.pipeline import worker_count
from exporter.plan import OutputFile, Plan, plan_merge
from exporter.side_by_side import TRANSFER_BYTES, Progress, side_by_side
from exporter.sidefiles import side_files, write_model_files, write_side_files
from exporter.sources import Base
from exporter.tasks import Tasks
from exporter.verify import verify_merged
from exporter.vocabulary import refuse_vocabulary_that_differs

log = logging.getLogger(__name__)


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


def stream(
    attempt: Attempt, base: Base, adapter_dir: Path, report: Report, checks: Checks, tasks: Tasks
) -> Made | None:
    """Merge block by block into an artifact's directory.

    Args:
        attempt: Where to.
        base: The base model.
        adapter_dir: The adapter's directory.
        report: Told of stage and fraction; what it raises stops the work.
        checks: How much is verified, and within which memory.
        tasks: Which of the files are this task's.

    Returns:
        What was made, by whomever; None where others are still at theirs.

    Raises:
        ExportError: As `planned`, or a failed check.
    """
    checkpoint = base.checkpoint()
    plan, adapter, family, config = planned(base, checkpoint, adapter_dir)
    refuse_not_finite(adapter.file)
    parts = _written(attempt, plan, adapter, report, checks.memory_budget, tasks)
    if parts is None:
        return None
    files = [part.file for part in parts]
    deltas = {name: delta for part in parts for name, delta in part.deltas.items()}
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


def _written(
    attempt: Attempt, plan: Plan, adapter: Adapter, report: Report, budget: int, tasks: Tasks
) -> list[Part] | None:
    """The weight files, this task's written now unless they are finished; None while some of the others' are not."""
    torch.set_num_threads(1)  # the workers are the threads
    parts = Parts(attempt, attempt.directory)
    sizes = {file.name: file.size for file in plan.files}
    found = parts.finished(sizes)
    if found:
        log.info("going on from %d of %d files that are finished", len(found), len(sizes))
    mine = [file for file in tasks.deal(plan.files, [*sizes.values()]) if file.name not in found]
    progress = Progress(report, "merging", plan.nbytes, sum(sizes[name] for name in found))

    def write(file: OutputFile) -> Part:
        with progress.watching():
            fill = partial(merge.write_merged, file, adapter, on_bytes=progress.add)
            return parts.write(file.name, fill, file.size)

    lane = merge.memory_needed(plan) + TRANSFER_BYTES
    made = side_by_side(write, mine, min(worker_count(), budget // lane))
    found |= {part.file.name: part for part in made}
    if tasks.count > 1:
        found |= parts.finished(sizes)
    if len(found) < len(sizes):
        return None
    return [found[file.name] for file in plan.files]
