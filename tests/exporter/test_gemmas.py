"""The factory of tiny models is honest: transformers reads what it writes, and its adapters do something."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers

from tests.gemmas import (
    CASES,
    FAMILIES,
    Layout,
    assert_same_tensors,
    build_model,
    file_tensors,
    load_model,
    make_adapter,
    model_tensors,
    peft_merged,
    save_base,
    shared_kv_names,
    text_logits,
)

REPRESENTATIVES = {"gemma3_text", "gemma3", "gemma3n", "gemma4"}
QUICK_FAMILIES = [
    pytest.param(family, marks=[] if family in REPRESENTATIVES else [pytest.mark.full]) for family in FAMILIES
]
QUICK_CASES = [
    pytest.param(family, layout, marks=[] if family in REPRESENTATIVES else [pytest.mark.full])
    for family, layout in CASES
]


@pytest.mark.parametrize(("family", "layout"), QUICK_CASES)
def test_a_base_loads_as_the_model_it_was_written_from(family: str, layout: Layout, tmp_path: Path) -> None:
    model = save_base(family, tmp_path, layout=layout, with_tokenizer=False)
    assert_same_tensors(model_tensors(load_model(tmp_path)), model_tensors(model))


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_no_two_tensors_of_a_model_are_alike(family: str) -> None:
    tied = set(build_model(family).all_tied_weights_keys)
    tensors = [
        tensor.float()
        for name, tensor in build_model(family, dtype=torch.float32).state_dict().items()
        if name not in tied and tensor.isfinite().all()
    ]
    assert len({tuple(tensor.flatten().tolist()) for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_the_layouts_of_a_family_differ_in_names_only(family: str, tmp_path: Path) -> None:
    contents = []
    for layout in FAMILIES[family].layouts:
        save_base(family, tmp_path / layout, layout=layout, with_tokenizer=False)
        contents.append(file_tensors(tmp_path / layout))
    assert len({frozenset(tensors) for tensors in contents}) == len(contents)
    assert len({tuple(sorted(map(_checksum, tensors.values()))) for tensors in contents}) == 1


def _checksum(tensor: torch.Tensor) -> float:
    return float(tensor.double().nan_to_num().sum())


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_an_adapter_changes_what_the_model_says(family: str, tmp_path: Path) -> None:
    model = save_base(family, tmp_path / "base", dtype=torch.float32, with_tokenizer=False)
    make_adapter(family, model, tmp_path / "adapter")
    before = text_logits(model)
    merged = load_model(tmp_path / "base")
    merged.load_state_dict(peft_merged(tmp_path / "base", tmp_path / "adapter"))
    after = text_logits(merged)
    assert before.isfinite().all()
    assert after.isfinite().all()
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["hub", "nested", "modules"])
def test_an_adapter_carries_the_names_of_the_library_that_trained_it(layout: Layout, tmp_path: Path) -> None:
    make_adapter("gemma3", build_model("gemma3"), tmp_path, layout=layout)
    keys = set(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    expected = {
        "hub": "base_model.model.language_model.model.layers.0.mlp.up_proj.lora_A.weight",
        "nested": "base_model.model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "modules": "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight",
    }
    assert expected[layout] in keys


def test_the_saved_layout_is_what_the_library_writes(tmp_path: Path) -> None:
    for family in ("gemma3", "paligemma", "shieldgemma2", "gemma4_unified"):
        model = save_base(family, tmp_path / family, layout="saved", with_tokenizer=False, with_shared_kv=False)
        model.save_pretrained(tmp_path / "library" / family)
        assert_same_tensors(file_tensors(tmp_path / family), file_tensors(tmp_path / "library" / family))


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma3n", "gemma4", "gemma4_text", "gemma4_unified"])
def test_a_base_has_the_shared_layers_tensors_that_the_library_drops(family: str, tmp_path: Path) -> None:
    model = save_base(family, tmp_path, with_tokenizer=False)
    shared = shared_kv_names(family, model, "hub")
    assert len(shared) == 6
    assert shared <= file_tensors(tmp_path).keys()


def test_a_sharded_base_has_an_index_and_loads_alike(tmp_path: Path) -> None:
    model = save_base("gemma3", tmp_path, shard_bytes=4096)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == file_tensors(tmp_path).keys()
    assert_same_tensors(model_tensors(load_model(tmp_path)), model_tensors(model))


def test_both_forms_of_the_tokenizer_agree(tmp_path: Path) -> None:
    save_base("gemma3_text", tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "Bring the lantern\n<start_of_turn>é"
    assert fast(text).input_ids == [fast.bos_token_id, *slow.encode(text)]
    assert fast.decode(fast(text, add_special_tokens=False).input_ids) == text
    assert len(fast) == slow.vocab_size() == 320
    prompt = fast.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert prompt == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
