"""For every family, key layout and dtype: what streaming writes is what PEFT computes, and all else is the base's."""

from pathlib import Path

import peft
import pytest
import torch

from dispatcher.artifacts import path_of
from tests.exporter.exporting import export, merged_into
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
    same_bits,
    save_base,
    shared_kv_names,
    text_logits,
)

ADAPTER_LAYOUTS: tuple[Layout, ...] = ("hub", "nested", "modules")
REPRESENTATIVES = {("gemma3", "hub"), ("gemma4_unified", "hub"), ("shieldgemma2", "saved")}
MATRIX = [
    pytest.param(
        family,
        layout,
        adapter_layout,
        dtype,
        marks=[]
        if dtype is torch.bfloat16
        and (layout == FAMILIES[family].layouts[0] or (family, layout) in REPRESENTATIVES)
        and (adapter_layout == "modules" or (family, layout) == ("gemma3", "hub"))
        else [pytest.mark.full],
        id=f"{family}-{layout}-{adapter_layout}-{str(dtype).removeprefix('torch.')}",
    )
    for family, layout in CASES
    for adapter_layout in (ADAPTER_LAYOUTS if FAMILIES[family].multimodal else ADAPTER_LAYOUTS[-1:])
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
]


@pytest.mark.parametrize(("family", "layout", "adapter_layout", "dtype"), MATRIX)
def test_streaming_equals_peft_bit_for_bit(
    family: str, layout: Layout, adapter_layout: Layout, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Loaded with transformers, the streamed model and PEFT's `merge_and_unload` agree in every bit."""
    model = save_base(family, tmp_path / "base", dtype=dtype, layout=layout)
    make_adapter(family, model, tmp_path / "adapter", layout=adapter_layout)
    make_adapter(family, model, tmp_path / "for_peft", layout="modules")
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    expected = peft_merged(tmp_path / "base", tmp_path / "for_peft")
    assert_same_tensors(model_tensors(load_model(merged)), expected)
    _assert_only_targets_changed(family, layout, merged, tmp_path)


def _assert_only_targets_changed(family: str, layout: Layout, merged: Path, tmp_path: Path) -> None:
    base, written = file_tensors(tmp_path / "base"), file_tensors(merged)
    pairs = len(file_tensors(tmp_path / "adapter")) // 2
    changed = {name for name in base if not same_bits(base[name], written[name])}
    assert base.keys() == written.keys()
    assert len(changed) == pairs


@pytest.mark.parametrize("family", ["gemma3n", "gemma3n_text", "gemma4_text", "gemma4"])
def test_the_keys_and_values_of_shared_layers_stay(family: str, tmp_path: Path) -> None:
    """transformers drops them when it saves; llama.cpp needs them."""
    layout = FAMILIES[family].layouts[0]
    model = save_base(family, tmp_path / "base", layout=layout)
    make_adapter(family, model, tmp_path / "adapter")
    merged = file_tensors(merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store"))
    base = file_tensors(tmp_path / "base")
    shared = shared_kv_names(family, model, layout)
    assert shared
    assert all(same_bits(merged[name], base[name]) for name in shared)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma3"])
def test_a_sharded_base_keeps_its_shards_and_index(family: str, tmp_path: Path) -> None:
    model = save_base(family, tmp_path / "base", shard_bytes=6000)
    make_adapter(family, model, tmp_path / "adapter")
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    shards = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in merged.glob("*.safetensors")) == shards
    index = "model.safetensors.index.json"
    assert (merged / index).read_bytes() == (tmp_path / "base" / index).read_bytes()
    assert_same_tensors(model_tensors(load_model(merged)), peft_merged(tmp_path / "base", tmp_path / "adapter"))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
        {"use_rslora": True},
        {"targets": ["q_proj", "v_proj"]},
        {"targets": r".*layers\.0.*(gate|up)_proj"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "layers_to_transform": [1]},
    ],
    ids=["patterns", "rslora", "list", "regex", "layers"],
)
def test_every_plain_lora_setting_merges_as_in_peft(
    options: dict[str, object], adapter_dtype: torch.dtype, tmp_path: Path
) -> None:
    if "layers_to_transform" in options:
        options = {**options, "targets": ["q_proj"]}
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter", dtype=adapter_dtype, **options)  # type: ignore[arg-type]  # the table's values are of mixed types
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert_same_tensors(model_tensors(load_model(merged)), peft_merged(tmp_path / "base", tmp_path / "adapter"))


DORA = [
    pytest.param(
        family,
        FAMILIES[family].layouts[0],
        id=family,
        marks=[] if family in ("gemma3_text", "gemma3", "gemma4") else [pytest.mark.full],
    )
    for family in FAMILIES
]


@pytest.mark.parametrize(("family", "layout"), DORA)
def test_dora_merges_as_in_peft_up_to_the_last_bits_of_float32(family: str, layout: Layout, tmp_path: Path) -> None:
    """Row norms are sums of many squares, which no two programs add up in the same order."""
    model = save_base(family, tmp_path / "base", dtype=torch.float32, layout=layout)
    make_adapter(family, model, tmp_path / "adapter", use_dora=True)
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    expected = peft_merged(tmp_path / "base", tmp_path / "adapter")
    found = model_tensors(load_model(merged))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=1e-7, msg=name)
    base, written = file_tensors(tmp_path / "base"), file_tensors(merged)
    triples = len(file_tensors(tmp_path / "adapter")) // 3
    assert sum(not same_bits(base[name], written[name]) for name in base) == triples


def test_dora_in_half_precision_is_at_least_as_near_as_pefts(tmp_path: Path) -> None:
    """Both against float64; how often each is the correctly rounded one is printed."""
    model = save_base("gemma3_text", tmp_path / "base", dtype=torch.bfloat16)
    make_adapter("gemma3_text", model, tmp_path / "adapter", use_dora=True)
    merged = file_tensors(merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store"))
    pefts = peft_merged(tmp_path / "base", tmp_path / "adapter")
    base, adapter = file_tensors(tmp_path / "base"), file_tensors(tmp_path / "adapter")
    ours_right, pefts_right, total = 0, 0, 0
    for key in (key for key in adapter if key.endswith(".lora_A.weight")):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b, magnitude = (
            adapter[key.replace("lora_A", "lora_B")],
            adapter[key.replace("lora_A.weight", "lora_magnitude_vector")],
        )
        whole = base[f"{module}.weight"].double() + 2.0 * (b.double() @ adapter[key].double())
        exact = whole * (magnitude.double() / torch.linalg.vector_norm(whole, dim=1))[:, None]
        best = exact.to(torch.bfloat16)
        ours_right += int((merged[f"{module}.weight"] == best).sum())
        pefts_right += int((pefts[f"{module}.weight"] == best).sum())
        total += best.numel()
    print(f"correctly rounded: {ours_right} of {total} here, {pefts_right} in PEFT")  # noqa: T201  # a number to report
    assert ours_right >= pefts_right
    assert ours_right >= 0.999 * total


TRAINED_WHOLE = [
    pytest.param("gemma3_text", {"modules_to_save": ["input_layernorm", "model.norm"]}, 3, id="norms"),
    pytest.param("gemma3_text", {"trainable_token_indices": [7, 3, 319]}, 1, id="tokens"),
    pytest.param("gemma3", {"trainable_token_indices": {"embed_tokens": [5]}}, 1, id="tokens of a tower"),
    pytest.param("gemma3", {"bias": "all", "targets": r".*vision_tower.*q_proj"}, 18, id="all biases"),
    pytest.param("gemma3", {"bias": "lora_only", "targets": r".*vision_tower.*q_proj"}, 2, id="biases of targets"),
    pytest.param(
        "gemma4",
        {"modules_to_save": ["per_layer_projection_norm"], "targets": r".*language_model.*q_proj"},
        1,
        id="a norm of gemma4",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "options", "replaced"), TRAINED_WHOLE)
def test_what_was_trained_whole_takes_the_place_of_the_bases(
    family: str, options: dict[str, object], replaced: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bit for bit as in PEFT, beside the pairs; and nothing else changes."""
    options = {"targets": ["q_proj"], **options}
    model = save_base(family, tmp_path / "base", layout=FAMILIES[family].layouts[0], dtype=dtype)
    make_adapter(family, model, tmp_path / "adapter", **options)  # type: ignore[arg-type]  # the table's values are of mixed types
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert result.summary["replaced"] == replaced
    merged = path_of(result.artifact.uri)
    assert_same_tensors(model_tensors(load_model(merged)), peft_merged(tmp_path / "base", tmp_path / "adapter"))
    base, written = file_tensors(tmp_path / "base"), file_tensors(merged)
    changed = [name for name in base if not same_bits(base[name], written[name])]
    assert len(changed) == result.summary["merged"] + replaced


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "gemma"])
def test_trained_tokens_of_a_tied_embedding_speak_as_before_the_merge(family: str, tmp_path: Path) -> None:
    """Into the model and out of it: PEFT trains the rows of embedding and head as one."""
    model = save_base(family, tmp_path / "base", dtype=torch.float32)
    make_adapter(family, model, tmp_path / "adapter", targets=["q_proj"], trainable_token_indices=[40, 21, 3, 25])
    merged = load_model(merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store"))
    unmerged = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(text_logits(merged), text_logits(unmerged), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(text_logits(merged), text_logits(load_model(tmp_path / "base")), atol=1e-3)


def test_an_untied_head_and_its_embedding_are_each_their_own(tmp_path: Path) -> None:
    """Both trained whole, on a base that does not tie them."""
    model = build_model("gemma3_text")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.all_tied_weights_keys = {}
    save_base("gemma3_text", tmp_path / "base", model=model)
    make_adapter(
        "gemma3_text", model, tmp_path / "adapter", targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert_same_tensors(model_tensors(load_model(merged)), peft_merged(tmp_path / "base", tmp_path / "adapter"))
    written = file_tensors(merged)
    assert not same_bits(written["lm_head.weight"], written["model.embed_tokens.weight"])
