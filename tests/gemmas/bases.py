"""Tiny bases on disk as they are found in the wild: every layout of names, one file or several."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers

from tests.gemmas import gemma3n
from tests.gemmas.families import FAMILIES, build_model
from tests.gemmas.names import Layout, renamed
from tests.gemmas.tokenizer import save_tokenizer

SHARED = ("k_proj.weight", "v_proj.weight", "k_norm.weight")


def save_base(
    family: str,
    directory: Path,
    *,
    model: transformers.PreTrainedModel | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    layout: Layout = "hub",
    shard_bytes: int | None = None,
    with_shared_kv: bool = True,
    with_tokenizer: bool = True,
) -> transformers.PreTrainedModel:
    """Write a base of `family` to `directory` and return the model it was written from.

    Args:
        family: A key of `FAMILIES`.
        directory: Created if missing.
        model: Written instead of `build_model(family, seed=seed, dtype=dtype)`.
        seed: Of the weights.
        dtype: Of the weights.
        layout: The naming scheme of the tensors.
        shard_bytes: With it, an index and files of at most so many bytes each (one tensor at least).
        with_shared_kv: Also write the k and v tensors of layers that share another's, as hub checkpoints do.
        with_tokenizer: Also write the tokenizer's files.
    """
    model = build_model(family, seed=seed, dtype=dtype) if model is None else model
    directory.mkdir(parents=True, exist_ok=True)
    own = checkpoint_tensors(family, model, with_shared_kv=with_shared_kv)
    tensors = {renamed(family, layout, name): tensor for name, tensor in own.items()}
    config = model.config
    if family == "gemma3n":
        tensors |= gemma3n.other_towers(model.config, model.dtype)
        config = gemma3n.config(model.config, model.dtype)
    else:
        config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    _save_tensors(tensors, directory, shard_bytes)
    if with_tokenizer:
        save_tokenizer(directory)
    if FAMILIES[family].multimodal:
        (directory / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 8, "width": 8}})
        )
    return model


def checkpoint_tensors(
    family: str, model: transformers.PreTrainedModel, *, with_shared_kv: bool = True
) -> dict[str, torch.Tensor]:
    """What a checkpoint of `model` holds, by today's module names: contiguous, without tied duplicates."""
    tied = set(model.all_tied_weights_keys)
    tensors = {
        name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items() if name not in tied
    }
    if with_shared_kv:
        tensors |= _shared_kv(model, tensors)
    return tensors


def shared_kv_names(family: str, model: transformers.PreTrainedModel, layout: Layout) -> set[str]:
    """The tensors that `with_shared_kv` adds, by their names in `layout`."""
    return {renamed(family, layout, name) for name in _shared_kv(model, dict(model.state_dict()))}


def _shared_kv(model: transformers.PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    text = model.config.get_text_config()
    shared = getattr(text, "num_kv_shared_layers", 0)
    prefix = "model.language_model.layers" if "model.language_model.norm.weight" in tensors else "model.layers"
    generator = torch.Generator().manual_seed(2)
    added: dict[str, torch.Tensor] = {}
    for layer in range(text.num_hidden_layers - shared, text.num_hidden_layers):
        like = text.layer_types.index(text.layer_types[layer])
        for part in SHARED:
            example = tensors[f"{prefix}.{like}.self_attn.{part}"]
            value = torch.randn(example.shape, generator=generator).to(example.dtype)
            added[f"{prefix}.{layer}.self_attn.{part}"] = value
    return added


def _save_tensors(tensors: dict[str, torch.Tensor], directory: Path, shard_bytes: int | None) -> None:
    metadata = {"format": "pt"}
    if shard_bytes is None:
        safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata)
        return
    shards: list[dict[str, torch.Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > room or not shards:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        safetensors.torch.save_file(shard, directory / file, metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def load_model(directory: Path, *, dtype: torch.dtype | str = "auto") -> transformers.PreTrainedModel:
    """Load what lies in `directory` with plain transformers, in its own dtype unless another is named.

    A multimodal Gemma 3n loads as its text tower (its vision tower would need timm).

    Raises:
        AssertionError: A parameter of the model was not in the files, or had another shape.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, config.architectures[0])
    if config.model_type == "gemma3n":
        config, kind = config.text_config, transformers.Gemma3nForCausalLM
    model, info = kind.from_pretrained(directory, config=config, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"], f"not in the files: {sorted(info['missing_keys'])[:5]}"
    assert not info["mismatched_keys"], f"of another shape: {sorted(info['mismatched_keys'])[:5]}"
    return model.eval()


def model_tensors(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer by today's module name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def file_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files in `directory`, by the names that the files use."""
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, and for each the same dtype, shape and bits."""
    assert actual.keys() == expected.keys(), f"names differ: {sorted(actual.keys() ^ expected.keys())[:10]}"
    different = [name for name in actual if not same_bits(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(actual)} tensors differ, first {different[:10]}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality; unlike `torch.equal`, NaN equals itself and -0.0 is not 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat_a, flat_b = (tensor.detach().contiguous().reshape(math.prod(a.shape)).view(torch.uint8) for tensor in (a, b))
    return torch.equal(flat_a, flat_b)


def text_logits(model: Any) -> torch.Tensor:
    """The model's logits for a fixed text prompt, [1, 8, vocabulary], float32."""
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    inner = model.model if type(model).__name__ == "ShieldGemma2ForImageClassification" else model
    extra = {"token_type_ids": torch.zeros(1, 8, dtype=torch.long)} if inner.config.model_type == "paligemma" else {}
    with torch.no_grad():
        logits: torch.Tensor = inner(input_ids=torch.arange(20, 28)[None], **extra).logits
    return logits.float()
