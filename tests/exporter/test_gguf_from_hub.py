"""A GGUF made from the hub into a bucket: the base is copied there once, and its weights are put on no disk."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dispatcher.contract import TrainingJob
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.published import BASES_ROOT
from exporter.artifact import Result
from exporter.shared_pass import SharedPass
from exporter.tasks import Tasks
from tests.buckets import bucket_named, new_bucket
from tests.exporter.exporting import Undisturbed, export_gguf_of, file_of, gguf_of, training_job
from tests.exporter.hub import COMMIT, Hub, hub_serving, pointing_at
from tests.gemmas.llama import llama_adapter, llama_base

PART_WEIGHTS = 150_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of several shards, of the name that it has on the hub, and an adapter."""
    directory = tmp_path_factory.mktemp("models")
    llama_adapter(
        "gemma3_text", llama_base("gemma3_text", directory / "tiny", shard_bytes=800_000), directory / "adapter"
    )
    return directory


@pytest.fixture(scope="module")
def local(models: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that is made of directories."""
    (made,) = export_gguf_of(models / "tiny", models / "adapter", tmp_path_factory.mktemp("store"))
    return file_of(made).read_bytes()


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_serving(models / "tiny") as hub:
        pointing_at(hub, monkeypatch, tmp_path / "cache")
        yield hub
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


@pytest.fixture
def store(storage_server: str) -> GcsArtifacts:
    return GcsArtifacts(new_bucket())


@pytest.fixture
def job(models: Path, storage_server: str) -> TrainingJob:
    """Of the hub's model, with its adapter in a bucket."""
    name = new_bucket()
    for path in (models / "adapter").iterdir():
        bucket_named(name).blob(f"jobs/1/{path.name}").upload_from_filename(path)
    return training_job("google/tiny", f"gs://{name}/jobs/1")


def weights(models: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (models / "tiny").glob("*.safetensors")}


def kept(store: GcsArtifacts) -> dict[str, bytes]:
    """What is in the bucket of the base, by name."""
    uri = store.uri(f"{BASES_ROOT}/google/tiny@{COMMIT}")
    names = [file.name for file in store.list(uri) if not file.name.endswith(".json")]
    return {name: store.read(f"{uri}/{name}") for name in names}


def content(store: GcsArtifacts, result: Result | None) -> bytes:
    """The bytes of a finished export's file."""
    assert result is not None
    assert result.artifact.file is not None
    return store.read(result.artifact.file)


def read_from(hub: Hub) -> dict[str, int]:
    """How many bytes were asked for of each weight file, and were sent."""
    asked: dict[str, int] = {}
    for seen in hub.seen:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", seen.headers.get("Range", ""))
        if found and seen.host == "storage":
            asked[seen.target] = asked.get(seen.target, 0) + int(found[2]) + 1 - int(found[1])
    return asked


class Told(Undisturbed):
    """A hold that remembers what was reported."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float]] = []

    def report(self, stage: str, progress: float) -> None:
        self.told.append((stage, progress))


def test_the_base_is_copied_into_the_bucket_once_for_all_quantizations(
    hub: Hub, models: Path, local: bytes, job: TrainingJob, store: GcsArtifacts
) -> None:
    """Before it is read: a converter asks for tensors in an order of its own."""
    shared, holds = SharedPass(2), [Told(), Told()]
    with ThreadPoolExecutor(2) as pool:
        first, second = (
            pool.submit(gguf_of, store, job, quantization, shared=shared, hold=hold, part_weights=PART_WEIGHTS)
            for quantization, hold in zip(("q8_0", "q6_k"), holds, strict=True)
        )
    assert content(store, first.result()) == local
    assert second.result() is not None
    assert kept(store) == weights(models)
    sent = sum(read_from(hub).values())
    size = sum(map(len, weights(models).values()))
    assert size <= sent < 1.1 * size
    for hold in holds:
        stages = list(dict.fromkeys(stage for stage, _ in hold.told))
        assert stages[-4:] == ["converting", "quantizing", "verifying", "publishing"]
        assert [progress for _, progress in hold.told] == sorted(progress for _, progress in hold.told)
    assert "fetching" in {stage for hold in holds for stage, _ in hold.told}


def test_a_base_that_is_in_the_bucket_is_not_asked_for(
    hub: Hub, local: bytes, job: TrainingJob, store: GcsArtifacts
) -> None:
    """By another export of it."""
    assert gguf_of(store, job, "q6_k") is not None
    hub.seen.clear()
    assert content(store, gguf_of(store, job, "q8_0")) == local
    assert read_from(hub) == {}


def test_each_task_copies_the_files_that_it_is_dealt(
    hub: Hub, models: Path, local: bytes, job: TrainingJob, store: GcsArtifacts
) -> None:
    """And reads those that are not there yet from the hub: no task waits for another."""
    assert gguf_of(store, job, "q8_0", tasks=Tasks(0, 2), part_weights=PART_WEIGHTS) is None
    first = kept(store)
    assert 0 < len(first) < len(weights(models))
    made = gguf_of(store, job, "q8_0", tasks=Tasks(1, 2), part_weights=PART_WEIGHTS)
    assert content(store, made) == local
    assert kept(store) == weights(models)


def test_nothing_is_kept_where_that_is_switched_off(
    hub: Hub, local: bytes, job: TrainingJob, store: GcsArtifacts
) -> None:
    """Every block is read straight from the hub."""
    assert content(store, gguf_of(store, job, "q8_0", base_cache=False, part_weights=PART_WEIGHTS)) == local
    assert kept(store) == {}
