"""From the hub to a bucket, and what stays there of the base: both on loopback, no weights on a disk."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dispatcher.artifacts import ArtifactWriter
from dispatcher.contract import TrainingJob
from dispatcher.errors import ExportError, StorageFull
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.published import BASES_ROOT
from exporter.artifact import Recipe, Result
from exporter.hub_copy import Copy
from exporter.lease import Hold
from exporter.manifest import History
from exporter.merged import export_merged
from exporter.sources import open_streamed
from exporter.tasks import Tasks
from infra.local.hub_files import stored
from tests.buckets import bucket_named, new_bucket
from tests.exporter.exporting import QUICK, Undisturbed, merged_into, merged_record, training_document
from tests.exporter.hub import COMMIT, TOKEN, Hub, hub_serving, pointing_at
from tests.exporter.matrix import ROWS, trained
from tests.gemmas import make_adapter, save_base
from tests.gemmas.tokenizer import VOCABULARY

SHARD_BYTES = 6000


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base of several shards, and an adapter."""
    model = save_base("gemma3_text", tmp_path / "base", shard_bytes=SHARD_BYTES)
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_serving(models / "base") as hub:
        pointing_at(hub, monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture
def store(storage_server: str) -> GcsArtifacts:
    return GcsArtifacts(new_bucket())


def uploaded(adapter: Path) -> str:
    """The adapter in a bucket of the training service's."""
    name = new_bucket()
    for path in adapter.iterdir():
        bucket_named(name).blob(f"adapter/{path.name}").upload_from_filename(path)
    return f"gs://{name}/adapter"


def exported(
    adapter: Path,
    store: GcsArtifacts,
    *,
    token: str | None = None,
    base_cache: bool = True,
    job: str = "job-1",
    hold: Hold | None = None,
) -> Result:
    """Merge the hub's model into a bucket."""
    result = export_merged(
        store,
        TrainingJob.from_document(job, training_document("google/tiny", uploaded(adapter))),
        merged_record(job_id=job, export_id=f"{job}.merged"),
        engine="streaming",
        token=lambda: token,
        hold=hold or Undisturbed(),
        checks=QUICK,
        tasks=Tasks(),
        base_cache=base_cache,
    )
    assert result is not None
    return result


def kept(store: GcsArtifacts) -> dict[str, bytes]:
    """What is in the bucket of the base, by name."""
    uri = store.uri(f"{BASES_ROOT}/google/tiny@{COMMIT}")
    names = [file.name for file in store.list(uri) if not file.name.endswith(".json")]
    return {name: store.read(f"{uri}/{name}") for name in names}


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def written(store: GcsArtifacts, result: Result) -> dict[str, bytes]:
    """The weight files of an artifact."""
    names = (file.name for file in store.list(result.artifact.uri))
    return {name: store.read(f"{result.artifact.uri}/{name}") for name in names if name.endswith(".safetensors")}


def test_a_merge_from_the_hub_puts_no_weights_on_a_disk(hub: Hub, models: Path, store: GcsArtifacts) -> None:
    """And has the bytes of one from a directory."""
    result = exported(models / "adapter", store)
    assert written(store, result) == weights(merged_into(models / "base", models / "adapter", models / "store"))
    assert [seen for seen in hub.seen if seen.host == "storage"]
    assert list((models / "cache").rglob("*tokenizer*"))
    assert not list((models / "cache").rglob("*.safetensors"))
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def untying(place: Path) -> None:
    """The embedding is read twice: for itself, and for the head that begins with its values."""
    row = next(row for row in ROWS if row.name == "LoRA on lm_head")
    row.make("gemma3_text", save_base("gemma3_text", place / "again"), place / "adapter")


def resizing(place: Path) -> None:
    """The embedding is not read at all: the adapter brings another."""
    model = save_base("gemma3_text", place / "again")
    model.resize_token_embeddings(VOCABULARY + 6)
    trained("q_proj", modules_to_save=["embed_tokens", "lm_head"])("gemma3_text", model, place / "adapter")


@pytest.mark.filterwarnings("ignore")  # of PEFT's, about tied layers
@pytest.mark.parametrize("adapter", [None, untying, resizing], ids=["plain", "untying", "resizing"])
def test_a_base_is_kept_while_it_is_merged_and_the_hub_is_read_once(
    hub: Hub, models: Path, store: GcsArtifacts, adapter: Callable[[Path], None] | None
) -> None:
    """The copy is the file, whatever the merge reads of it, and in which order."""
    if adapter:
        adapter(models)
    first = exported(models / "adapter", store)
    assert kept(store) == weights(models / "base")
    hub.seen.clear()
    second = exported(models / "adapter", store, job="job-2")
    assert not [seen for seen in hub.seen if seen.headers.get("Range")]
    assert written(store, second) == written(store, first)


def test_one_file_that_is_missing_is_read_from_the_hub(hub: Hub, models: Path, store: GcsArtifacts) -> None:
    """As after an attempt that was killed."""
    first = exported(models / "adapter", store)
    name = sorted(kept(store))[1]
    store.delete_prefix(f"{BASES_ROOT}/google/tiny@{COMMIT}/{name}")
    hub.seen.clear()
    second = exported(models / "adapter", store, job="job-2")
    asked = [seen for seen in hub.seen if seen.headers.get("Range")]
    assert asked
    assert all(name in seen.target for seen in asked if seen.host == "hub")
    assert written(store, second) == written(store, first)
    assert kept(store) == weights(models / "base")


@pytest.mark.parametrize("damage", ["other bytes", "cut short", "no record", "a record of another"])
def test_a_copy_that_is_not_proved_is_not_used_and_is_mended(
    hub: Hub, models: Path, store: GcsArtifacts, damage: str
) -> None:
    """Of the same size even: the record beside it has the checksum of the bytes that were the hub's."""
    first = exported(models / "adapter", store)
    directory = f"{BASES_ROOT}/google/tiny@{COMMIT}"
    one, other = sorted(kept(store))[:2]
    bucket = bucket_named(store.uri("x").split("/")[2])
    if damage == "no record":
        store.delete_prefix(f"{directory}/{one}.json")
    elif damage == "a record of another":
        content = store.read(store.uri(f"{directory}/{other}.json"))
        bucket.blob(f"{directory}/{one}.json").upload_from_string(content)
    else:
        damaged = kept(store)[one][:-1] + (b"" if damage == "cut short" else b"?")
        bucket.blob(f"{directory}/{one}").upload_from_string(damaged)
    for job in ("job-2", "job-3"):  # the first finds the name taken, and clears it
        assert written(store, exported(models / "adapter", store, job=job)) == written(store, first)
    assert kept(store) == weights(models / "base")
    hub.seen.clear()
    assert written(store, exported(models / "adapter", store, job="job-4")) == written(store, first)
    assert not [seen for seen in hub.seen if seen.headers.get("Range")]


def test_a_base_that_is_kept_is_for_those_who_have_access_to_it(
    hub: Hub, models: Path, store: GcsArtifacts, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub is asked with the caller's own token; it is in no log line and no request to another host."""
    hub.gated = True
    with caplog.at_level(logging.DEBUG):
        exported(models / "adapter", store, token=TOKEN)
        with pytest.raises(ExportError) as error:
            exported(models / "adapter", store, job="job-2")
    assert error.value.error_code == "base_gated"
    assert kept(store)
    assert TOKEN not in caplog.text
    assert any(seen.headers.get("Authorization") == f"Bearer {TOKEN}" for seen in hub.seen if seen.host == "hub")
    assert not any(TOKEN in str(seen) for seen in hub.seen if seen.host != "hub")
    assert not any(TOKEN in path for path in hub.paths)


def test_no_token_shows_where_a_base_is_shown(hub: Hub, models: Path) -> None:
    """Whatever it looks like, since a mirror's need not look like one of the hub's."""
    hub.gated = True
    base = open_streamed("google/tiny", None, lambda: TOKEN)
    assert TOKEN not in repr(base)
    assert TOKEN not in repr(Recipe(lambda attempt: None, str, base, History()))


def test_nothing_is_kept_where_that_is_switched_off(hub: Hub, models: Path, store: GcsArtifacts) -> None:
    exported(models / "adapter", store, base_cache=False)
    assert kept(store) == {}


class Full(GcsArtifacts):
    """A bucket that takes no base: from its beginning, after a while, or at its end."""

    def __init__(self, bucket: str, when: str) -> None:
        super().__init__(bucket)
        self._when = when

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        writer = super().create(path, size=size)
        if path.startswith(BASES_ROOT):
            if self._when == "create":
                raise StorageFull("full")

            def refuse(*_: object) -> None:
                raise StorageFull("full")

            setattr(writer, self._when, refuse)
        return writer


@pytest.mark.parametrize("when", ["create", "write", "commit"])
def test_that_a_base_cannot_be_kept_fails_no_export(
    hub: Hub, models: Path, storage_server: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Full(new_bucket(), when)
    result = exported(models / "adapter", store)
    assert written(store, result)
    assert kept(store) == {}
    assert "no copy is kept" in caplog.text


@pytest.mark.parametrize("base_cache", [True, False])
def test_what_is_not_the_file_is_neither_merged_nor_kept(
    hub: Hub, models: Path, store: GcsArtifacts, base_cache: bool
) -> None:
    """The hub's own digest tells, whether a copy is wanted or not."""
    file = max((models / "base").glob("*.safetensors"))
    wanted, facts, content = stored(file).etag, file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(facts.st_mtime_ns, facts.st_mtime_ns))
    assert stored(file).etag == wanted
    with pytest.raises(ExportError) as error:
        exported(models / "adapter", store, base_cache=base_cache)
    assert (error.value.error_code, error.value.retryable) == ("base_damaged", True)
    assert wanted in error.value.message
    assert file.name not in kept(store)


@pytest.mark.parametrize(
    ("etag", "is_kept"),
    [
        ("df4e8172aa91bbb5d64d7d71cd44f9b1b2b7c1e4c14f6ddc5b14ad0f2bbf0a1d", False),
        (hashlib.sha256(b"what is up, doc?").hexdigest(), True),
        ("bd9dbf5aae1a3862dd1526723246b20206e5fc37", True),
        ("bd9dbf5aae1a3862dd1526723246b20206e5fc38", False),
        ("of-another-kind", None),
    ],
)
def test_a_copy_is_checked_by_whichever_digest_the_hub_has(
    store: GcsArtifacts, etag: str, is_kept: bool | None
) -> None:
    """SHA-256 of what is in LFS, else Git's own; the example is that of the book on Git. Of no digest, no copy."""
    content = b"what is up, doc?"
    copy = Copy(store, "base/file", len(content), etag)
    copy.write(memoryview(content[:5]))
    copy.write(memoryview(content[5:]))
    if is_kept is False:
        with pytest.raises(ExportError, match=etag):
            copy.commit()
    else:
        copy.commit()
    copy.close()
    assert store.exists(store.uri("base/file")) is bool(is_kept)
    assert store.exists(store.uri("base/file.json")) is bool(is_kept)


def test_an_attempt_that_fails_keeps_no_half_a_file(hub: Hub, models: Path, store: GcsArtifacts) -> None:
    """Create-only and whole: what is listed there may be used."""

    class Stopped(Undisturbed):
        def report(self, stage: str, progress: float) -> None:
            if progress > 0.4:
                raise ExportError("stopped")

    with pytest.raises(ExportError, match="stopped"):
        exported(models / "adapter", store, hold=Stopped())
    found = kept(store)
    assert len(found) < len(weights(models / "base"))
    assert found.items() <= weights(models / "base").items()
