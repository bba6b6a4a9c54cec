"""Whether the merged model says what base and adapter say together: logits of both for the same tokens.

PEFT's unmerged model is the reference, since what it computes is what was trained; `merge_and_unload` is not. Only for
models that fit the memory budget, since it holds a whole one.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dispatcher.errors import ExportError, VerificationFailed
from exporter.checkpoint import Checkpoint, TensorFile, open_checkpoint
from exporter.models import is_applied_whole, library_errors, load_model, quiet
from exporter.peft_patterns import harmless_config
from exporter.tensors import TORCH_DTYPE

log = logging.getLogger(__name__)
TOKENS = 16
OF_CHANGE = 0.25
"""How far the logits may be from the unmerged model's, as a part of how far the base's own are; root mean squares. An
adapter that is merged by half, or twice, is half of it or all of it away."""
OF_LOGITS = {"F32": 1e-4, "F16": 4e-3, "BF16": 2e-2}
"""How far at least, as a part of the logits themselves, by the dtype that the merged weights are rounded to: what an
adapter changes less than that, the rounding hides."""


def memory_needed(base: Checkpoint, adapter: TensorFile) -> int:
    """Bytes that comparing takes: the model in float32, and the adapter."""
    elements = sum(math.prod(tensor.shape) for file in base.files for tensor in file.tensors)
    return 4 * elements + 2 * adapter.size


def compare_logits(
    base: Path, adapter: Path, merged: Path, config: dict[str, Any], merged_config: dict[str, Any], file: TensorFile
) -> dict[str, Any]:
    """Compare the logits of base and adapter, unmerged, with those of the merged model; all in float32.

    Args:
        base: The base's directory.
        adapter: The adapter's.
        merged: The merged model's, with its config.json.
        config: The base's config.json.
        merged_config: The merged model's.
        file: The adapter's weights.

    Returns:
        For the manifest: how far they are, the limit, how far the base's own are; or why they were not compared.

    Raises:
        VerificationFailed: `logits_differ`, `output_not_loadable`.
    """
    tokens = _tokens(config)
    try:
        with quiet(), torch.inference_mode():
            unmerged, untrained = _with_and_without(base, adapter, config, file, tokens)
    except _NotApplied:
        return {"compared": False, "why": "PEFT does not apply this adapter whole to this base"}
    except ExportError as error:
        return {"compared": False, "why": error.message}
    except library_errors() as error:
        # The libraries' own limits (a vision tower that needs timm, a kind of adapter) say nothing of the artifact.
        log.warning("the logits are not compared: %s: %s", type(error).__name__, error)
        return {"compared": False, "why": f"{type(error).__name__} in transformers or PEFT"}
    try:
        with quiet(), torch.inference_mode():
            found = logits_of(load_model(merged, merged_config, torch.float32), merged_config, tokens)
    except library_errors() as error:
        raise VerificationFailed(
            f"the base loads in transformers, and the merged model does not: {type(error).__name__}: {error}"[:1000],
            code="output_not_loadable",
        ) from error
    difference, change = rms(found - unmerged), rms(untrained - unmerged)
    rounding = max(OF_LOGITS.get(name, OF_LOGITS["BF16"]) for name in _dtypes(merged))
    limit = max(OF_CHANGE * change, rounding * rms(unmerged))
    if not difference <= limit:
        raise VerificationFailed(
            f"the merged model's logits are {difference:.3g} (root mean square) from those of base and adapter; "
            f"the limit is {limit:.3g}, the base's own are {change:.3g} away.",
            code="logits_differ",
        )
    return {
        "compared": True,
        "tokens": len(tokens),
        "rms_difference": rounded(difference),
        "rms_limit": rounded(limit),
        "rms_difference_of_base": rounded(change),
    }


def rms(values: torch.Tensor) -> float:
    """The root mean square."""
    return float(values.double().square().mean().sqrt())


class _NotApplied(Exception):
    """PEFT loaded only part of the adapter, so it is no reference."""


def _with_and_without(
    base: Path, adapter: Path, config: dict[str, Any], file: TensorFile, tokens: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of base and adapter, and of the base alone."""
    from peft import PeftModel

    model = load_model(base, config, torch.float32)
    untrained = logits_of(model, config, tokens)
    wrapped = PeftModel.from_pretrained(model, adapter, config=harmless_config(adapter, model))
    if not is_applied_whole(wrapped, file):
        raise _NotApplied
    return logits_of(wrapped.get_base_model(), config, tokens), untrained


def logits_of(model: Any, config: dict[str, Any], tokens: Sequence[int]) -> torch.Tensor:
    """[1, tokens, vocabulary], float32; of a classifier over a language model, that model's."""
    inner = model if hasattr(model, "lm_head") else model.model
    ids = torch.tensor([tokens])
    extra = {"token_type_ids": torch.zeros_like(ids)} if config.get("model_type") == "paligemma" else {}
    logits: torch.Tensor = inner(input_ids=ids, **extra).logits
    return logits.float()


def _tokens(config: dict[str, Any]) -> list[int]:
    """Some ids of any vocabulary, none of which stands for an image or a sound."""
    special = {value for name, value in config.items() if name.endswith(("_token_id", "_token_index"))}
    return [token for token in range(10, 10 + 4 * TOKENS) if token not in special][:TOKENS]


def _dtypes(directory: Path) -> set[str]:
    files = open_checkpoint(directory).files
    return {tensor.dtype for file in files for tensor in file.tensors if tensor.dtype in TORCH_DTYPE}


def rounded(value: float) -> float:
    """Two digits: sums in float32 differ between machines."""
    return float(f"{value:.2g}")
