"""The reference engine: PEFT's own `merge_and_unload`, on the whole model in memory.

Kept to compare with, and as the way out (`--engine peft`) for what the streaming engine refuses as unsupported.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dispatcher.errors import AdapterMismatch, SourceError, Unsupported
from dispatcher.logs import clean
from exporter.adapter import WEIGHTS_NAME, refuse_not_finite
from exporter.attempt import Attempt
from exporter.checkpoint import Checkpoint, TensorFile, read_tensor_file
from exporter.documents import read_json_object
from exporter.gemma import family_of
from exporter.lease import Report
from exporter.making import WRITE_FROM, WRITE_TO, Checks, Made, checked_logits
from exporter.model_card import CARD_NAME
from exporter.models import is_applied_whole, library_errors, load_model, quiet
from exporter.peft_config import read_config, refuse_unmergeable
from exporter.peft_patterns import harmless_config
from exporter.plan import is_tied
from exporter.scratch import scratch_directory
from exporter.sidefiles import publish_copy, write_side_files
from exporter.sources import MAX_CONFIG_BYTES, Base
from exporter.verify import verify_reference

MAX_MESSAGE = 500
DTYPE = torch.bfloat16
"""What the model is loaded and saved in, as the platform did before the streaming engine."""


def peft_version() -> str:
    """What decides this engine's bytes, besides base and adapter."""
    import peft
    import transformers

    return f"peft-{peft.__version__}+transformers-{transformers.__version__}+torch-{torch.__version__}"


def memory_needed(base: Checkpoint) -> int:
    """Bytes that merging takes at its height: the model, a copy of it while it is saved, float32 of the largest."""
    sizes = [math.prod(tensor.shape) for file in base.files for tensor in file.tensors]
    return 2 * DTYPE.itemsize * sum(sizes) + 4 * max(sizes, default=0)


def make(attempt: Attempt, base: Base, adapter_dir: Path, report: Report, checks: Checks) -> Made:
    """Merge in memory and on local disk, then publish.

    Raises:
        ExportError: As `merge_with_peft`, or a failed check.
    """
    return made_by(merge_with_peft, attempt, base, adapter_dir, report, checks)


def made_by(
    merge: Callable[[Base, Path, Path], None],
    attempt: Attempt,
    base: Base,
    adapter_dir: Path,
    report: Report,
    checks: Checks,
) -> Made:
    """Publish what a reference engine writes into a directory of this machine, with the checks that all of them get.

    Args:
        merge: Given base, adapter and an empty directory: `merge_with_peft`, or another of its contract.
        attempt: Where to publish.
        base: The base model.
        adapter_dir: The adapter's directory.
        report: Told of stage and fraction.
        checks: How much is verified.

    Raises:
        ExportError: As `merge`, or a failed check.
    """
    report("merging", WRITE_FROM)
    base = base.here()
    checkpoint = base.checkpoint()
    with scratch_directory() as output:
        merge(base, adapter_dir, output)
        report("verifying", WRITE_FROM)
        verified = verify_reference(output, checkpoint, family_of(base.config))
        files = write_side_files(attempt, base.directory, adapter_dir)
        taken = {CARD_NAME, *(file.name for file in files)}
        for path in sorted(output.iterdir()):
            if path.is_file() and path.name not in taken:
                report("publishing", WRITE_TO)
                files.append(publish_copy(attempt, path.name, path))
        config = read_json_object(output / "config.json", limit=MAX_CONFIG_BYTES)
    logits = checked_logits(attempt, files, base, checkpoint, adapter_dir, config, checks)
    changed = verified["tensors_changed"]
    return Made(files, {"merged": changed, "copied": verified["tensors_read"] - changed}, verified, config, logits)


def merge_with_peft(base: Base, adapter: Path, output: Path) -> None:
    """Load base and adapter, merge, and save weights and config into `output`.

    Args:
        base: The base model, local.
        adapter: A PEFT adapter directory with `adapter_model.safetensors`.
        output: An existing, empty directory.

    Raises:
        SourceError: `adapter_weights_missing`, those of `harmless_config`, or `base_not_loadable` when transformers
            cannot load the base.
        Unsupported: What PEFT itself merges wrong (`unsupported_tied_lm_head`, `unsupported_embedding_lora`,
            `unsupported_tied_embedding`), or cannot merge (`peft_failed`).
        AdapterMismatch: NaN in the adapter, `adapter_unmatched` when PEFT applied only part of it, of which it only
            warns, and those of `refuse_unmergeable`.
    """
    file = read_for_peft(adapter, base)
    # Three seconds of imports that the streaming engine does without.
    from peft import PeftModel

    try:
        with quiet():
            model = load_model(base.directory, base.config, DTYPE)
            wrapped = PeftModel.from_pretrained(model, adapter, config=harmless_config(adapter, model))
            if not is_applied_whole(wrapped, file):
                raise AdapterMismatch(
                    "PEFT did not apply the adapter whole: its modules are not this base's.", code="adapter_unmatched"
                )
            wrapped.merge_and_unload().save_pretrained(output)
    except library_errors() as error:
        what = clean(f"{type(error).__name__}: {error}", limit=MAX_MESSAGE)
        raise Unsupported(f"PEFT could not merge it: {what}", code="peft_failed") from error


def read_for_peft(adapter: Path, base: Base) -> TensorFile:
    """The header of an adapter's weights, if there is nothing in it that PEFT merges wrong, or that nobody can merge.

    Raises:
        SourceError: `adapter_weights_missing`.
        Unsupported: As `merge_with_peft`, for what PEFT itself merges wrong.
        AdapterMismatch: NaN in the adapter, and those of `refuse_unmergeable`.
    """
    if not (adapter / WEIGHTS_NAME).is_file():
        raise SourceError(f"{adapter} has no {WEIGHTS_NAME}.", code="adapter_weights_missing")
    file = read_tensor_file(adapter / WEIGHTS_NAME)
    config = read_config(adapter)
    refuse_unmergeable(config)
    _refuse_what_peft_runs(config)
    _refuse_what_peft_ignores(config)
    _refuse_what_peft_gets_wrong(file, base)
    refuse_not_finite(file)
    return file


def _refuse_what_peft_runs(config: dict[str, Any]) -> None:
    """PEFT imports whatever module `megatron_core` names, if there is a `megatron_config`."""
    if config.get("megatron_config"):
        raise Unsupported(
            "the adapter was trained with megatron_config, whose layers no Gemma has.",
            code="unsupported_megatron_config",
        )


def _refuse_what_peft_ignores(config: dict[str, Any]) -> None:
    """PEFT leaves out a setting that it does not know, and only warns: what it stands for would not be merged."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(str(config.get("peft_type")))
    if kind is None:
        return
    known = {field.name for field in dataclasses.fields(kind)}
    for name, value in config.items():
        if value and name not in known:
            raise AdapterMismatch(
                f"the adapter was trained with {name[:80]} = {str(value)[:80]!r}, which neither this build nor its "
                "PEFT knows: was it saved by a later one?",
                code="adapter_unknown_setting",
            )


def _refuse_what_peft_gets_wrong(file: TensorFile, base: Base) -> None:
    """On a tied model PEFT changes the one tensor that head and embedding share for the sake of one, or forgets one."""
    if not is_tied(base.config):
        return
    hidden_head = family_of(base.config).hidden_head
    for tensor in file.tensors:
        if "trainable_tokens" in tensor.name and hidden_head:
            code = "unsupported_tied_tokens"
        elif "lm_head." in tensor.name:
            code = "unsupported_tied_lm_head"
        elif "lora_embedding_" in tensor.name:
            code = "unsupported_embedding_lora"
        elif tensor.name.endswith(".embed_tokens.weight"):
            code = "unsupported_tied_embedding"
        else:
            continue
        raise Unsupported(f"{tensor.name[:200]!r}: PEFT merges this wrong on a base with tied embeddings.", code=code)
