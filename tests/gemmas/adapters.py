"""Real PEFT adapters for the tiny models, and PEFT's own merge of them as the reference to compare with."""

import copy
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers

from tests.gemmas.bases import load_model, model_tensors
from tests.gemmas.names import Layout, renamed

PREFIX = "base_model.model."
TIED_HEAD = {"shieldgemma2"}
"""Where `all-linear` also picks the tied `lm_head`: PEFT leaves it out only where the class itself has it."""


def make_adapter(
    family: str,
    model: transformers.PreTrainedModel,
    directory: Path,
    *,
    r: int = 4,
    alpha: float = 8,
    targets: str | list[str] = "all-linear",
    seed: int = 0,
    layout: Layout = "modules",
    dtype: torch.dtype = torch.float32,
    save_embeddings: bool | str = False,
    **options: Any,
) -> None:
    """Write an adapter for `model` (which stays as it is) to `directory`, as PEFT saves it.

    Args:
        family: A key of `FAMILIES`; with `layout` it decides the names.
        model: The model the adapter fits.
        directory: Created if missing.
        r: Rank.
        alpha: `lora_alpha`.
        targets: `target_modules`: `all-linear`, a list of name endings, or a regular expression.
        seed: Of both factors; with B zero, as PEFT starts, nothing would be tested.
        layout: Which transformers generation's module names the keys carry.
        dtype: In which the factors are stored.
        save_embeddings: `save_embedding_layers` of PEFT's `save_pretrained`.
        options: Further `LoraConfig` fields: `rank_pattern`, `alpha_pattern`, `use_rslora`, ...
    """
    if family in TIED_HEAD and targets == "all-linear":
        options.setdefault("exclude_modules", ["lm_head"])
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **options)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)

    def trains_biases(name: str) -> bool:
        return config.bias != "none" and name.endswith(".bias") and (config.bias == "all" or ".base_layer." in name)

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(wrapped.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        if "lora_" in name and parameter.dtype != torch.float32:
            parameter.data = values
        elif "lora_" in name:
            parameter.data.copy_(values)  # in place: with `ensure_weight_tying` two of them share their memory
        elif any(mark in name for mark in (".modules_to_save.", ".trainable_tokens_delta")) or trains_biases(name):
            parameter.data.copy_(values)  # in its own dtype: PEFT loads it as such, too
    wrapped.save_pretrained(directory, save_embedding_layers=save_embeddings)
    path = directory / "adapter_model.safetensors"
    tensors = {
        PREFIX + renamed(family, layout, key.removeprefix(PREFIX)): tensor.to(dtype)
        for key, tensor in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def peft_merged(base: Path, adapter: Path, *, dtype: torch.dtype | str = "auto") -> dict[str, torch.Tensor]:
    """What PEFT's `merge_and_unload` makes of the model as loaded, by today's module names.

    Raises:
        AssertionError: PEFT left factors of the adapter unused, so that it is no reference.
    """
    wrapped = peft.PeftModel.from_pretrained(load_model(base, dtype=dtype), adapter)
    stored = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert len(loaded) == len(stored), f"PEFT has {len(loaded)} factors, the adapter {len(stored)}"
    assert sum(map(_mass, loaded.values())) == sum(map(_mass, stored.values())), "PEFT did not load the adapter"
    return model_tensors(wrapped.merge_and_unload())


def _mass(tensor: torch.Tensor) -> float:
    return float(tensor.double().abs().sum())
