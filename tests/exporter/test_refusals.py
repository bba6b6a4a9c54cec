"""Every adapter and base that cannot be merged right is refused with a stable code, and nothing is left behind."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

from dispatcher.errors import ExportError
from tests.exporter.damage import Tensors, edit_adapter, edit_config, edit_header
from tests.exporter.exporting import export, merged_into
from tests.gemmas import (
    assert_same_tensors,
    build_model,
    file_tensors,
    make_adapter,
    quantize_in_place,
    save_base,
)

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter that fit each other."""
    directory = tmp_path_factory.mktemp("pristine")
    model = save_base("gemma3_text", directory / "base")
    make_adapter("gemma3_text", model, directory / "adapter")
    return directory


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "place"))


def refusal(place: Path) -> ExportError:
    """How exporting from `place` fails; nothing may be left in the store."""
    with pytest.raises(ExportError) as refused:
        export(place / "base", place / "adapter", place / "store")
    assert not [path for path in (place / "store").rglob("*") if path.is_file()]
    return refused.value


def _remove_adapter(place: Path) -> None:
    shutil.rmtree(place / "adapter")


def _empty_adapter(place: Path) -> None:
    _remove_adapter(place)
    (place / "adapter").mkdir()


def _no_config(place: Path) -> None:
    (place / "adapter" / "adapter_config.json").unlink()


def _config(text: str) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        (place / "adapter" / "adapter_config.json").write_text(text)

    return damage


def _setting(**changes: Any) -> Callable[[Path], None]:
    return lambda place: edit_config(place / "adapter", **changes)


def _pickle_only(place: Path) -> None:
    (place / "adapter" / "adapter_model.safetensors").rename(place / "adapter" / "adapter_model.bin")


def _no_weights(place: Path) -> None:
    (place / "adapter" / "adapter_model.safetensors").unlink()


def _cut(name: str) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        raw = (place / name).read_bytes()
        (place / name).write_bytes(raw[: len(raw) // 2])

    return damage


def _lying_header(place: Path) -> None:
    edit_header(
        place / "adapter" / "adapter_model.safetensors",
        lambda header: header[FIRST].update(data_offsets=[0, 2**40]),
    )


def _tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    return lambda place: edit_adapter(place / "adapter", change)


def _with(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return _tensors(lambda tensors: {**tensors, name: tensor})


def _without(name: str) -> Callable[[Path], None]:
    return _tensors(lambda tensors: {key: value for key, value in tensors.items() if key != name})


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    return _tensors(lambda tensors: {key.replace(old, new): value for key, value in tensors.items()})


def _poisoned(value: float) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> Tensors:
        tensors[FIRST][1, 2] = value
        return tensors

    return _tensors(change)


def _far_too_large(tensors: Tensors) -> Tensors:
    return {name: tensor.fill_(1e19) for name, tensor in tensors.items()}


def _wrong_width(tensors: Tensors) -> Tensors:
    return {**tensors, FIRST: torch.ones(4, tensors[FIRST].shape[1] + 1)}


def _both_generations(tensors: Tensors) -> Tensors:
    extra = {key.replace("base_model.model.model.", "base_model.model."): tensor for key, tensor in tensors.items()}
    return {**tensors, **{key: tensor.clone() for key, tensor in extra.items()}}


def _on_the_embedding(place: Path) -> None:
    edit_config(place / "adapter", target_modules=None)
    rows, width = file_tensors(place / "base")["model.embed_tokens.weight"].shape
    edit_adapter(
        place / "adapter",
        lambda tensors: {
            **tensors,
            "base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, width),
            "base_model.model.model.embed_tokens.lora_B.weight": torch.ones(rows, 4),
        },
    )


def _remove_base(place: Path) -> None:
    shutil.rmtree(place / "base")


def _no_base_weights(place: Path) -> None:
    (place / "base" / "model.safetensors").unlink()


def _base_config(**changes: Any) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        path = place / "base" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _no_base_config(place: Path) -> None:
    (place / "base" / "config.json").unlink()


def _quantized_base(place: Path) -> None:
    quantize_in_place(place / "base")


def _broken_base_config(place: Path) -> None:
    (place / "base" / "config.json").write_text("{")


def _base_tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        path = place / "base" / "model.safetensors"
        safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)

    return damage


def _two_layouts_at_once(tensors: Tensors) -> Tensors:
    return {**tensors, **{f"model.{name}": tensor.clone() for name, tensor in tensors.items()}}


def _eight_bit(tensors: Tensors) -> Tensors:
    return {name: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        pytest.param(_remove_adapter, "adapter_missing", id="adapter directory missing"),
        pytest.param(_empty_adapter, "adapter_config_missing", id="adapter directory empty"),
        pytest.param(_no_config, "adapter_config_missing", id="no adapter_config.json"),
        pytest.param(_config("{"), "adapter_config_invalid", id="config is not JSON"),
        pytest.param(_config("[]"), "adapter_config_invalid", id="config is not an object"),
        pytest.param(_config("[" * 100_000), "adapter_config_invalid", id="config is nested absurdly"),
        pytest.param(_config(" " * 1_000_001), "adapter_config_invalid", id="config is huge"),
        pytest.param(_setting(lora_alpha="much"), "adapter_config_invalid", id="alpha is no number"),
        pytest.param(_setting(rank_pattern=[1]), "adapter_config_invalid", id="pattern is no object"),
        pytest.param(_setting(rank_pattern={"(": 1}), "adapter_config_invalid", id="pattern is no regex"),
        pytest.param(_pickle_only, "adapter_pickle_only", id="only a pickle"),
        pytest.param(_no_weights, "adapter_weights_missing", id="no weights"),
        pytest.param(_cut("adapter/adapter_model.safetensors"), "safetensors_truncated", id="adapter cut short"),
        pytest.param(_lying_header, "safetensors_corrupt", id="adapter header lies"),
        pytest.param(_tensors(lambda tensors: {}), "adapter_empty", id="adapter without tensors"),
        pytest.param(_without(FIRST), "adapter_half_missing", id="B without A"),
        pytest.param(_without(FIRST.replace("_A", "_B")), "adapter_half_missing", id="A without B"),
        pytest.param(_with("stranger", torch.ones(2)), "adapter_unknown_tensor", id="unknown tensor"),
        pytest.param(_renamed("lora_A.", "lora_A.other."), "adapter_unknown_tensor", id="named adapter"),
        pytest.param(_setting(r=8), "adapter_rank_mismatch", id="rank differs from config"),
        pytest.param(_setting(r=0), "adapter_rank_mismatch", id="rank is zero"),
        pytest.param(_tensors(_wrong_width), "adapter_shape_mismatch", id="shape differs from base"),
        pytest.param(_renamed("layers.1.", "layers.7."), "adapter_unmatched", id="layer the base lacks"),
        pytest.param(_renamed("model.layers", "model.blocks"), "adapter_unmatched", id="names the base lacks"),
        pytest.param(_tensors(_both_generations), "adapter_duplicate_target", id="two pairs for one tensor"),
        pytest.param(_poisoned(float("nan")), "adapter_not_finite", id="NaN in the adapter"),
        pytest.param(_tensors(_far_too_large), "merge_overflow", id="finite, but far too large"),
        pytest.param(_poisoned(float("inf")), "adapter_not_finite", id="infinity in the adapter"),
        pytest.param(_on_the_embedding, "adapter_unknown_tensor", id="a linear layer's pair on the embedding"),
        pytest.param(
            _with(FIRST.replace("q_proj.", "conv."), torch.ones(4, 2, 3, 3)),
            "adapter_untargeted",
            id="half a convolution",
        ),
        pytest.param(
            _tensors(lambda tensors: {**tensors, FIRST: torch.ones(4, 16, 1, 1)}),
            "unsupported_conv_lora",
            id="LoRA on a convolution",
        ),
        pytest.param(
            _tensors(lambda tensors: {**tensors, FIRST: tensors[FIRST].double()}),
            "unsupported_adapter_dtype",
            id="float64 adapter",
        ),
        pytest.param(_remove_base, "base_missing", id="base missing"),
        pytest.param(_no_base_weights, "base_missing", id="base without weights"),
        pytest.param(_no_base_config, "base_missing", id="base without config"),
        pytest.param(_broken_base_config, "base_config_invalid", id="base config broken"),
        pytest.param(_cut("base/model.safetensors"), "safetensors_truncated", id="base cut short"),
        pytest.param(_base_config(model_type="llama"), "base_not_gemma", id="base is no Gemma"),
        pytest.param(_base_config(model_type=["gemma"]), "base_not_gemma", id="base type is no text"),
        pytest.param(_quantized_base, "base_quantized", id="base is quantized"),
        pytest.param(_base_tensors(_two_layouts_at_once), "adapter_ambiguous", id="two tensors for one key"),
        pytest.param(_base_tensors(_eight_bit), "unsupported_base_dtype", id="8-bit base"),
    ],
)
def test_bad_input_is_refused_by_name_and_leaves_nothing(
    damage: Callable[[Path], None], code: str, place: Path
) -> None:
    damage(place)
    assert refusal(place).error_code == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"modules_to_save": ["lm_head"]}, "adapter_half_missing"),
        ({"modules_to_save": "norm"}, "adapter_config_invalid"),
        ({"bias": "some"}, "unsupported_bias"),
        ({"lora_bias": True}, "adapter_half_missing"),
        ({"trainable_token_indices": [1]}, "adapter_half_missing"),
        ({"layer_replication": [[0, 1]]}, "adapter_layer_replication"),
        ({"use_qalora": True}, "adapter_qalora"),
        ({"peft_type": ["LORA"]}, "unsupported_peft_type__lora_"),
        ({"lora_alpha": 10**400}, "adapter_config_invalid"),
        ({"r": 10**400}, "adapter_rank_mismatch"),
        ({"rank_pattern": {"(" * 5000: 2}}, "adapter_config_invalid"),
        ({"target_modules": ["q_proj"]}, "adapter_untargeted"),
        ({"exclude_modules": ["v_proj"]}, "adapter_untargeted"),
        ({"layers_to_transform": [0]}, "adapter_untargeted"),
        ({"layers_to_transform": 1}, "adapter_untargeted"),
        ({"init_lora_weights": "PiSSA"}, "adapter_base_mutated"),
        ({"target_parameters": "experts.down_proj"}, "adapter_config_invalid"),
        ({"init_lora_weights": 1}, "unsupported_init_lora_weights"),
        ({"fan_in_fan_out": True}, "unsupported_fan_in_fan_out"),
        ({"a_setting_of_next_year": {"on": True}}, "unsupported_a_setting_of_next_year"),
        ({"peft_type": "LOHA"}, "unsupported_peft_type_loha"),
        ({"peft_type": None}, "unsupported_peft_type_none"),
    ],
)
def test_everything_of_peft_but_plain_lora_is_refused_by_name(changes: dict[str, Any], code: str, place: Path) -> None:
    edit_config(place / "adapter", **changes)
    assert refusal(place).error_code == code


def test_a_hostile_pattern_takes_no_time(place: Path) -> None:
    """Python's own `re` would try every way to split the name."""
    edit_config(place / "adapter", rank_pattern={r"(([a-z_.0-9]+)+)+!": 8}, alpha_pattern={r"(.*)*(.*)*(.*)*x": 1})
    started = time.monotonic()
    assert export(place / "base", place / "adapter", place / "store").summary["merged"] == 14
    assert time.monotonic() - started < 30


def _trained(place: Path, **options: Any) -> Path:
    """An adapter that trained more than pairs."""
    make_adapter("gemma3_text", build_model("gemma3_text"), place / "more", targets=["q_proj"], **options)
    return place / "more"


@pytest.mark.parametrize(
    ("options", "changes", "code"),
    [
        ({"modules_to_save": ["norm"]}, {"modules_to_save": None}, "adapter_unknown_tensor"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [1]}, "adapter_token_indices_invalid"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [1, 1]}, "adapter_token_indices_invalid"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [1, -2]}, "adapter_token_indices_invalid"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [1, 9999]}, "adapter_token_indices_invalid"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": None}, "adapter_token_indices_invalid"),
    ],
)
def test_what_was_trained_whole_and_fits_nothing_is_refused(
    options: dict[str, Any], changes: dict[str, Any], code: str, place: Path
) -> None:
    """By name, before a weight is read."""
    adapter = _trained(place, **options)
    edit_config(adapter, **changes)
    with pytest.raises(ExportError) as refused:
        export(place / "base", adapter, place / "store")
    assert refused.value.error_code == code


def _dora_adapter(place: Path) -> Path:
    make_adapter("gemma3_text", build_model("gemma3_text"), place / "dora", use_dora=True)
    return place / "dora"


def _magnitudes(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Changes the magnitudes of an adapter, or leaves them out."""

    def damage(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(path)
        changed = {name: change(tensor) if "magnitude" in name else tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        pytest.param(_magnitudes(lambda _: None), "adapter_half_missing", id="no magnitudes"),
        pytest.param(_magnitudes(lambda found: found[1:]), "adapter_shape_mismatch", id="too few"),
        pytest.param(_magnitudes(lambda found: found.long()), "unsupported_adapter_dtype", id="whole numbers"),
        pytest.param(_magnitudes(lambda found: found * torch.inf), "adapter_not_finite", id="not finite"),
        pytest.param(_magnitudes(lambda found: found * 0 + 3e38), "merge_overflow", id="too large"),
        pytest.param(lambda adapter: edit_config(adapter, use_dora=False), "adapter_unknown_tensor", id="unannounced"),
    ],
)
def test_magnitudes_that_fit_nothing_are_refused(damage: Callable[[Path], None], code: str, place: Path) -> None:
    """Before a weight is read, but for those that only the weights show to be too large."""
    adapter = _dora_adapter(place)
    damage(adapter)
    with pytest.raises(ExportError) as refused:
        export(place / "base", adapter, place / "store")
    assert refused.value.error_code == code


def test_every_setting_that_peft_saves_by_default_is_plain(place: Path) -> None:
    """A default that PEFT adds must not make every adapter of its next version unsupported unnoticed."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    defaults = {name: value for name, value in config.items() if name not in ("peft_type", "target_modules")}
    edit_config(place / "adapter", **defaults)
    assert export(place / "base", place / "adapter", place / "store").summary["merged"] == 14


def test_an_adapter_of_the_text_class_is_mapped_onto_the_one_tower_that_fits(tmp_path: Path) -> None:
    """PEFT applies nothing then, and only warns."""
    whole = save_base("gemma3", tmp_path / "base")
    make_adapter("gemma3", whole, tmp_path / "whole", targets=r".*language_model.*(q|v)_proj")
    shutil.copytree(tmp_path / "whole", tmp_path / "text")
    edit_adapter(
        tmp_path / "text",
        lambda tensors: {name.replace("language_model.", ""): tensor for name, tensor in tensors.items()},
    )
    assert all("language_model" not in name for name in file_tensors(tmp_path / "text"))
    mapped = merged_into(tmp_path / "base", tmp_path / "text", tmp_path / "store")
    named = merged_into(tmp_path / "base", tmp_path / "whole", tmp_path / "other")
    assert_same_tensors(file_tensors(mapped), file_tensors(named))
    manifest = json.loads((mapped / "export.json").read_text())
    assert manifest["tensors"]["mapped_to_tower"] == "language_model"


def test_a_multimodal_adapter_of_language_modules_fits_the_text_only_base(tmp_path: Path) -> None:
    text = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", text, tmp_path / "adapter")
    expected = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "one")
    edit_adapter(
        tmp_path / "adapter",
        lambda tensors: {name.replace("model.layers", "language_model.layers"): t for name, t in tensors.items()},
    )
    mapped = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "two")
    assert_same_tensors(file_tensors(mapped), file_tensors(expected))


def test_a_key_that_fits_two_towers_is_refused(tmp_path: Path) -> None:
    """Language and vision towers of equal sizes: which one was trained cannot be told from the key."""
    save_base("gemma3_text", tmp_path / "base")
    text = file_tensors(tmp_path / "base")
    towers = {
        f"{tower}.{name.removeprefix('model.')}": tensor.clone()
        for tower in ("model.language_model", "model.vision_tower")
        for name, tensor in text.items()
    }
    safetensors.torch.save_file(towers, tmp_path / "base" / "model.safetensors")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({"model_type": "gemma3", "text_config": {}}))
    make_adapter("gemma3_text", build_model("gemma3_text"), tmp_path / "adapter")
    error = refusal(tmp_path)
    assert error.error_code == "adapter_ambiguous"
    assert "language_model" in error.message
    assert "vision_tower" in error.message


def test_a_vision_adapter_does_not_fit_a_text_only_base(tmp_path: Path) -> None:
    save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3", build_model("gemma3"), tmp_path / "adapter")
    assert refusal(tmp_path).error_code == "adapter_unmatched"


def test_an_untied_head_is_merged_like_any_linear(tmp_path: Path) -> None:
    save_base("gemma3_text", tmp_path / "base")
    tensors = file_tensors(tmp_path / "base")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    safetensors.torch.save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    make_adapter("gemma3_text", build_model("gemma3_text"), tmp_path / "adapter", targets=["q_proj"])
    rows, width = tensors["lm_head.weight"].shape
    edit_config(tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    edit_adapter(
        tmp_path / "adapter",
        lambda own: {
            **own,
            "base_model.model.lm_head.lora_A.weight": torch.ones(4, width),
            "base_model.model.lm_head.lora_B.weight": torch.ones(rows, 4),
        },
    )
    merged = file_tensors(merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store"))
    expected = (tensors["lm_head.weight"].float() + 4 * 2.0).to(torch.bfloat16)
    assert torch.equal(merged["lm_head.weight"], expected)


def test_a_text_adapter_never_lands_in_the_vision_tower(tmp_path: Path) -> None:
    """Its shapes fit the vision layers and not the language ones, but its bare keys cannot mean those."""
    save_base("gemma3", tmp_path / "base")
    config = build_model("gemma3_text").config
    config.hidden_size, config.num_attention_heads, config.head_dim = 12, 1, 12
    small = transformers.Gemma3ForCausalLM(config)
    make_adapter("gemma3_text", small, tmp_path / "adapter", targets=["q_proj", "k_proj", "v_proj"])
    vision = file_tensors(tmp_path / "base")["vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"]
    assert vision.shape == small.model.layers[0].self_attn.q_proj.weight.shape
    assert refusal(tmp_path).error_code == "adapter_unmatched"


def test_the_old_multimodal_names_also_fit_the_text_only_base(tmp_path: Path) -> None:
    text = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", text, tmp_path / "adapter")
    expected = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "one")
    edit_adapter(
        tmp_path / "adapter",
        lambda own: {
            key.replace("model.model.layers", "model.language_model.model.layers"): t for key, t in own.items()
        },
    )
    mapped = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "two")
    assert_same_tensors(file_tensors(mapped), file_tensors(expected))


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base", seed=1, shard_bytes=6000)
    save_base("gemma3_text", tmp_path / "single", seed=2)
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    expected = merged_into(tmp_path / "single", tmp_path / "adapter", tmp_path / "other")
    assert_same_tensors(file_tensors(merged), file_tensors(expected))


def test_empty_tensors_are_carried_along(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    tensors = file_tensors(tmp_path / "base") | {"empty": torch.empty(0, 7), "flag": torch.tensor(3)}
    safetensors.torch.save_file(tensors, tmp_path / "base" / "model.safetensors")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    merged = file_tensors(merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store"))
    assert merged["empty"].shape == (0, 7)
    assert merged["flag"] == 3
