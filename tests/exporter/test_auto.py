"""`--engine auto`: PEFT stands in for what the streaming engine does not support, and for nothing else."""

import logging
from pathlib import Path

import peft
import pytest
import torch

from dispatcher.artifacts import path_of
from dispatcher.errors import AdapterMismatch, Unsupported
from exporter import engines, peft_engine, unsloth_engine
from exporter.checkpoint import open_checkpoint
from exporter.making import Checks
from exporter.sources import open_base
from tests.exporter.damage import edit_adapter, edit_config
from tests.exporter.exporting import export
from tests.exporter.matrix import ROWS, Row, of_type
from tests.gemmas import load_model, make_adapter, save_base, text_logits


@pytest.fixture
def loha(tmp_path: Path) -> Path:
    """A base, and an adapter of a PEFT type that is not LoRA."""
    model = save_base("gemma3_text", tmp_path / "base")
    of_type(peft.LoHaConfig(r=2, target_modules=["q_proj"]))("gemma3_text", model, tmp_path / "adapter")
    return tmp_path


def test_what_streaming_does_not_support_peft_makes(loha: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = export(loha / "base", loha / "adapter", loha / "store", engine="auto", checks=Checks())
    assert result.summary["engine"] == "peft"
    assert result.summary["logits"]["compared"]
    assert "'LOHA'" in caplog.text
    merged = text_logits(load_model(path_of(result.artifact.uri), dtype=torch.float32))
    wanted = peft.PeftModel.from_pretrained(load_model(loha / "base", dtype=torch.float32), loha / "adapter")
    torch.testing.assert_close(merged, text_logits(wanted), rtol=0.02, atol=0.02)
    again = export(loha / "base", loha / "adapter", loha / "store", engine="auto")
    assert again.artifact == result.artifact


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.outcome.startswith("unsupported_peft_type")], ids=lambda row: row.name
)
@pytest.mark.filterwarnings("ignore")  # of PEFT's, about small ranks
def test_every_other_type_of_peft_is_merged_by_it(row: Row, tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base", dtype=torch.float32)
    row.make("gemma3_text", model, tmp_path / "adapter")
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine="auto", checks=Checks())
    assert result.summary["engine"] == "peft"
    assert result.summary["logits"]["compared"]
    wanted = text_logits(peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter"))
    merged = text_logits(load_model(path_of(result.artifact.uri), dtype=torch.float32))
    untrained = text_logits(load_model(tmp_path / "base"))
    assert (merged - wanted).square().mean() < 0.03 * (untrained - wanted).square().mean()


def test_a_setting_that_peft_does_not_know_is_not_left_out_by_it(loha: Path) -> None:
    """PEFT ignores it, and only warns."""
    edit_config(loha / "adapter", a_setting_of_next_year=True)
    with pytest.raises(AdapterMismatch) as refused:
        export(loha / "base", loha / "adapter", loha / "store", engine="auto")
    assert refused.value.error_code == "adapter_unknown_setting"


def test_what_peft_would_fill_with_random_weights_is_refused(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    lost = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_adapter(tmp_path / "adapter", lambda own: {name: value for name, value in own.items() if name != lost})
    with pytest.raises(AdapterMismatch) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine="peft")
    assert refused.value.error_code == "adapter_unmatched"


def test_peft_takes_what_was_trained_whole_in_float32(tmp_path: Path) -> None:
    """It rounds it as it loads it."""
    model = save_base("gemma3_text", tmp_path / "base", dtype=torch.float32)
    make_adapter("gemma3_text", model, tmp_path / "adapter", targets=["q_proj"], modules_to_save=["input_layernorm"])
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine="peft")
    assert result.summary["merged"] > 2


def test_tokens_that_peft_merges_into_a_head_it_did_not_see_are_refused(tmp_path: Path) -> None:
    model = save_base("shieldgemma2", tmp_path / "base")
    make_adapter("shieldgemma2", model, tmp_path / "adapter", targets=["q_proj"], trainable_token_indices=[3])
    with pytest.raises(Unsupported) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine="peft")
    assert refused.value.error_code == "unsupported_tied_tokens"


@pytest.mark.parametrize("setting", [{"fan_in_fan_out": True, "target_modules": ["nothing"]}])
def test_what_peft_cannot_do_either_ends_by_name(setting: dict[str, object], tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **setting)
    with pytest.raises(Unsupported) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine="auto")
    assert refused.value.error_code == "peft_failed"


def test_by_name_streaming_is_not_replaced(loha: Path) -> None:
    with pytest.raises(Unsupported) as refused:
        export(loha / "base", loha / "adapter", loha / "store", engine="streaming")
    assert refused.value.error_code == "unsupported_peft_type_loha"


def test_a_model_that_does_not_fit_the_memory_is_refused(loha: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = peft_engine.memory_needed(open_checkpoint(loha / "base"))
    monkeypatch.setattr(engines, "available_memory", lambda: needed)  # and the adapter comes on top
    with pytest.raises(Unsupported) as refused:
        export(loha / "base", loha / "adapter", loha / "store", engine="auto")
    assert refused.value.error_code == "unsupported_peft_type_loha"
    assert "GiB of memory" in refused.value.message
    assert not [path for path in (loha / "store").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("provider", "installed", "expected"),
    [("unsloth", True, "unsloth"), ("unsloth", False, "peft"), ("huggingface", True, "peft")],
)
def test_what_unsloth_trained_unsloth_merges_where_it_is_installed(
    provider: str, installed: bool, expected: str, loha: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsloth_engine, "is_installed", lambda: installed)
    refusal = Unsupported("something.", code="unsupported_something")
    assert (
        engines.reference_for(refusal, provider, open_base(str(loha / "base"), None, lambda: None), []).name == expected
    )


def test_the_memory_is_the_containers_where_that_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel keeps of files for later use is as good as free."""
    monkeypatch.setattr(engines, "CGROUP", tmp_path)
    machine = engines.available_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert engines.available_memory() == pytest.approx(machine, rel=0.5)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert engines.available_memory() == 4000
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 700\n")
    assert engines.available_memory() == 4700


def test_a_mismatch_is_never_handed_on(tmp_path: Path) -> None:
    """PEFT would apply what fits, and only warn of the rest."""
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    edit_adapter(
        tmp_path / "adapter", lambda own: {key.replace("layers.1", "layers.9"): value for key, value in own.items()}
    )
    with pytest.raises(AdapterMismatch) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine="auto")
    assert refused.value.error_code == "adapter_unmatched"


@pytest.mark.parametrize("engine", ["auto", "streaming", "peft"])
def test_a_mutated_base_is_refused_by_every_engine(engine: str, tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter", targets=["q_proj"], init_lora_weights="pissa_niter_4")
    with pytest.raises(AdapterMismatch) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine=engine)
    assert refused.value.error_code == "adapter_base_mutated"
    assert "path_initial_model_for_weight_conversion" in refused.value.message


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")  # while it converts
def test_a_converted_pissa_adapter_is_an_ordinary_one(tmp_path: Path) -> None:
    """As PEFT says to save it: against the original base, with twice the rank."""
    model = save_base("gemma3_text", tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(model, config)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    for _, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    trained = text_logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    edit_config(tmp_path / "adapter", base_model_name_or_path="somewhere")
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    merged = text_logits(load_model(path_of(result.artifact.uri)))
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
