"""An adapter of a quantized base is merged into the 16-bit one, found by name, or refused with what to register."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.artifacts import path_of
from dispatcher.errors import ExportError, Unsupported
from exporter.quantized import is_stored_quantized, quantization_of, twin_of, without_quantization
from exporter.sources import open_base
from tests.exporter.damage import edit_config
from tests.exporter.exporting import export, merged_into
from tests.exporter.hub import COMMIT, Hub, hub_serving, in_a_process
from tests.gemmas import (
    CASES,
    Layout,
    assert_same_tensors,
    build_model,
    checkpoint_tensors,
    file_tensors,
    load_model,
    make_adapter,
    quantize_in_place,
    renamed,
    save_base,
)
from tests.gemmas.quantized import CONFIG, edit_base_config

QUANTIZED = "unsloth/tiny-it-unsloth-bnb-4bit"
TWIN = "unsloth/tiny-it"


@pytest.mark.parametrize(
    ("model_id", "twin"),
    [
        ("unsloth/gemma-3-4b-it-unsloth-bnb-4bit", "unsloth/gemma-3-4b-it"),
        ("unsloth/gemma-3-4b-it-bnb-4bit", "unsloth/gemma-3-4b-it"),
        ("unsloth/gemma-4-e2b-it-UNSLOTH-BNB-4bit", "unsloth/gemma-4-e2b-it"),
        ("unsloth/medgemma-27b-text-it-bnb-4bit", "unsloth/medgemma-27b-text-it"),
        ("unsloth/gemma-3-4b-it-GGUF", "unsloth/gemma-3-4b-it"),
        ("unsloth/gemma-3-27b-it-FP8-Dynamic", "unsloth/gemma-3-27b-it"),
        ("google/gemma-3-4b-it-qat-q4_0-gguf", "google/gemma-3-4b-it-qat-q4_0-unquantized"),
        ("RedHatAI/gemma-3-4b-it-FP8-dynamic", "google/gemma-3-4b-it"),
        ("RedHatAI/gemma-3-4b-it-quantized.w4a16", "google/gemma-3-4b-it"),
        ("ISTA-DASLab/gemma-3-27b-it-GPTQ-4b-128g", "google/gemma-3-27b-it"),
        ("mlx-community/gemma-3-4b-it-4bit", "google/gemma-3-4b-it"),
        ("ann/gemma-tales-AWQ", "ann/gemma-tales"),
        ("ann/gemma-tales-GPTQ-Int4", "ann/gemma-tales"),
        ("unsloth/gemma-3-4b-it", None),
        ("google/gemma-3-4b-it-qat-q4_0-unquantized", None),
        ("google/gemma-3-1b-it-qat-int4-unquantized", None),
        ("ann/awqward-gemma", None),
        ("ann/-bnb-4bit", None),
        ("gemma-bnb-4bit", None),
    ],
)
def test_a_quantized_name_speaks_of_its_twin(model_id: str, twin: str | None) -> None:
    assert twin_of(model_id) == twin


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"model_type": "gemma3"}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": CONFIG}, "bitsandbytes"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "of an unnamed kind"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_what_a_config_says_of_quantization_is_read_and_removed(config: dict[str, Any], method: str | None) -> None:
    before = json.dumps(config)
    assert quantization_of(config) == method
    assert quantization_of(without_quantization({**config, "hidden_size": 8})) is None
    assert without_quantization({**config, "hidden_size": 8})["hidden_size"] == 8
    assert json.dumps(config) == before


def test_a_config_without_quantization_is_left_alone() -> None:
    config = {"b": 1, "text_config": {"vocab_size": 8}, "a": [2]}
    assert without_quantization(config) == config


@pytest.mark.parametrize(
    "name_and_dtype",
    [
        ("model.layers.0.mlp.up_proj.weight", "U8"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "F32"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "F32"),
        ("model.layers.0.mlp.up_proj.SCB", "F32"),
        ("model.layers.0.mlp.up_proj.qweight", "I32"),
        ("model.layers.0.mlp.up_proj.weight_packed", "I32"),
        ("model.layers.0.mlp.up_proj.weight_scale", "BF16"),
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3"),
    ],
)
def test_any_quantized_tensor_makes_a_quantized_checkpoint(name_and_dtype: tuple[str, str]) -> None:
    assert is_stored_quantized({"model.norm.weight": "BF16", **dict([name_and_dtype])})


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_no_16_bit_gemma_is_taken_for_a_quantized_one(family: str, layout: Layout) -> None:
    tensors = checkpoint_tensors(family, build_model(family))
    assert not is_stored_quantized({renamed(family, layout, name): "BF16" for name in tensors} | {"ids": "I64"})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit base, the same quantized, and an adapter that was trained on it."""
    directory = tmp_path_factory.mktemp("pristine")
    model = save_base("gemma3_text", directory / "base")
    make_adapter("gemma3_text", model, directory / "adapter")
    shutil.copytree(directory / "base", directory / "quantized")
    quantize_in_place(directory / "quantized")
    return directory


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    """A copy of them to change."""
    return Path(shutil.copytree(pristine, tmp_path / "place"))


def manifest_in(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "export.json").read_text()))


@pytest.mark.parametrize("engine", ["streaming", "peft"])
def test_16_bit_weights_with_a_leftover_in_the_config_are_merged_without_it(place: Path, engine: str) -> None:
    expected = merged_into(place / "base", place / "adapter", place / "clean", engine=engine)
    before = json.loads((place / "base" / "config.json").read_text())
    edit_base_config(place / "base", quantization_config=CONFIG)
    merged = merged_into(place / "base", place / "adapter", place / "store", engine=engine)
    assert_same_tensors(file_tensors(merged), file_tensors(expected))
    written = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in written
    assert engine != "streaming" or written == before
    load_model(merged)
    assert open_base(str(place / "base"), None, lambda: None).config == before


def test_a_config_without_leftovers_is_copied_byte_for_byte(place: Path) -> None:
    path = place / "base" / "config.json"
    path.write_text(path.read_text().replace("\n", "\n\n") + "   ")
    merged = merged_into(place / "base", place / "adapter", place / "store")
    assert (merged / "config.json").read_bytes() == path.read_bytes()


def refusal(place: Path, base: str, **document: Any) -> ExportError:
    """How exporting onto a base of `place` fails; nothing may be left in the store."""
    with pytest.raises(ExportError) as refused:
        export(place / base, place / "adapter", place / "store", **document)
    assert not [path for path in (place / "store").rglob("*") if path.is_file()]
    return refused.value


@pytest.mark.parametrize("named", [None, "", "./outputs/gemma", "/content/gemma-bnb-4bit", 7, "outputs"])
def test_a_quantized_directory_of_which_nobody_names_the_source_is_refused(place: Path, named: object) -> None:
    """What it was made from cannot be told from a path."""
    edit_config(place / "adapter", base_model_name_or_path=named)
    error = refusal(place, "quantized")
    assert error.error_code == "base_quantized"
    for word in (str(place / "quantized"), "bitsandbytes", "Register", "merge_base"):
        assert word in error.message


def test_a_directory_that_an_adapter_names_is_none_on_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.parent)
    edit_config(place / "adapter", base_model_name_or_path="place/base")
    assert refusal(place, "quantized").error_code == "base_quantized"


def test_the_job_may_name_the_model_to_merge_into(place: Path) -> None:
    expected = merged_into(place / "base", place / "adapter", place / "clean")
    base = str(place / "base")
    merged = merged_into(place / "quantized", place / "adapter", place / "store", merge_base=base)
    assert_same_tensors(file_tensors(merged), file_tensors(expected))
    manifest, direct = manifest_in(merged), manifest_in(expected)
    assert manifest["base"] == {**direct["base"], "requested": str(place / "quantized")}
    assert manifest["adapter"]["trained_on"] == {"id": str(place / "quantized")}
    assert "trained_on" not in direct["adapter"]
    assert merged.name == expected.name, "the version is that of the base really used"


def test_a_quantized_model_to_merge_into_is_refused(place: Path) -> None:
    quantized = str(place / "quantized")
    assert refusal(place, "base", merge_base=quantized).error_code == "base_quantized"


def test_merging_into_dequantized_weights_is_refused_for_now(place: Path) -> None:
    error = refusal(place, "quantized", merge_base="dequantized")
    assert isinstance(error, Unsupported)
    assert error.error_code == "unsupported_merge_base_dequantized"


def test_what_a_16_bit_job_was_trained_on_is_noted(place: Path) -> None:
    """The platform may name the 16-bit model, and the adapter the quantized one."""
    edit_config(place / "adapter", base_model_name_or_path=QUANTIZED)
    manifest = manifest_in(merged_into(place / "base", place / "adapter", place / "store"))
    assert manifest["adapter"]["trained_on"] == {"id": QUANTIZED}
    assert "requested" not in manifest["base"]


@pytest.fixture
def hub(place: Path) -> Iterator[Hub]:
    """A hub with a quantized model and its twin, and some others."""
    with hub_serving(place / "base") as hub:
        (place / "gguf").mkdir()
        (place / "gguf" / "tiny-it-Q4_K_M.gguf").write_bytes(b"GGUF")
        shutil.copytree(place / "base", place / "leftover")
        edit_base_config(place / "leftover", quantization_config=CONFIG)
        shutil.copytree(place / "quantized", place / "named")
        edit_base_config(place / "named", _name_or_path=QUANTIZED)
        hub.more |= {
            QUANTIZED: place / "quantized",
            TWIN: place / "base",
            "unsloth/tiny-it-GGUF": place / "gguf",
            "ann/tales-bnb-4bit": place / "base",
            "ann/leftover-bnb-4bit": place / "leftover",
            "ann/lonely-bnb-4bit": place / "quantized",
            "ann/packed": place / "quantized",
            "ann/named": place / "named",
        }
        yield hub


RESOLVE = """
import json, sys
from dispatcher.contract import TrainingJob
from dispatcher.errors import ExportError
from exporter.bases import base_for
for job, adapter in json.loads(sys.argv[1]):
    document = {"user_id": "ann", "status": "completed", **job}
    try:
        base = base_for(TrainingJob.from_document("job-1", document), adapter, lambda: None)
    except ExportError as error:
        print(json.dumps([error.error_code, error.message]))
    else:
        print(json.dumps([base.model_id, {"requested": base.requested, "trained_on": base.trained_on}]))
"""
EXPORT = """
import sys
from pathlib import Path
from tests.exporter.exporting import export
print(export(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])).artifact.uri)
"""


def resolved(hub: Hub, cache: Path, *cases: tuple[dict[str, Any], dict[str, Any]]) -> list[tuple[str, Any]]:
    """What base each (training job, adapter config) gets: its id and history, or the refusal's code and message."""
    return [(first, second) for first, second in map(json.loads, in_a_process(hub, cache, RESOLVE, json.dumps(cases)))]


def job(base: str, **fields: str) -> dict[str, str]:
    return {"base_model_id": base, **fields}


def naming(model_id: str, **fields: str) -> dict[str, str]:
    """An adapter's config that names a base."""
    return {"base_model_name_or_path": model_id, **fields}


def test_a_quantized_id_is_merged_into_its_twin_and_the_manifest_says_so(hub: Hub, place: Path) -> None:
    """With the real client: of the quantized weights, the headers alone are read."""
    expected = merged_into(place / "base", place / "adapter", place / "clean")
    cache, adapter = place / "cache", str(place / "adapter")
    (uri,) = in_a_process(hub, cache, EXPORT, QUANTIZED, adapter, str(place / "store"))
    merged = path_of(uri)
    assert_same_tensors(file_tensors(merged), file_tensors(expected))
    manifest = manifest_in(merged)
    assert manifest["base"] == {"id": TWIN, "revision": COMMIT, "requested": QUANTIZED}
    assert manifest["adapter"]["trained_on"] == {"id": QUANTIZED, "quantization": "bitsandbytes"}
    assert f"{QUANTIZED}/model.safetensors" not in hub.fetched
    assert f"{TWIN}/model.safetensors" in hub.fetched
    (uri,) = in_a_process(hub, cache, EXPORT, TWIN, adapter, str(place / "other"))
    assert path_of(uri).name == merged.name, "the version is that of the base really used"


def test_the_16_bit_base_is_found_by_name_or_by_what_the_adapter_names(hub: Hub, place: Path) -> None:
    unknown = naming("/content/gemma")
    hub.tags.add((QUANTIZED, "v1"))
    hub.tags.add((TWIN, "v2"))
    cases = {
        "a twin": (job(QUANTIZED), unknown, TWIN),
        "a revision pins the quantized repository, not its twin": (
            job(QUANTIZED, base_model_revision="v1"),
            unknown,
            TWIN,
        ),
        "an adapter's own pin is of what it names": (job("ann/packed"), naming(TWIN, revision="v2"), TWIN),
        "a GGUF repository": (job("unsloth/tiny-it-GGUF"), unknown, TWIN),
        "a quantized repository that is gone": (job("unsloth/tiny-it-bnb-4bit"), unknown, TWIN),
        "a quantized name, but no quantized weights": (job("ann/tales-bnb-4bit"), unknown, "ann/tales-bnb-4bit"),
        "likewise with a leftover": (job("ann/leftover-bnb-4bit"), unknown, "ann/leftover-bnb-4bit"),
        "the adapter names a 16-bit model": (job("ann/packed"), naming(TWIN), TWIN),
        "the adapter names a quantized one": (job("ann/packed"), naming(QUANTIZED), TWIN),
        "the job goes before the adapter": (job(QUANTIZED), naming("google/tiny"), TWIN),
        "the adapter where the job's twin is not there": (
            job("ann/lonely-bnb-4bit"),
            naming("google/tiny"),
            "google/tiny",
        ),
        "the config of the quantized base": (job("ann/named"), unknown, TWIN),
        "a quantized directory whose adapter names a model": (job(str(place / "quantized")), naming(QUANTIZED), TWIN),
        "a quantized directory whose config does": (job(str(place / "named")), unknown, TWIN),
        "the job names it": (job(QUANTIZED, merge_base="google/tiny"), naming(TWIN), "google/tiny"),
        "at a revision": (job(QUANTIZED, merge_base=f"google/tiny@{COMMIT}"), naming(TWIN), "google/tiny"),
    }
    answers = resolved(hub, place / "cache", *((document, adapter) for document, adapter, _ in cases.values()))
    found = dict(zip(cases, (model_id for model_id, _ in answers), strict=True))
    assert found == {name: expected for name, (_, _, expected) in cases.items()}, answers
    history = dict(zip(cases, (history for _, history in answers), strict=True))
    for name, (document, _, expected) in cases.items():
        asked = document["base_model_id"]
        assert history[name]["requested"] == (asked if asked != expected else None), name
        assert (history[name]["trained_on"] or {"id": None})["id"] == (asked if asked != expected else None), name
    assert f"/api/models/{TWIN}/revision/v2?blobs=true" in hub.paths
    pinned = history["a revision pins the quantized repository, not its twin"]["trained_on"]
    assert pinned == {"id": QUANTIZED, "revision": "v1", "quantization": "bitsandbytes"}


def test_a_quantized_id_without_a_twin_is_refused_with_what_was_tried(hub: Hub, place: Path) -> None:
    unknown = naming("/content/gemma")
    cases = {
        "no twin on the hub": (job("ann/lonely-bnb-4bit"), unknown, "base_quantized"),
        "no name to go by": (job("ann/packed"), naming("ann/packed"), "base_quantized"),
        "no such revision of the adapter's": (job("ann/packed"), naming(TWIN, revision="v9"), "base_quantized"),
        "the adapter's is quantized too": (job("ann/lonely-bnb-4bit"), naming("ann/packed"), "base_quantized"),
        "neither is there": (job("ann/nothing-bnb-4bit"), unknown, "base_missing"),
        "no such revision": (job(QUANTIZED, base_model_revision="v9"), unknown, "base_revision_missing"),
        "nor of what to merge into": (job(QUANTIZED, merge_base="google/tiny@v9"), unknown, "base_revision_missing"),
        "a quantized model to merge into": (job(TWIN, merge_base=QUANTIZED), unknown, "base_quantized"),
    }
    answers = resolved(hub, place / "cache", *((document, adapter) for document, adapter, _ in cases.values()))
    codes = dict(zip(cases, (code for code, _ in answers), strict=True))
    assert codes == {name: code for name, (_, _, code) in cases.items()}, answers
    assert "ann/lonely is not on the hub" in answers[0][1]
    assert f"{TWIN} has no 'v9'" in answers[2][1]
    assert "ann/packed is quantized too" in answers[3][1]
    assert "merge_base" in answers[1][1]
    assert not [path for path in hub.fetched if path.endswith(".safetensors")]


def test_a_twin_that_is_gated_asks_for_a_token(hub: Hub, place: Path) -> None:
    """A refusal that the caller can mend is not hidden behind another."""
    hub.gated = True
    ((code, message),) = resolved(hub, place / "cache", (job(str(place / "quantized")), naming(QUANTIZED)))
    assert code == "base_gated"
    assert TWIN in message
    assert "hf_token" in message
