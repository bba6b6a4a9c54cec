"""A merged model's config.json names the class that its tensors are of, or the export is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import transformers

from dispatcher.errors import SourceError
from exporter.architecture import fitting_config
from exporter.gemma import FAMILIES as TABLE
from tests.exporter.exporting import export, merged_into
from tests.gemmas import (
    CASES,
    FAMILIES,
    Layout,
    assert_same_tensors,
    file_tensors,
    load_model,
    make_adapter,
    model_tensors,
    peft_merged,
    save_base,
)

TEXT = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
BARE = [name.removeprefix("model.") for name in TEXT]
VISION = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
HUB = [f"language_model.{name}" for name in TEXT]
WHOLE = [*HUB, VISION, "multi_modal_projector.mm_input_projection_weight"]


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def edit_config(directory: Path, **changes: object) -> None:
    """Set fields of a config.json; None removes one."""
    config = {**read_config(directory), **changes}
    kept = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_config_that_fits_is_left_as_it_is(family: str, layout: Layout, tmp_path: Path) -> None:
    save_base(family, tmp_path, layout=layout)
    config = read_config(tmp_path)
    assert fitting_config(config, file_tensors(tmp_path)) == config


@pytest.mark.parametrize("declared", [None, [], ["SomebodysModel"], ["Gemma3ForCausalLM", "Gemma3ForCausalLM"]])
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_architectures_that_say_nothing_right_are_replaced(
    family: str, layout: Layout, declared: list[str] | None, tmp_path: Path
) -> None:
    save_base(family, tmp_path, layout=layout)
    right = read_config(tmp_path)
    wrong = {**right, "architectures": declared}
    assert fitting_config(wrong, file_tensors(tmp_path)) == right


@pytest.mark.parametrize(
    ("model_type", "names", "declared", "expected"),
    [
        ("gemma3_text", TEXT, "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        ("gemma3_text", TEXT, "Gemma3TextModel", "Gemma3ForCausalLM"),
        ("gemma3_text", BARE, "Gemma3TextModel", "Gemma3TextModel"),
        ("gemma3_text", BARE, "Gemma3ForCausalLM", "Gemma3ForCausalLM"),
        ("gemma3_text", BARE, None, "Gemma3TextModel"),
        ("gemma2", BARE, None, "Gemma2Model"),
        ("gemma3_text", [*TEXT, "score.weight"], "Gemma3TextForSequenceClassification", None),
        ("gemma3", WHOLE, "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3", WHOLE, "Gemma3Model", "Gemma3ForConditionalGeneration"),
        ("shieldgemma2", WHOLE, "Gemma3ForConditionalGeneration", "ShieldGemma2ForImageClassification"),
        ("gemma4", [f"model.{name}" for name in HUB], None, "Gemma4ForConditionalGeneration"),
        ("gemma3n_text", [f"model.language_model.{name}" for name in BARE], None, "Gemma3nForCausalLM"),
    ],
)
def test_the_class_is_the_one_that_the_names_are_of(
    model_type: str, names: list[str], declared: str | None, expected: str | None
) -> None:
    config = {"model_type": model_type, **({"architectures": [declared]} if declared else {})}
    assert fitting_config(config, names)["architectures"] == [expected or declared]


@pytest.mark.parametrize(
    ("config", "names", "told"),
    [
        ({"model_type": "gemma3_text"}, WHOLE, "vision_tower"),
        ({"model_type": "gemma3n_text"}, [*TEXT, "model.audio_tower.conformer.0.norm.weight"], "audio_tower"),
        ({"model_type": "gemma4_unified_text"}, [*TEXT, "model.vision_embedder.patch_ln1.weight"], "vision_embedder"),
        ({"model_type": "gemma3_text"}, HUB, "within a multimodal model"),
        ({"model_type": "gemma3"}, HUB, "text tower alone"),
        ({"model_type": "gemma4", "vision_config": {}}, HUB, "text tower alone"),
        ({"model_type": "gemma3"}, TEXT, "text_config"),
        ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, TEXT, "text_config"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3"}}, TEXT, "text_config"),
        ({"model_type": "gemma3", "text_config": {"model_type": ["gemma"]}}, TEXT, "text_config"),
        ({"model_type": "gemma3", "text_config": {}}, [*TEXT, VISION], "text layers"),
        ({"model_type": "gemma3_text"}, [*TEXT, "score.weight"], "classifier"),
    ],
)
def test_config_and_tensors_of_different_models_are_refused(
    config: dict[str, Any], names: list[str], told: str
) -> None:
    with pytest.raises(SourceError, match=told) as refusal:
        fitting_config(config, names)
    assert refusal.value.error_code == "base_architecture_mismatch"
    assert repr(config["model_type"]) in refusal.value.message


def test_a_refused_base_leaves_nothing_behind(tmp_path: Path) -> None:
    """As some trainers merge: the text-only class's config beside the multimodal model's weights."""
    model = save_base("gemma3", tmp_path / "base")
    make_adapter("gemma3", model, tmp_path / "adapter")
    text = {**read_config(tmp_path / "base")["text_config"], "architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(text))
    with pytest.raises(SourceError) as refusal:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert refusal.value.error_code == "base_architecture_mismatch"
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


@pytest.mark.parametrize("engine", ["streaming", "peft"])
@pytest.mark.parametrize("family", ["gemma3_text", "gemma3", "gemma4_text"])
def test_a_base_that_declares_a_wrong_class_gives_a_model_that_declares_the_right_one(
    family: str, engine: str, tmp_path: Path
) -> None:
    model = save_base(family, tmp_path / "base", layout=FAMILIES[family].layouts[0])
    make_adapter(family, model, tmp_path / "adapter", targets=["q_proj"])
    right = read_config(tmp_path / "base")["architectures"]
    expected = peft_merged(tmp_path / "base", tmp_path / "adapter")
    wrong = "Gemma3ForCausalLM" if FAMILIES[family].multimodal else "Gemma3ForConditionalGeneration"
    edit_config(tmp_path / "base", architectures=[wrong])
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine=engine)
    assert read_config(merged)["architectures"] == right
    assert_same_tensors(model_tensors(load_model(merged)), expected)


WHOLE_OF_TEXT = {"gemma3_text": "gemma3", "gemma4_text": "gemma4", "gemma": "paligemma"}


@pytest.mark.parametrize("engine", ["streaming", "peft"])
@pytest.mark.parametrize("family", WHOLE_OF_TEXT)
def test_a_text_tower_with_its_multimodal_config_becomes_a_text_model(family: str, engine: str, tmp_path: Path) -> None:
    """Taken out of the multimodal model by its owner, who left the config as it was."""
    model = save_base(family, tmp_path / "base")
    make_adapter(family, model, tmp_path / "adapter")
    expected = peft_merged(tmp_path / "base", tmp_path / "adapter")
    own = read_config(tmp_path / "base")
    whole = save_base(WHOLE_OF_TEXT[family], tmp_path / "whole")
    wrapped = {**whole.config.to_dict(), "text_config": {**own, "architectures": None}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(wrapped))
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine=engine)
    config = read_config(merged)
    assert (config["model_type"], config["architectures"]) == (family, own["architectures"])
    assert "vision_config" not in config
    assert_same_tensors(model_tensors(load_model(merged)), expected)


def test_an_untied_head_stays_untied_when_the_text_config_becomes_the_whole() -> None:
    """A multimodal config says it at the top, where its text_config says nothing, or the library's default."""
    config = {"model_type": "gemma3", "tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    assert fitting_config(config, [*TEXT, "lm_head.weight"])["tie_word_embeddings"] is False


def test_the_checked_config_is_not_changed_itself() -> None:
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 3}, "dtype": "bfloat16"}
    before = copy.deepcopy(config)
    changed = fitting_config(config, TEXT)
    assert config == before
    assert changed == {
        "dtype": "bfloat16",
        "hidden_size": 3,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
    }


@pytest.mark.parametrize("model_type", TABLE)
def test_every_class_of_the_table_is_one_of_the_library(model_type: str) -> None:
    family = TABLE[model_type]
    assert getattr(transformers, family.architecture).config_class.model_type == model_type
    if family.text_type is not None:
        assert TABLE[family.text_type].text_type is None


@pytest.mark.parametrize("model_type", [name for name in TABLE if TABLE[name].text_type is None])
def test_the_class_for_a_bare_checkpoint_is_what_saves_one(model_type: str) -> None:
    kind = getattr(transformers, fitting_config({"model_type": model_type}, BARE)["architectures"][0])
    assert kind.config_class.model_type == model_type


def test_a_bare_checkpoint_as_embeddinggemma_is_saved_stays_one(tmp_path: Path) -> None:
    """Merged under its own class, and not called a language model."""
    model = save_base("gemma3_text", tmp_path / "base")
    bare = {name.removeprefix("model."): tensor for name, tensor in file_tensors(tmp_path / "base").items()}
    safetensors.torch.save_file(bare, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path / "base", architectures=["Gemma3TextModel"])
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert read_config(merged) == read_config(tmp_path / "base")
    loaded, info = transformers.AutoModel.from_pretrained(merged, output_loading_info=True)
    assert type(loaded).__name__ == "Gemma3TextModel"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
