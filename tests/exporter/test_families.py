"""For every family, key layout and dtype: what streaming writes is what PEFT computes, and all else is the base's."""

from pathlib import Path

import pytest
import torch

from tests.exporter.exporting import merged_into
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
    same_bits,
    save_base,
    shared_kv_names,
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
