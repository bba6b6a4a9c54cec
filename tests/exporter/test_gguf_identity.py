"""A GGUF made in one pass is, byte for byte, what llama.cpp's own route makes in three steps."""

import re
from pathlib import Path

import pytest
import safetensors.torch

from dispatcher.artifacts import path_of
from dispatcher.contract import QUANTIZATIONS
from exporter.shared_pass import SharedPass
from tests.exporter.damage import Tensors
from tests.exporter.exporting import export_gguf_of, file_of, merged_into
from tests.exporter.gguf_route import converted, differences, peft_directory, quantized, read
from tests.gemmas.llama import llama_adapter, llama_base

SOME = ("q8_0", "q4_k_m", "q6_k")
FULL = [pytest.mark.full]
ROWS = [
    pytest.param("gemma3_text", ("q8_0", "q4_k_m"), id="gemma3_text-two"),
    pytest.param("gemma3_text", QUANTIZATIONS, id="gemma3_text-all", marks=FULL),
    pytest.param("gemma4_text", QUANTIZATIONS, id="gemma4_text-all", marks=FULL),
    *(
        pytest.param(family, SOME, marks=FULL)
        for family in ("gemma", "gemma2", "gemma3", "gemma4", "gemma4_moe")
    ),
]
NAME = "tiny"
"""Of the base's directory, after which the converter names the model"""


def of_family(family: str, place: Path) -> tuple[Path, Path]:
    """A base that llama.cpp converts, and an adapter for it."""
    base = llama_base(family, place / "base" / NAME)
    return base, llama_adapter(family, base, place / "adapter")


def rewrite(base: Path, names: dict[str, str | None]) -> None:
    """Rename tensors of a base by the beginnings, or the ends, of their names; None leaves them out."""
    path = base / "model.safetensors"
    kept: Tensors = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        new: str | None = name
        for pattern, replacement in names.items():
            if new is not None and re.search(pattern, new):
                new = None if replacement is None else re.sub(pattern, replacement, new)
        if new is not None:
            kept[new] = tensor
    safetensors.torch.save_file(kept, path, {"format": "pt"})


@pytest.mark.parametrize(("family", "quantizations"), ROWS)
def test_a_file_is_the_one_that_llama_cpps_own_route_makes(
    family: str, quantizations: tuple[str, ...], tmp_path: Path
) -> None:
    """In every type, all of them made in one pass over the base."""
    base, adapter = of_family(family, tmp_path)
    shared = SharedPass(len(quantizations))
    made = export_gguf_of(base, adapter, tmp_path / "store", quantizations, shared=shared)
    whole = converted(peft_directory(base, adapter, tmp_path / "route" / NAME), tmp_path / "whole.gguf", "bf16")
    different = {
        quantization: found
        for quantization, result in zip(quantizations, made, strict=True)
        if (found := differences(file_of(result), quantized(whole, quantization)))
    }
    assert different == {}
    assert shared.passes == 1
