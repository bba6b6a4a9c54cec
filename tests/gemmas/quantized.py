"""Tiny bases stored as bitsandbytes stores them in 4 bits: the names, dtypes and shapes that its files have."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

BLOCK = 64
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def quantize_in_place(directory: Path, **config: Any) -> None:
    """Store the linear weights of a base's projections in 4 bits, and say so in its config.json.

    Args:
        directory: The base, of one file.
        config: Further fields for its config.json.
    """
    path = directory / "model.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        stored |= _packed(name, tensor) if name.endswith("proj.weight") else {name: tensor}
    safetensors.torch.save_file(stored, path, {"format": "pt"})
    edit_base_config(directory, quantization_config=CONFIG, **config)


def edit_base_config(directory: Path, **changes: Any) -> None:
    """Set fields of a model's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _packed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two values a byte, in blocks that share a scale, with the state that tells how to unpack them."""
    flat = tensor.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    codes = ((blocks / scales[:, None].clamp(min=1e-9) + 1) * 7.5).round().to(torch.uint8).flatten()
    state = json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(tensor.shape)})
    return {
        name: ((codes[::2] << 4) | codes[1::2])[:, None].contiguous(),
        f"{name}.absmax": scales,
        f"{name}.quant_map": torch.linspace(-1, 1, 16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }
