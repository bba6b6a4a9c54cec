"""A training result that is a whole model is published as it lies, from a disk or a bucket, or refused by name."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from dispatcher.artifacts import ArtifactWriter, StoredFile, path_of
from dispatcher.contract import State
from dispatcher.errors import ExportError
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.local_artifacts import LocalArtifacts
from exporter import passthrough
from exporter.job import ExitCode
from exporter.model_card import CARD_NAME
from tests.buckets import bucket_named, new_bucket
from tests.exporter.damage import edit_header
from tests.exporter.exporting import export, merged_into
from tests.exporter.hub import COMMIT, hub_serving, in_a_process
from tests.exporter.place import Interfering, Place
from tests.gemmas import (
    CASES,
    Layout,
    file_tensors,
    load_model,
    make_adapter,
    quantize_in_place,
    save_base,
    text_logits,
)
from tests.gemmas.quantized import CONFIG, edit_base_config

NOWHERE = "/nowhere/base"
TEMPLATE = "additional_chat_templates/tool.jinja"
JUNK = (
    *("README.md", "training_args.bin", "optimizer.pt", "pytorch_model.bin", "optimizer.safetensors"),
    *("trainer_state.json", "checkpoint-5/model.safetensors", "checkpoint-5/config.json", "runs/events.out"),
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune with all that a user loads, and things that nobody should."""
    directory = tmp_path_factory.mktemp("pristine")
    save_base("gemma3_text", directory / "model", seed=1)
    for name in (TEMPLATE, *JUNK):
        (directory / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "model" / name).write_text("x")
    return directory


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(pristine / "model", tmp_path / "model"))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under a directory; of one that we published, the manifest and the model card left out."""
    ours = ("export.json", CARD_NAME) if (directory / "export.json").exists() else ()
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in ours}


def manifest_in(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "export.json").read_text()))


def refusal(model: Path, *, base: Path | str = NOWHERE) -> ExportError:
    """How exporting a model fails; nothing may be left in the store."""
    store = model.parent / "store"
    with pytest.raises(ExportError) as refused:
        export(base, model, store)
    assert not [path for path in store.rglob("*") if path.is_file()]
    return refused.value


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_full_fine_tune_of_every_family_is_published_byte_for_byte(
    family: str, layout: Layout, tmp_path: Path
) -> None:
    """In any layout of names, with no base anywhere; and it loads and computes the same."""
    save_base(family, tmp_path / "model", layout=layout, shard_bytes=6000)
    published = merged_into(NOWHERE, tmp_path / "model", tmp_path / "store")
    assert contents(published) == contents(tmp_path / "model")
    expected, found = (text_logits(load_model(path, dtype=torch.float32)) for path in (tmp_path / "model", published))
    assert torch.equal(found, expected)
    assert manifest_in(published)["tensors"]["copied"] == len(file_tensors(tmp_path / "model"))


def test_nothing_but_what_a_user_loads_is_published_and_the_manifest_says_what_it_is(model: Path) -> None:
    published = merged_into(NOWHERE, model, model.parent / "store")
    original = contents(model)
    assert contents(published) == {name: content for name, content in original.items() if name not in JUNK}
    assert TEMPLATE in contents(published)
    manifest = manifest_in(published)
    assert manifest["engine"] == {"name": "passthrough", "version": passthrough.VERSION}
    assert manifest["base"] == {"id": NOWHERE, "revision": "not read", "files": []}
    assert manifest["adapter"]["kind"] == "full_model"
    size = (model / "model.safetensors").stat().st_size
    count = len(safetensors.torch.load_file(model / "model.safetensors"))
    assert manifest["tensors"] == {"copied": count, "bytes": size}
    assert manifest["verified"] == {"files_crc32c": len(original) - len(JUNK), "tensors_finite": count}
    assert {file["name"] for file in manifest["files"]} == {CARD_NAME, *contents(published)}
    assert "as it was trained" in (published / CARD_NAME).read_text()


def test_a_single_file_goes_before_an_index_as_in_transformers(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    published = merged_into(NOWHERE, model, model.parent / "store")
    assert [name for name in contents(published) if name.startswith("model")] == ["model.safetensors"]


@pytest.mark.parametrize("engine", ["auto", "streaming", "peft"])
def test_it_is_the_same_whatever_engine_was_asked_for(model: Path, engine: str) -> None:
    summary = export(NOWHERE, model, model.parent / "store", engine=engine).summary
    assert summary["engine"] == "passthrough"


def test_an_unknown_engine_is_still_refused(model: Path) -> None:
    with pytest.raises(ExportError) as refused:
        export(NOWHERE, model, model.parent / "store", engine="magic")
    assert refused.value.error_code == "engine_not_available"


def test_an_adapter_with_a_config_beside_it_is_an_adapter(tmp_path: Path) -> None:
    """As some trainers save it: the config is that of its base."""
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    plain = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "plain")
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "adapter")
    assert export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store").summary["merged"] == 14
    assert plain.summary["merged"] == 14
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ExportError) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")
    assert refused.value.error_code == "adapter_config_missing"


def test_a_tokenizer_that_was_not_saved_comes_from_the_base(model: Path, tmp_path: Path) -> None:
    """And its template; and the manifest says which files those are, and of which revision."""
    save_base("gemma3_text", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("the base's")
    missing = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
    for name in (*missing, "chat_template.jinja"):
        (model / name).unlink()
    published = merged_into(tmp_path / "base", model, tmp_path / "store")
    base, own = contents(tmp_path / "base"), contents(model)
    taken = [*missing, "chat_template.jinja"]
    assert {name: contents(published)[name] for name in taken} == {name: base[name] for name in taken}
    assert contents(published)["config.json"] == own["config.json"]
    manifest = manifest_in(published)
    assert set(manifest["base"]["files"]) == set(taken)
    assert manifest["base"]["revision"].startswith("directory:")
    transformers.AutoTokenizer.from_pretrained(published)


def test_an_own_tokenizer_is_never_mixed_with_the_bases(model: Path, tmp_path: Path) -> None:
    """But for `tokenizer.model`, which transformers 5 does not save."""
    save_base("gemma3_text", tmp_path / "base")
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    (model / "tokenizer.model").unlink()
    published = merged_into(tmp_path / "base", model, tmp_path / "store")
    assert manifest_in(published)["base"]["files"] == ["tokenizer.model"]
    assert not (published / "added_tokens.json").exists()


def test_only_a_missing_tokenizer_model_fails_nothing(model: Path) -> None:
    (model / "tokenizer.model").unlink()
    published = merged_into(NOWHERE, model, model.parent / "store")
    assert not (published / "tokenizer.model").exists()
    assert manifest_in(published)["base"] == {"id": NOWHERE, "revision": "not read", "files": []}


EXPORT = """
import sys
from pathlib import Path
from tests.exporter.exporting import export
print(export(sys.argv[1], sys.argv[2], Path(sys.argv[3])).artifact.uri)
"""


def test_of_a_base_on_the_hub_the_missing_files_alone_are_fetched(model: Path, tmp_path: Path) -> None:
    """Even of a quantized one: its tokenizer is that of its twin."""
    save_base("gemma3_text", tmp_path / "base")
    quantize_in_place(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer.model"):
        (model / name).unlink()
    with hub_serving(tmp_path / "base") as hub:
        arguments = ("google/tiny", str(model), str(tmp_path / "store"))
        (uri,) = in_a_process(hub, tmp_path / "cache", EXPORT, *arguments)
    manifest = manifest_in(path_of(uri))
    assert manifest["base"]["revision"] == COMMIT
    assert {"tokenizer.json", "tokenizer.model"} <= set(manifest["base"]["files"])
    assert "google/tiny/tokenizer.json" in hub.fetched
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_a_missing_tokenizer_that_the_base_cannot_give_is_said(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (model / name).unlink()
    error = refusal(model)
    assert error.error_code == "base_missing"
    assert "tokenizer" in error.message
    assert NOWHERE in error.message


def test_a_multimodal_model_needs_its_processor_too(tmp_path: Path) -> None:
    save_base("gemma3", tmp_path / "base")
    save_base("gemma3", tmp_path / "model", seed=1)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "model" / name).unlink()
    assert "processor" in refusal(tmp_path / "model").message
    published = merged_into(tmp_path / "base", tmp_path / "model", tmp_path / "store")
    assert manifest_in(published)["base"]["files"] == ["preprocessor_config.json", "processor_config.json"]


def test_16_bit_weights_with_a_leftover_in_the_config_are_published_without_it(model: Path) -> None:
    """No library loads them with it; every other file stays as it is."""
    before = json.loads((model / "config.json").read_text())
    edit_base_config(model, quantization_config=CONFIG)
    published = merged_into(NOWHERE, model, model.parent / "store")
    assert json.loads((published / "config.json").read_text()) == before
    assert contents(published)["model.safetensors"] == contents(model)["model.safetensors"]
    load_model(published)


def _tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Changes the norm's weight."""

    def damage(model: Path) -> None:
        path = model / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({**tensors, "model.norm.weight": change(tensors["model.norm.weight"])}, path)

    return damage


def _index(content: str) -> Callable[[Path], None]:
    """Puts an index in the place of the one file."""

    def damage(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        (model / "model.safetensors.index.json").write_text(content)

    return damage


def _config(content: str) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").write_text(content)


def _shard(name: str) -> str:
    """An index with one tensor, in a file of this name."""
    return json.dumps({"weight_map": {"a": name}})


def _cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _lie(model: Path) -> None:
    edit_header(model / "model.safetensors", lambda header: header["model.norm.weight"].update(shape=[3]))


def _last_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[-1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        pytest.param(lambda model: (model / "model.safetensors").unlink(), "model_pickle_only", id="only a pickle"),
        pytest.param(_tensor(_last_value(torch.nan)), "model_not_finite", id="NaN"),
        pytest.param(_tensor(_last_value(-torch.inf)), "model_not_finite", id="infinity"),
        pytest.param(_tensor(lambda tensor: tensor.to(torch.uint8)), "model_quantized", id="8-bit tensor"),
        pytest.param(quantize_in_place, "model_quantized", id="4 bits"),
        pytest.param(_cut, "safetensors_truncated", id="cut short"),
        pytest.param(_lie, "safetensors_corrupt", id="header lies"),
        pytest.param(lambda model: edit_base_config(model, model_type="llama"), "model_not_gemma", id="no Gemma"),
        pytest.param(_config("{"), "model_config_invalid", id="broken config"),
        pytest.param(_config("[]"), "model_config_invalid", id="config a list"),
        pytest.param(_index("{"), "model_index_invalid", id="broken index"),
        pytest.param(_index("{}"), "model_index_invalid", id="index without a map"),
        pytest.param(_index(_shard("../x.safetensors")), "model_index_invalid", id="index leads out"),
        pytest.param(_index(_shard("training_args.bin")), "model_index_invalid", id="index to a pickle"),
        pytest.param(_index(_shard("model-1.safetensors")), "model_index_invalid", id="index lies"),
        pytest.param(_index(_shard("model-2.safetensors")), "model_weights_missing", id="shard missing"),
    ],
)
def test_an_unsound_model_is_refused_by_name_and_leaves_nothing(
    damage: Callable[[Path], object], code: str, model: Path
) -> None:
    damage(model)
    assert refusal(model).error_code == code


def test_without_any_weights_it_is_neither(model: Path) -> None:
    for path in [*model.glob("*.bin"), *model.glob("*.pt"), *model.glob("*.safetensors")]:
        path.unlink()
    error = refusal(model)
    assert error.error_code == "model_weights_missing"
    assert "adapter_config.json" in error.message


def test_a_bad_value_is_found_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every element of tensors of different widths, some not aligned, and blocks that end anywhere."""
    monkeypatch.setattr(passthrough, "BLOCK_BYTES", 23)
    whole = {
        "a": torch.ones(5),
        "b": torch.tensor([True] * 3),
        "c": torch.ones(0, 7),
        "d": torch.ones(7, dtype=torch.bfloat16),
        "e": torch.ones(4, dtype=torch.float64),
        "f": torch.ones(3, dtype=torch.float16),
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gemma3_text"}')
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    path = tmp_path / "model" / "model.safetensors"
    safetensors.torch.save_file(whole, path)
    published = merged_into(NOWHERE, tmp_path / "model", tmp_path / "sound")
    assert contents(published)["model.safetensors"] == path.read_bytes()
    for name in "adef":
        for index in range(whole[name].numel()):
            broken = {key: tensor.clone() for key, tensor in whole.items()}
            broken[name][index] = torch.nan
            safetensors.torch.save_file(broken, path)
            error = refusal(tmp_path / "model")
            assert error.error_code == "model_not_finite", (name, index)
            assert f"'{name}'" in error.message


class _Corrupting(LocalArtifacts):
    """A disk that flips a bit of what was written to it."""

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        writer, target = super().create(path, size=size), path_of(self.uri(path))

        class Writer:
            write = staticmethod(writer.write)
            discard = staticmethod(writer.discard)

            @staticmethod
            def commit() -> StoredFile:
                stored = writer.commit()
                if target.name == "model.safetensors":
                    content = bytearray(target.read_bytes())
                    content[-1] ^= 1
                    target.write_bytes(content)
                return stored

        return Writer()


def test_what_was_written_is_read_again(model: Path) -> None:
    store = _Corrupting(model.parent / "store")
    with pytest.raises(ExportError) as refused:
        export(NOWHERE, model, store)
    assert refused.value.error_code == "copy_differs"
    assert not [path for path in (model.parent / "store").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_model_that_changes_while_it_is_copied_is_noticed(model: Path, name: str, change: str) -> None:
    """Whether before or after that file was read."""
    store = Interfering(model.parent / "store")

    def interfere() -> None:
        if change == "deleted":
            (model / name).unlink(missing_ok=True)
        else:
            content = (model / name).read_bytes()
            (model / name).write_bytes(content[:-1] + b"!")

    store.interfere = interfere
    with pytest.raises(ExportError) as refused:
        export(NOWHERE, model, store)
    assert (refused.value.error_code, refused.value.retryable) == ("source_changed", True)
    assert not [path for path in (model.parent / "store").rglob("*") if path.is_file()]


def test_from_bucket_to_bucket_it_is_the_local_one_and_nothing_is_copied_here(
    model: Path, storage_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = merged_into(NOWHERE, model, model.parent / "store")
    theirs, store = new_bucket(), GcsArtifacts(new_bucket())
    for name, content in contents(model).items():
        bucket_named(theirs).blob(f"jobs/1/{name}").upload_from_string(content)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    result = export(NOWHERE, f"gs://{theirs}/jobs/1", store)
    assert result.artifact.version == local.name
    names = [file.name for file in store.list(result.artifact.uri) if file.name not in ("export.json", CARD_NAME)]
    assert {name: store.read(f"{result.artifact.uri}/{name}") for name in names} == contents(local)
    assert export(NOWHERE, f"gs://{theirs}/jobs/1", store).artifact == result.artifact


def test_a_job_with_a_full_fine_tune_is_done_once_and_recorded(place: Place) -> None:
    """Its version follows its files."""
    shutil.rmtree(place.root / "adapter")
    save_base("gemma3_text", place.root / "adapter", seed=1)
    shutil.rmtree(place.root / "base")
    place.queue()
    assert place.run() is ExitCode.DONE
    record = place.record()
    assert record.state is State.COMPLETED
    assert record.summary["engine"] == "passthrough"
    first = record.artifacts[0]
    place.requeue()
    assert place.run() is ExitCode.DONE
    assert place.record().artifacts[0] == first
    save_base("gemma3_text", place.root / "adapter", seed=2)
    place.requeue()
    assert place.run() is ExitCode.DONE
    assert place.record().artifacts[0].version != first.version
