"""What the engines have in common: what they are given, what they give back, and the last check of their output."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.artifacts import StoredFile
from exporter.adapter import WEIGHTS_NAME
from exporter.attempt import Attempt
from exporter.checkpoint import Checkpoint, read_tensor_file
from exporter.sources import Base, files_here

MEMORY_BUDGET = 512 << 20
"""Bytes, where nothing else is said"""
WRITE_FROM, WRITE_TO = 0.05, 0.9
"""The part of the progress bar that writing weights takes."""


@dataclass(frozen=True)
class Made:
    """What an engine wrote, and what holds of it."""

    files: list[StoredFile]
    tensors: dict[str, Any]
    verified: dict[str, Any]
    config: dict[str, Any]
    """The output's config.json"""
    logits: dict[str, Any] | None = None
    """How the logits compare, or why they were not compared; it depends on the machine, and so is no part of what is
    the same for every run"""
    has_template: bool = False
    """Of a GGUF: whether it carries a chat template"""


@dataclass(frozen=True)
class Checks:
    """How much is verified."""

    logits: bool = True
    """Whether logits are compared, where the memory allows"""
    memory_budget: int = MEMORY_BUDGET
    """Bytes that whole models may take for that"""


def checked_logits(
    attempt: Attempt,
    files: list[StoredFile],
    base: Base,
    checkpoint: Checkpoint,
    adapter_dir: Path,
    config: dict[str, Any],
    checks: Checks,
) -> dict[str, Any]:
    """Compare the logits of what was written with those of base and adapter, or say why that was not done.

    Args:
        attempt: Where the output is.
        files: What was written of it: weights, index, config.json.
        base: The base model.
        checkpoint: Its headers.
        adapter_dir: The adapter's directory.
        config: The output's config.json.
        checks: Whether, and within which memory.

    Raises:
        VerificationFailed: `logits_differ`.
    """
    # It brings in transformers and PEFT, which most exports do without.
    from exporter.logits import compare_logits, memory_needed

    if not checks.logits:
        return {"compared": False, "why": "switched off (VERIFY_LOGITS)"}
    adapter = read_tensor_file(adapter_dir / WEIGHTS_NAME)
    if (needed := memory_needed(checkpoint, adapter)) > checks.memory_budget:
        found = f"{needed >> 20} MiB of models, MEMORY_BUDGET_MIB is {checks.memory_budget >> 20}"
        return {"compared": False, "why": f"too large: {found}"}
    with files_here(attempt.store, attempt.store.uri(attempt.directory), files) as merged:
        return compare_logits(base.here().directory, adapter_dir, merged, base.config, config, adapter)
