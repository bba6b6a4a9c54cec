"""The merged model speaks as base and adapter do, or the export fails, or it says why it did not ask."""

import json
from pathlib import Path

import peft
import pytest
import torch

from dispatcher.artifacts import path_of
from dispatcher.errors import VerificationFailed
from exporter import making, model_config, streaming
from exporter.making import Checks, Made
from tests.exporter.damage import edit_adapter
from tests.exporter.exporting import export
from tests.gemmas import FAMILIES, build_model, file_tensors, make_adapter, save_base

HALVES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in ("gemma3_text", "gemma3", "gemma4") else [pytest.mark.full])
        for family in FAMILIES
    ],
)
def test_the_merged_model_speaks_as_base_and_adapter_do(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Within the limit of its dtype, which is far below what the adapter changes."""
    model = save_base(family, tmp_path / "base", dtype=dtype, layout=FAMILIES[family].layouts[0])
    make_adapter(family, model, tmp_path / "adapter")
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", checks=Checks())
    logits = result.summary["logits"]
    if family == "gemma3n":  # whose vision tower is timm's
        assert not logits["compared"]
        assert logits["why"]
        return
    assert logits["compared"]
    assert logits["rms_difference"] <= logits["rms_limit"] / 2
    assert logits["rms_difference_of_base"] > 2 * logits["rms_limit"]
    manifest = json.loads((path_of(result.artifact.uri) / "export.json").read_text())
    assert manifest["run"]["logits"] == logits


@pytest.mark.parametrize("wrong", ["not merged", "merged twice", "wrong scale"])
def test_what_speaks_otherwise_is_not_published(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter that the logits are compared with is another than the one that was merged."""
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    alpha = {"not merged": 0.0, "merged twice": 16.0, "wrong scale": 4.0}[wrong]
    make_adapter("gemma3_text", build_model("gemma3_text"), tmp_path / "meant", alpha=alpha)
    real = making.checked_logits

    def against_what_was_meant(attempt, files, base, checkpoint, adapter_dir, config, checks):  # type: ignore[no-untyped-def]  # passes on
        return real(attempt, files, base, checkpoint, tmp_path / "meant", config, checks)

    monkeypatch.setattr(streaming, "checked_logits", against_what_was_meant)
    with pytest.raises(VerificationFailed) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", checks=Checks())
    assert refused.value.error_code == "logits_differ"
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def _why(result: Made | object) -> str:
    summary: dict[str, dict[str, object]] = result.summary  # type: ignore[union-attr]  # a Result
    assert summary["logits"]["compared"] is False
    return str(summary["logits"]["why"])


def test_what_is_not_compared_says_why(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    place = (tmp_path / "base", tmp_path / "adapter")
    assert "VERIFY_LOGITS" in _why(export(*place, tmp_path / "one", checks=Checks(logits=False)))
    assert "MEMORY_BUDGET_MIB" in _why(export(*place, tmp_path / "two", checks=Checks(memory_budget=1 << 10)))


def test_a_reference_that_peft_itself_applies_in_part_is_none(tmp_path: Path) -> None:
    """The text class's names on the multimodal class: we map them, PEFT only warns."""
    model = save_base("gemma3", tmp_path / "base")
    make_adapter("gemma3", model, tmp_path / "adapter", targets=r".*language_model.*q_proj")
    edit_adapter(
        tmp_path / "adapter",
        lambda own: {name.replace("language_model.", ""): tensor for name, tensor in own.items()},
    )
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", checks=Checks())
    assert "PEFT does not apply" in _why(result)


def test_an_adapter_that_adds_nothing_is_refused(tmp_path: Path) -> None:
    """As PEFT makes it, and nobody trained it."""
    model = save_base("gemma3_text", tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert not any(tensor.any() for name, tensor in file_tensors(tmp_path / "adapter").items() if "lora_B" in name)
    with pytest.raises(VerificationFailed) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert refused.value.error_code == "nothing_changed"


@pytest.mark.parametrize("scale", [1e-9, 1e-5])
def test_what_the_rounding_takes_away_is_no_merge(scale: float, tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter", targets=["q_proj"])
    edit_adapter(
        tmp_path / "adapter", lambda own: {name: t * scale if "lora_B" in name else t for name, t in own.items()}
    )
    with pytest.raises(VerificationFailed) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert refused.value.error_code == "nothing_changed"


def test_a_merged_model_that_does_not_load_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter", targets=["q_proj"])
    real = model_config.merged_config

    def wrong(config, plan):  # type: ignore[no-untyped-def]  # passes on
        return {**real(config, plan), "intermediate_size": 48}

    monkeypatch.setattr(streaming, "merged_config", wrong)
    with pytest.raises(VerificationFailed) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", checks=Checks())
    assert refused.value.error_code == "output_not_loadable"


def test_bounds_that_are_infinite_are_no_diverged_training(tmp_path: Path) -> None:
    model = save_base("gemma4", tmp_path / "base", dtype=torch.float32)
    make_adapter(
        "gemma4", model, tmp_path / "adapter", targets=r".*language_model.*q_proj", modules_to_save=["audio_tower"]
    )
    assert any(torch.isinf(tensor).any() for tensor in file_tensors(tmp_path / "adapter").values())
    assert export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store").summary["replaced"] > 10


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("zero", [True, False])
def test_biases_of_a_text_adapter_go_where_its_weights_go(bias: str, zero: bool, tmp_path: Path) -> None:
    """Also those that were trained to zero, where the base's are not."""
    whole = build_model("gemma3", dtype=torch.float32)
    config = whole.config
    config.text_config.attention_bias = True
    model = type(whole)(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    save_base("gemma3", tmp_path / "base", model=model)
    make_adapter("gemma3", model, tmp_path / "whole", targets=r".*language_model.*q_proj", bias=bias)
    edit_adapter(
        tmp_path / "whole",
        lambda own: {
            name.replace("language_model.", ""): t * 0 if zero and name.endswith(".bias") else t
            for name, t in own.items()
            if "language_model" in name
        },
    )
    merged = file_tensors(path_of(export(tmp_path / "base", tmp_path / "whole", tmp_path / "store").artifact.uri))
    name = "language_model.model.layers.0.self_attn.q_proj.bias"
    own = file_tensors(tmp_path / "whole")
    trained = next(t for key, t in own.items() if "layers.0.self_attn.q_proj" in key and key.endswith(".bias"))
    assert torch.equal(merged[name], trained)
    assert merged[name].any() != zero


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias for a broken half of a pair
def test_an_added_bias_that_overflows_is_refused(tmp_path: Path) -> None:
    """In float32 too, where the sum itself is infinite and nothing more is lost by the rounding."""
    model = save_base("gemma3", tmp_path / "base", dtype=torch.float32)
    make_adapter("gemma3", model, tmp_path / "adapter", targets=r".*vision_tower.*q_proj", lora_bias=True)
    edit_adapter(
        tmp_path / "adapter", lambda own: {n: t * 0 + 3e38 if n.endswith("B.bias") else t for n, t in own.items()}
    )
    with pytest.raises(VerificationFailed) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert refused.value.error_code == "merge_overflow"
