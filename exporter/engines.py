"""The reference engine: PEFT's own `merge_and_unload`, on the whole model in memory.

Kept to compare with, and as the way out (`--engine peft`) for what the streaming engine refuses as unsupported.
"""

from pathlib import Path

import torch

from dispatcher.errors import AdapterMismatch, SourceError, Unsupported
from exporter.adapter import WEIGHTS_NAME, refuse_not_finite
from exporter.checkpoint import TensorFile, read_tensor_file
from exporter.plan import is_tied
from exporter.sources import Base
from exporter.tensors import read_tensor

DTYPE = torch.bfloat16
"""What the model is loaded and saved in, as the platform did before the streaming engine."""


def peft_version() -> str:
    """What decides this engine's bytes, besides base and adapter."""
    import peft
    import transformers

    return f"peft-{peft.__version__}+transformers-{transformers.__version__}+torch-{torch.__version__}"


def merge_with_peft(base: Base, adapter: Path, output: Path) -> tuple[int, int]:
    """Load base and adapter, merge, and save weights and config into `output`.

    Args:
        base: The base model, local.
        adapter: A PEFT adapter directory with `adapter_model.safetensors`.
        output: An existing, empty directory.

    Returns:
        How many tensors were merged, and how many were not.

    Raises:
        SourceError: `adapter_weights_missing`, or `base_not_loadable` when transformers cannot load the base.
        Unsupported: What PEFT itself merges wrong (`unsupported_tied_lm_head`, `unsupported_embedding_lora`,
            `unsupported_tied_embedding`), or cannot merge (`peft_failed`).
        AdapterMismatch: NaN in the adapter, or `adapter_unmatched` when PEFT applied only part of it, of which it
            only warns.
    """
    # Three seconds of imports that the streaming engine does without.
    import transformers
    from peft import PeftModel, get_peft_model_state_dict

    if not (adapter / WEIGHTS_NAME).is_file():
        raise SourceError(f"{adapter} has no {WEIGHTS_NAME}.", code="adapter_weights_missing")
    file = read_tensor_file(adapter / WEIGHTS_NAME)
    _refuse_what_peft_gets_wrong(file, base)
    refuse_not_finite(file)
    architectures = base.config.get("architectures") or ["AutoModelForCausalLM"]
    model_class = getattr(transformers, str(architectures[0]), None)
    if model_class is None:
        raise SourceError(f"transformers has no class {architectures[0]!r}.", code="base_not_loadable")
    try:
        # With its own config, a leftover of a quantization would be believed.
        config = model_class.config_class.from_dict(base.config)
        model = model_class.from_pretrained(base.directory, config=config, dtype=DTYPE, trust_remote_code=False)
        wrapped = PeftModel.from_pretrained(model, adapter)
        applied = sorted(_digest(tensor) for tensor in get_peft_model_state_dict(wrapped).values())
        targeted = len(wrapped.targeted_module_names)
        if applied != sorted(_digest(read_tensor(file, tensor)) for tensor in file.tensors):
            raise AdapterMismatch(
                "PEFT did not apply the adapter whole: its modules are not this base's.", code="adapter_unmatched"
            )
        merged = wrapped.merge_and_unload()
        merged.save_pretrained(output)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise Unsupported(f"PEFT could not merge it: {type(error).__name__}: {error}", code="peft_failed") from error
    return targeted, len(merged.state_dict()) - targeted


def _refuse_what_peft_gets_wrong(file: TensorFile, base: Base) -> None:
    """On a tied model PEFT changes the one tensor that head and embedding share for the sake of one, or forgets one."""
    if not is_tied(base.config):
        return
    for tensor in file.tensors:
        if "lm_head." in tensor.name:
            code = "unsupported_tied_lm_head"
        elif "lora_embedding_" in tensor.name:
            code = "unsupported_embedding_lora"
        elif tensor.name.endswith(".embed_tokens.weight"):
            code = "unsupported_tied_embedding"
        else:
            continue
        raise Unsupported(f"{tensor.name[:200]!r}: PEFT merges this wrong on a base with tied embeddings.", code=code)


def _digest(tensor: torch.Tensor) -> tuple[tuple[int, ...], float, float]:
    """Shape and two sums of a tensor, the same before and after PEFT renamed its key and widened its dtype."""
    values = tensor.detach().double().flatten()
    weights = torch.arange(1, values.numel() + 1, dtype=torch.float64)
    return tuple(tensor.shape), float(values.sum()), float(values @ weights)
