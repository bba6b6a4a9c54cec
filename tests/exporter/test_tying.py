"""Embedding and head: apart where the adapter trained them apart, one tensor where it did not."""

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch

from dispatcher.artifacts import path_of
from dispatcher.errors import AdapterMismatch
from exporter.artifact import Result
from tests.exporter.damage import edit_adapter
from tests.exporter.exporting import export
from tests.exporter.matrix import listed
from tests.gemmas import build_model, file_tensors, load_model, make_adapter, same_bits, save_base, text_logits

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embed")


def trained(place: Path, *targets: str, shard_bytes: int | None = None, **options: object) -> Result:
    model = save_base("gemma3_text", place / "base", dtype=torch.float32, shard_bytes=shard_bytes)
    listed(*targets, save_embeddings="auto", **options)("gemma3_text", model, place / "adapter")
    return export(place / "base", place / "adapter", place / "store")


def config_of(result: Result) -> dict[str, object]:
    config: dict[str, object] = json.loads((path_of(result.artifact.uri) / "config.json").read_text())
    return config


def test_an_added_head_lies_beside_its_embedding_and_in_the_index(tmp_path: Path) -> None:
    result = trained(tmp_path, "q_proj", "embed_tokens", shard_bytes=6000)
    merged = path_of(result.artifact.uri)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"][HEAD] == index["weight_map"][EMBEDDING]
    tensors = file_tensors(merged)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert same_bits(tensors[HEAD], file_tensors(tmp_path / "base")[EMBEDDING])
    assert config_of(result)["tie_word_embeddings"] is False
    assert result.summary["untied"] is True


def test_what_stays_tied_keeps_config_and_index_as_they_are(tmp_path: Path) -> None:
    result = trained(tmp_path, "q_proj", shard_bytes=6000, trainable_token_indices=[3, 5])
    merged = path_of(result.artifact.uri)
    for name in ("config.json", "model.safetensors.index.json"):
        assert (merged / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert "untied" not in result.summary


def test_copies_of_the_bases_embedding_are_confirmed_and_change_nothing(tmp_path: Path) -> None:
    """PEFT stores them beside a pair on an embedding, in float32."""
    result = trained(tmp_path, "q_proj", "embed_tokens", "lm_head")
    ledger = json.loads((path_of(result.artifact.uri) / "ledger.json").read_text())
    copies = {name: entry for name, entry in ledger["adapter"].items() if "base_layer" in name}
    assert len(copies) == 2
    assert all(entry == {"operation": "confirmed", "tensors": []} for entry in copies.values())


def test_a_copy_that_is_not_the_bases_is_what_its_pair_is_added_to(tmp_path: Path) -> None:
    """PEFT loads it over the base's, so it is what was trained."""
    model = save_base("gemma3_text", tmp_path / "base", dtype=torch.float32)
    listed("embed_tokens", save_embeddings="auto")("gemma3_text", model, tmp_path / "adapter")
    copy = f"base_model.model.{EMBEDDING.removesuffix('.weight')}.base_layer.weight"
    edit_adapter(tmp_path / "adapter", lambda own: {**own, copy: own[copy] + 0.25})
    merged = file_tensors(path_of(export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store").artifact.uri))
    own = file_tensors(tmp_path / "adapter")
    prefix = copy.removesuffix("base_layer.weight")
    delta = 2.0 * (own[f"{prefix}lora_embedding_B"] @ own[f"{prefix}lora_embedding_A"]).T
    torch.testing.assert_close(merged[EMBEDDING], own[copy] + delta)
    assert same_bits(merged[HEAD], own[copy])


def test_a_heads_copy_that_is_not_the_bases_is_the_embeddings_too(tmp_path: Path) -> None:
    """PEFT loads it into the one tensor that both are."""
    save_base("gemma3_text", tmp_path / "base", dtype=torch.float32)
    model = build_model("gemma3_text", dtype=torch.float32)
    model.get_input_embeddings().weight.data[3:7] = 0.25
    listed("q_proj", "lm_head", save_embeddings="auto")("gemma3_text", model, tmp_path / "adapter")
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    unmerged = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    merged = text_logits(load_model(path_of(result.artifact.uri)))
    torch.testing.assert_close(merged, text_logits(unmerged), rtol=1e-4, atol=1e-4)


def test_a_pair_on_the_head_alone_of_a_resized_vocabulary(tmp_path: Path) -> None:
    save_base("gemma3_text", tmp_path / "base", dtype=torch.float32)
    model = build_model("gemma3_text", dtype=torch.float32)
    model.resize_token_embeddings(324)
    listed("lm_head", save_embeddings=True)("gemma3_text", model, tmp_path / "adapter")
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert config_of(result)["vocab_size"] == 324
    assert text_logits(load_model(path_of(result.artifact.uri))).shape[-1] == 324


def test_a_text_adapter_with_a_resized_vocabulary_finds_its_tower(tmp_path: Path) -> None:
    save_base("gemma3", tmp_path / "base", dtype=torch.float32)
    model = build_model("gemma3_text", dtype=torch.float32)
    model.resize_token_embeddings(324)
    make_adapter(
        "gemma3_text", model, tmp_path / "adapter", targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert result.summary["mapped_to_tower"] == "language_model"
    model = load_model(path_of(result.artifact.uri))
    assert model.lm_head.weight.shape[0] == model.get_input_embeddings().weight.shape[0] == 324


def test_a_head_that_the_base_stores_beside_its_twin_follows_it(tmp_path: Path) -> None:
    """Some checkpoints hold both, though their config ties them."""
    model = save_base("gemma3_text", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, path, {"format": "pt"})
    make_adapter("gemma3_text", model, tmp_path / "adapter", targets=["q_proj"], trainable_token_indices=[3, 5])
    merged = file_tensors(path_of(export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store").artifact.uri))
    assert not same_bits(merged[EMBEDDING], tensors[EMBEDDING])
    assert same_bits(merged[HEAD], merged[EMBEDDING])


def test_a_stored_head_is_trained_in_its_own_place(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, path, {"format": "pt"})
    listed("lm_head")("gemma3_text", model, tmp_path / "adapter")
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    merged = file_tensors(path_of(result.artifact.uri))
    assert same_bits(merged[EMBEDDING], tensors[EMBEDDING])
    assert not same_bits(merged[HEAD], tensors[EMBEDDING])
    assert config_of(result)["tie_word_embeddings"] is False


def _resized(place: Path, rows: int) -> None:
    """An adapter of a model whose vocabulary was resized, both layers trained whole."""
    model = save_base("gemma3_text", place / "base", dtype=torch.float32)
    model.resize_token_embeddings(rows)
    make_adapter(
        "gemma3_text", model, place / "adapter", targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )


@pytest.mark.parametrize("rows", [326, 310])
def test_a_resized_vocabulary_makes_config_and_weights_agree(rows: int, tmp_path: Path) -> None:
    _resized(tmp_path, rows)
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert config_of(result)["vocab_size"] == rows
    model = load_model(path_of(result.artifact.uri))
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == rows
    assert text_logits(model).shape[-1] == rows


def test_a_pair_on_a_resized_embedding_is_added_to_the_copy(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base", dtype=torch.float32)
    model.resize_token_embeddings(324)
    listed("embed_tokens", "lm_head", save_embeddings=True)("gemma3_text", model, tmp_path / "adapter")
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert config_of(result)["vocab_size"] == 324
    own, merged = file_tensors(tmp_path / "adapter"), file_tensors(path_of(result.artifact.uri))
    prefix = "base_model.model.lm_head."
    delta = 2.0 * own[f"{prefix}lora_B.weight"] @ own[f"{prefix}lora_A.weight"]
    torch.testing.assert_close(merged[HEAD], own[f"{prefix}base_layer.weight"] + delta)


def test_a_vocabulary_resized_in_one_place_is_refused_with_its_numbers(tmp_path: Path) -> None:
    _resized(tmp_path, 326)
    edit_adapter(
        tmp_path / "adapter",
        lambda own: {name: value[:321].clone() if "lm_head" in name else value for name, value in own.items()},
    )
    with pytest.raises(AdapterMismatch) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert refused.value.error_code == "vocabulary_mismatch"
    assert all(number in refused.value.message for number in ("326", "321", "320"))


def _add_tokens(directory: Path, *ids: int) -> None:
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] += [{**tokenizer["added_tokens"][0], "id": i, "content": f"<new{i}>"} for i in ids]
    path.write_text(json.dumps(tokenizer))


def test_a_tokenizer_with_more_tokens_than_rows_is_refused_with_the_three_numbers(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((tmp_path / "base" / name).read_bytes())
    export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    _add_tokens(tmp_path / "adapter", 320, 321)
    with pytest.raises(AdapterMismatch) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")
    assert refused.value.error_code == "vocabulary_mismatch"
    assert all(number in refused.value.message for number in ("320 rows", "says 320", "need 322"))
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file()]


def test_a_base_whose_config_contradicts_its_embedding_is_refused(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 321}))
    with pytest.raises(AdapterMismatch) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert refused.value.error_code == "vocabulary_mismatch"
