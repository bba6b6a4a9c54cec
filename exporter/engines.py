"""The reference engine: PEFT's own `merge_and_unload`, on the whole model in memory.

Kept to compare with, and as the way out (`--engine peft`) for what the streaming engine refuses as unsupported.
"""

from pathlib import Path

import torch

from dispatcher.errors import AdapterMismatch, SourceError
from exporter.sources import Base

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
        AdapterMismatch: `adapter_unmatched` when PEFT applied only part of the adapter, of which it only warns.
    """
    # Three seconds of imports that the streaming engine does without.
    import transformers
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise SourceError(f"{adapter} has no {weights.name}.", code="adapter_weights_missing")
    architectures = base.config.get("architectures") or ["AutoModelForCausalLM"]
    model_class = getattr(transformers, architectures[0], None)
    if model_class is None:
        raise SourceError(f"transformers has no class {architectures[0]!r}.", code="base_not_loadable")
    model = model_class.from_pretrained(base.directory, dtype=DTYPE, trust_remote_code=False)
    wrapped = PeftModel.from_pretrained(model, adapter)
    with safe_open(weights, framework="pt") as file:
        given = set(file.keys())
    applied = len(get_peft_model_state_dict(wrapped))
    targeted = len(wrapped.targeted_module_names)
    missing = given - set(get_peft_model_state_dict(wrapped))
    if missing or applied != len(given):
        raise AdapterMismatch(
            f"PEFT applied {applied} tensors, the adapter has {len(given)}; first not applied: {sorted(missing)[:1]}.",
            code="adapter_unmatched",
        )
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(output)
    return targeted, len(merged.state_dict()) - targeted
