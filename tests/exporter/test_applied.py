"""What tells whether an engine applied an adapter whole: held against what is right, and every way to be wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from dispatcher.errors import VerificationFailed
from exporter.applied import verify_applied
from exporter.checkpoint import open_checkpoint
from exporter.documents import read_json_object
from exporter.gemma import family_of
from tests.exporter.exporting import merged_into
from tests.gemmas import FAMILIES, file_tensors, load_model, make_adapter, save_base

Tensors = dict[str, torch.Tensor]
TARGET = "model.layers.0.self_attn.q_proj.weight"


def _verify(written: Path, place: Path) -> tuple[int, int]:
    base = place / "base"
    config = read_json_object(base / "config.json", limit=1 << 20)
    wrapped = peft.PeftModel.from_pretrained(load_model(base, dtype=torch.float32), place / "adapter")
    return verify_applied(open_checkpoint(written), open_checkpoint(base), wrapped, family_of(config), config)


@pytest.mark.parametrize(
    ("family", "options", "changed"),
    [
        ("gemma3_text", {}, 14),
        ("gemma3", {}, 26),
        ("shieldgemma2", {}, 26),
        ("gemma4", {}, 56),
        ("gemma3_text", {"use_dora": True, "targets": ["q_proj"]}, 2),
        ("gemma3_text", {"modules_to_save": ["model.norm", "input_layernorm"], "targets": ["q_proj"]}, 5),
        ("gemma3_text", {"trainable_token_indices": [7, 3], "targets": ["q_proj"]}, 3),
        ("gemma3", {"bias": "all", "targets": r".*vision_tower.*q_proj"}, 20),
        ("gemma3", {"bias": "lora_only", "targets": r".*vision_tower.*q_proj"}, 4),
        ("gemma3", {"lora_bias": True, "targets": r".*vision_tower.*q_proj"}, 4),
        (
            "gemma4_moe",
            {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "targets": ["q_proj"]},
            12,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter .default.")  # PEFT does not expect the bias of a pair that it makes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_the_streaming_engine_writes_is_base_plus_adapter(
    family: str, options: dict[str, Any], changed: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Two programs that share nothing, on whatever an adapter can hold."""
    model = save_base(family, tmp_path / "base", layout=FAMILIES[family].layouts[0], dtype=dtype)
    make_adapter(family, model, tmp_path / "adapter", **options)
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    found, copied = _verify(merged, tmp_path)
    assert found == changed
    assert found + copied == len(file_tensors(merged))


def _as_in_the_base(base: Tensors, merged: Tensors) -> Tensors:
    return {**merged, TARGET: base[TARGET]}


def _twice(base: Tensors, merged: Tensors) -> Tensors:
    return {**merged, TARGET: 2 * merged[TARGET] - base[TARGET]}


def _without(base: Tensors, merged: Tensors) -> Tensors:
    return {name: tensor for name, tensor in merged.items() if name != TARGET}


def _other_norm(base: Tensors, merged: Tensors) -> Tensors:
    return {**merged, "model.norm.weight": -merged["model.norm.weight"]}


def _without_norm(base: Tensors, merged: Tensors) -> Tensors:
    return {name: tensor for name, tensor in merged.items() if name != "model.norm.weight"}


def _with_more(base: Tensors, merged: Tensors) -> Tensors:
    return {**merged, "stranger": torch.ones(2)}


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (_as_in_the_base, "adapter_half_applied"),
        (_without, "adapter_half_applied"),
        (_twice, "merge_wrong"),
        (_other_norm, "copy_differs"),
        (_without_norm, "copy_differs"),
        (_with_more, "copy_differs"),
    ],
)
def test_what_is_not_base_plus_adapter_is_refused(
    damage: Callable[[Tensors, Tensors], Tensors], code: str, tmp_path: Path
) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    tensors = damage(file_tensors(tmp_path / "base"), file_tensors(merged))
    (tmp_path / "written").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "written" / "model.safetensors")
    with pytest.raises(VerificationFailed) as refused:
        _verify(tmp_path / "written", tmp_path)
    assert refused.value.error_code == code
