"""A GGUF made in one pass is, byte for byte, what llama.cpp's own route makes in three steps."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dispatcher.contract import QUANTIZATIONS
from dispatcher.gcs_artifacts import GcsArtifacts
from exporter.shared_pass import SharedPass
from tests.buckets import bucket_named, new_bucket
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
    *(pytest.param(family, SOME, marks=FULL) for family in ("gemma", "gemma2", "gemma3", "gemma4", "gemma4_moe")),
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


def projector_of(file: Path) -> Path:
    """What lies beside a model's file."""
    (found,) = file.parent.glob("mmproj-*.gguf")
    return found


@pytest.mark.full
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_projector_is_the_one_that_the_converter_makes(family: str, tmp_path: Path) -> None:
    """Of the merged towers."""
    base, adapter = of_family(family, tmp_path)
    model = peft_directory(base, adapter, tmp_path / "route" / NAME)
    theirs = converted(model, tmp_path / "theirs.gguf", "f16", "--mmproj")
    (made,) = export_gguf_of(base, adapter, tmp_path / "store")
    assert made.summary["mmproj"]["status"] == "made"
    assert differences(projector_of(file_of(made)), theirs) == []


def test_a_freshly_built_gemma3_has_the_projector_of_one_from_the_hub(tmp_path: Path) -> None:
    """transformers saves its vision tower under other names."""
    base, adapter = of_family("gemma3", tmp_path)
    (hub,) = export_gguf_of(base, adapter, tmp_path / "hub")
    rewrite(base, {r"^vision_tower\.vision_model\.": "vision_tower."})
    (fresh,) = export_gguf_of(base, adapter, tmp_path / "fresh")
    assert differences(file_of(fresh), file_of(hub)) == []
    assert differences(projector_of(file_of(fresh)), projector_of(file_of(hub))) == []


SHARED = r"\.layers\.2[01]\.self_attn\.(k_proj|v_proj|k_norm)\.weight$"
"""Of the tiny gemma3n, what the layers have by which they share another's keys and values"""


@pytest.mark.full
def test_a_gemma3n_is_the_one_of_the_route_where_that_works(tmp_path: Path) -> None:
    """Which is from a directory that still has the tensors of the layers that share others' keys and values."""
    base, adapter = of_family("gemma3n", tmp_path)
    made = export_gguf_of(base, adapter, tmp_path / "store", SOME)
    model = merged_into(base, adapter, tmp_path / "merged").rename(tmp_path / NAME)
    (
        model / "README.md"
    ).unlink()  # the converter takes a licence and tags from it, that PEFT's directory does not tell
    whole = converted(model, tmp_path / "whole.gguf", "bf16")
    assert [differences(file_of(one), quantized(whole, kind)) for one, kind in zip(made, SOME, strict=True)] == [[]] * 3


def test_a_gemma3n_saved_without_its_shared_tensors_is_converted_all_the_same(tmp_path: Path) -> None:
    """The route refuses it, and the loader asks for tensors that it never reads; all others are the same."""
    base, adapter = of_family("gemma3n", tmp_path)
    (first,) = export_gguf_of(base, adapter, tmp_path / "one")
    rewrite(base, {SHARED: None})
    (second,) = export_gguf_of(base, adapter, tmp_path / "two")
    before, after = read(file_of(first)), read(file_of(second))
    assert before["keys"] == after["keys"]
    assert list(before["tensors"]) == list(after["tensors"])
    different = {name for name, tensor in after["tensors"].items() if tensor != before["tensors"][name]}
    assert different == {f"blk.{layer}.attn_{part}.weight" for layer in (20, 21) for part in ("k", "v", "k_norm")}
    assert second.summary["logits"]["loaded"] == "whole"


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_a_full_fine_tune_is_the_one_of_the_routes_last_steps(dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing is merged into it; and what it has beyond bfloat16 is lost in quantizing as it is there, not in f32."""
    model = llama_base("gemma3_text", tmp_path / NAME)
    path, generator = model / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = {
        name: (tensor.float() * (1 + torch.rand(tensor.shape, generator=generator) / 300)).to(dtype)
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    *made, exact = export_gguf_of(f"/nowhere/{NAME}", model, tmp_path / "store", [*SOME, "f32"])
    whole = converted(model, tmp_path / "whole.gguf", "bf16")
    assert [differences(file_of(one), quantized(whole, kind)) for one, kind in zip(made, SOME, strict=True)] == [[]] * 3
    whole = converted(model, tmp_path / "f32.gguf", "f32")
    assert read(file_of(exact))["tensors"] == read(whole)["tensors"]


def test_a_full_fine_tune_in_a_bucket_is_converted_as_one_in_a_directory(tmp_path: Path, storage_server: str) -> None:
    """Into a bucket, too, from where it is not fetched again to be checked."""
    model = llama_base("gemma3_text", tmp_path / NAME)
    (local,) = export_gguf_of(f"/nowhere/{NAME}", model, tmp_path / "store")
    theirs, store = new_bucket(), GcsArtifacts(new_bucket())
    for path in model.iterdir():
        bucket_named(theirs).blob(f"jobs/1/{path.name}").upload_from_filename(path)
    (made,) = export_gguf_of(f"/nowhere/{NAME}", f"gs://{theirs}/jobs/1", store)
    assert made.artifact.version == local.artifact.version
    assert made.artifact.file is not None
    with store.open(made.artifact.file) as reader:
        assert reader.read(0, reader.size) == file_of(local).read_bytes()
    assert made.summary["logits"]["loaded"] == "vocabulary"
    assert local.summary["logits"]["loaded"] == "whole"
