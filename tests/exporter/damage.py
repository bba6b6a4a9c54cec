"""Ways to make an adapter or a base unusable, for the tests that say what happens then."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]


def edit_config(directory: Path, **changes: Any) -> None:
    """Set fields of adapter_config.json."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_adapter(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace the adapter's tensors by what `change` makes of them."""
    path = directory / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` edit a safetensors file's header in place; the data stays where it is."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    edited = json.dumps(header).encode()
    path.write_bytes(len(edited).to_bytes(8, "little") + edited + raw[8 + length :])
