"""A merged export whose adapter lies in Cloud Storage, and whose artifacts go there."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import ExportError
from dispatcher.gcs_artifacts import GcsArtifacts
from exporter.local_copies import adapter_here
from tests.buckets import bucket_named, new_bucket
from tests.exporter.exporting import export, merged_into
from tests.gemmas import make_adapter, save_base

TEMPLATE = "additional_chat_templates/tool.jinja"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter as a training service leaves it."""
    directory = tmp_path_factory.mktemp("place")
    make_adapter("gemma3_text", save_base("gemma3_text", directory / "base", shard_bytes=20_000), directory / "adapter")
    for name, content in {
        TEMPLATE: "{{ tools }}",
        "chat_template.jinja": "{{ messages }}",
        "optimizer.pt": "never",
        "adapter_model.bin": "never",
        "checkpoint-5/adapter_model.safetensors": "never",
        "checkpoint-5/adapter_config.json": "never",
        "optimizer.safetensors": "never",
        "trainer_state.json": "never",
        "notes.txt": "never",
        "additional_chat_templates/notes.txt": "never",
        "additional_chat_templates/deeper/tool.jinja": "never",
    }.items():
        (directory / "adapter" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "adapter" / name).write_text(content)
    return directory


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def adapter(place: Path, storage_server: str) -> str:
    """The adapter in a bucket of the training service's."""
    name = new_bucket()
    for path in (place / "adapter").rglob("*"):
        if path.is_file():
            relative = path.relative_to(place / "adapter").as_posix()
            bucket_named(name).blob(f"jobs/1/{relative}").upload_from_filename(path)
    return f"gs://{name}/jobs/1"


@pytest.fixture
def store(storage_server: str) -> GcsArtifacts:
    return GcsArtifacts(new_bucket())


def manifest_of(content: bytes) -> dict[str, Any]:
    """What two exports of the same have in common."""
    manifest = json.loads(content)
    del manifest["run"], manifest["adapter"]["uri"]
    return dict(manifest)


@pytest.mark.parametrize("engine", ["streaming", "peft"])
def test_an_export_from_bucket_to_bucket_is_the_local_one(
    place: Path, tmp_path: Path, scratch: Path, adapter: str, store: GcsArtifacts, engine: str
) -> None:
    """Byte for byte, of the same version, with the same proof; and no copy of the adapter stays here."""
    local = merged_into(place / "base", place / "adapter", tmp_path / "store", engine=engine)
    result = export(place / "base", adapter, store, engine=engine)
    assert result.artifact.version == local.name
    assert result.artifact.uri == store.uri(f"merged_models/job-1/{local.name}")
    names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    assert TEMPLATE in names
    assert [file.name for file in store.list(result.artifact.uri)] == names
    for name in names:
        there, here = store.read(f"{result.artifact.uri}/{name}"), (local / name).read_bytes()
        assert manifest_of(there) == manifest_of(here) if name == "export.json" else there == here
    assert list(scratch.iterdir()) == []


def test_a_finished_export_is_found_without_a_copy_of_the_adapter(
    place: Path, adapter: str, store: GcsArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing says all that it takes."""
    first = export(place / "base", adapter, store)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert export(place / "base", adapter, store).artifact == first.artifact


def test_only_what_an_export_uses_is_copied(adapter: str, store: GcsArtifacts, scratch: Path) -> None:
    """By name: never a pickle, an optimizer's state or a checkpoint."""
    with adapter_here(store, adapter, store.list(adapter)) as directory:
        found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert found == {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", TEMPLATE}
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_an_adapter_that_changes_after_it_was_listed_is_not_merged(
    adapter: str, store: GcsArtifacts, scratch: Path, change: str
) -> None:
    """The fingerprint would be of other weights."""
    files = store.list(adapter)
    bucket, _, prefix = adapter.removeprefix("gs://").partition("/")
    weights = bucket_named(bucket).blob(f"{prefix}/adapter_model.safetensors")
    if change == "replaced":
        weights.reload()
        weights.upload_from_string(bytes(weights.size))
    else:
        weights.delete()
    with pytest.raises(ExportError) as error, adapter_here(store, adapter, files):
        pass
    assert (error.value.error_code, error.value.retryable) == ("source_changed", True)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ([], "adapter_missing"),
        (["adapter_config.json", "adapter_model.bin"], "adapter_pickle_only"),
        (["adapter_config.json"], "adapter_weights_missing"),
        (["adapter_model.safetensors"], "adapter_config_missing"),
    ],
)
def test_an_adapter_that_is_none_is_refused_as_on_a_disk(
    place: Path, store: GcsArtifacts, names: list[str], code: str
) -> None:
    """With nothing left in the bucket."""
    theirs = new_bucket()
    for name in names:
        bucket_named(theirs).blob(f"a/{name}").upload_from_filename(place / "adapter" / name)
    with pytest.raises(ExportError) as error:
        export(place / "base", f"gs://{theirs}/a", store)
    assert error.value.error_code == code
    assert store.children("merged_models/job-1") == []


def test_a_base_in_a_bucket_is_refused_in_words(adapter: str, store: GcsArtifacts) -> None:
    """It is no id of the hub's either."""
    with pytest.raises(ExportError) as error:
        export("gs://bucket/base", adapter, store)
    assert error.value.error_code == "base_uri_unsupported"
