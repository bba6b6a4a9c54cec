"""What is known of quantized checkpoints, as data: how they are named, how stored, and what they leave in a config.

An adapter that was trained on a quantized model is merged into the 16-bit model which that was made from, as is usual:
the quantized weights are an approximation of those, and a delta rounded into four bits would mostly be lost.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

TWIN_NAMES: tuple[tuple[str, str], ...] = (
    # Google's QAT weights before quantization keep the name of the format that they were trained for.
    (r"-qat-q4_0-gguf$", "-qat-q4_0-unquantized"),
    (r"(-unsloth)?-bnb-[48]bit$", ""),
    (r"-gguf$", ""),
    (r"-(awq|gptq)(-(int)?[2-8](b|bit)?(-\d+g)?)?$", ""),
    (r"-fp8(-dynamic|-block)?$", ""),
    (r"-(nv|mx)fp4$", ""),
    (r"-quantized\.w\d+a\d+$", ""),
    (r"(-mlx)?-[2-8]bit$", ""),
)
"""Endings of quantized repositories' names, in any case, and what the 16-bit one has instead; the first that matches
counts. All 50 quantized Gemmas of Unsloth's own table follow the second. Sources:
https://github.com/unslothai/unsloth/blob/main/unsloth/models/mapper.py (2026.10.9),
https://huggingface.co/collections/google/gemma-3-qat"""

TWIN_OWNERS = dict.fromkeys(("redhatai", "neuralmagic", "ista-daslab", "nvidia", "mlx-community"), "google")
"""Who publishes quantized Gemmas alone, in lower case, and who the 16-bit ones. All others, Unsloth for one, have both
under their own name."""

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""What says in config.json how weights are stored: today's key, compressed-tensors' old one, MLX's."""
TOWER_CONFIGS = ("text_config", "vision_config", "audio_config")

STORED_DTYPES = frozenset({"U8", "I8", "U32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4"})
"""Safetensors dtypes that only quantized weights or their scales have: no Gemma has a tensor of these otherwise."""
STORED_NAMES = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|qweight|qzeros|g_idx|"
    r"weight_packed|weight_scale|weight_scale_inv|weight_zero_point|weight_shape)$|\.quant_state\."
)
"""Tensors that stand beside, or for, a quantized weight: of bitsandbytes, GPTQ and AWQ, compressed-tensors. Sources:
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py (QuantState.as_dict),
https://github.com/ModelCloud/GPTQModel/wiki/Packing-Formats-and-Compatibility,
https://github.com/vllm-project/compressed-tensors"""


def twin_of(model_id: str) -> str | None:
    """The id of the 16-bit repository that a quantized one's name speaks of; None for any other name.

    `unsloth/gemma-3-4b-it-unsloth-bnb-4bit` gives `unsloth/gemma-3-4b-it`. It is a matter of names alone: whether such
    a repository exists, and is 16-bit, the hub has to say.
    """
    owner, slash, name = model_id.partition("/")
    if not slash:
        return None
    for pattern, ending in TWIN_NAMES:
        twin, count = re.subn(pattern, ending, name, flags=re.IGNORECASE)
        if count:
            return f"{TWIN_OWNERS.get(owner.lower(), owner)}/{twin}" if twin else None
    return None


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """How a config.json says that the weights are stored, in a word (`bitsandbytes`); None when it says nothing."""
    for part in (config, *(config.get(name) for name in TOWER_CONFIGS)):
        found = next((part[key] for key in CONFIG_KEYS if part.get(key)), None) if isinstance(part, Mapping) else None
        if found is not None:
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            return str(method or "of an unnamed kind")[:80]
    return None


def is_stored_quantized(dtypes: Mapping[str, str]) -> bool:
    """Whether a checkpoint with these tensors, name to safetensors dtype, holds quantized weights."""
    return any(dtype in STORED_DTYPES or STORED_NAMES.search(name) for name, dtype in dtypes.items())


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for 16-bit weights: without what says that they are quantized. An equal copy where nothing does.

    With such a leftover, transformers and vLLM take 16-bit weights for packed ones.
    """
    kept = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    for name in TOWER_CONFIGS:
        if isinstance(kept.get(name), Mapping):
            kept[name] = {key: value for key, value in kept[name].items() if key not in CONFIG_KEYS}
    return kept


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """An edited config.json, laid out as transformers writes it, its keys in their order."""
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
