"""`python -m exporter --inspect`: what an export would do, told from headers, with nothing written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dispatcher.contract import TrainingJob
from dispatcher.errors import ExportError, SourceError, Unsupported
from exporter import merge
from exporter.architecture import fitting_config
from exporter.bases import base_for
from exporter.full_model import is_full_model
from exporter.ledger import ledger_of
from exporter.peft_config import read_config
from exporter.plan import Plan
from exporter.sources import TokenSource, open_streamed
from exporter.streaming import planned


def inspect(adapter_dir: Path, base_id: str | None, token: TokenSource) -> dict[str, Any]:
    """What exporting an adapter merged into a base would do, or why the streaming engine refuses it.

    Args:
        adapter_dir: A PEFT adapter's directory.
        base_id: A directory or a hub id, optionally `@revision`; None is what the adapter's config names.
        token: Gives a Hugging Face token for a gated base.

    Returns:
        `outcome` is `merged` (with the counts, bytes, memory and the use of every adapter tensor), `passthrough` (it is
        a whole model), `reference_engine` (the streaming engine does not support it), or `refused`; with the error's
        `code` and `message`.
    """
    report: dict[str, Any] = {"adapter": str(adapter_dir), "base": base_id}
    try:
        if adapter_dir.is_dir() and is_full_model([path.name for path in adapter_dir.iterdir()]):
            return {**report, "outcome": "passthrough"}
        config = read_config(adapter_dir)
        report |= {"peft_type": config.get("peft_type"), "base": base_id or config.get("base_model_name_or_path")}
        if not isinstance(report["base"], str) or not report["base"]:
            raise SourceError("the adapter's config names no base: name one with --base.", code="base_missing")
        revision = config.get("revision") if base_id is None else None
        base = base_for(_job(report["base"], revision, adapter_dir), config, token, opener=open_streamed)
        checkpoint = base.checkpoint()
        base = replace(base, config=fitting_config(base.config, checkpoint.tensors()))
        plan, adapter, family, _ = planned(base, checkpoint, adapter_dir)
        ledger = ledger_of(plan, adapter, family, {})
    except Unsupported as error:
        return {**report, "outcome": "reference_engine", "code": error.error_code, "message": error.message}
    except ExportError as error:
        return {**report, "outcome": "refused", "code": error.error_code, "message": error.message}
    return {
        **report,
        "base": base.model_id,
        "base_revision": base.revision,
        "outcome": "merged",
        "tensors": {operation: plan.count(operation) for operation in Plan.operations},
        "towers": ledger["towers"],
        "mapped_to_tower": plan.tower,
        "untied": plan.untied,
        "vocabulary": plan.vocabulary,
        "bytes": plan.nbytes,
        "memory_bytes": merge.memory_needed(plan),
        "adapter_tensors": ledger["adapter"],
    }


def _job(base: str, pinned: object, adapter_dir: Path) -> TrainingJob:
    model_id, _, revision = base.partition("@") if not Path(base).exists() else (base, "", "")
    revision = revision or (pinned if isinstance(pinned, str) else "")
    return TrainingJob(
        job_id="inspect",
        user_id="inspect",
        status="completed",
        base_model_id=model_id,
        base_model_revision=revision or None,
        adapter_path=str(adapter_dir),
    )
