"""What only Cloud Storage can show: lost answers, preconditions, pages, names, and what is not in memory."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from google.cloud.storage.retry import DEFAULT_RETRY

from dispatcher.artifacts import StoredFile
from dispatcher.crc32c import Crc32c
from dispatcher.errors import ArtifactConflict, Misconfigured, NotFound, SourceError, Unavailable
from dispatcher.gcs_artifacts import GcsArtifacts
from infra.local.storage import Fault, StorageProxy
from infra.local.storage import storage_proxy as open_proxy
from tests.buckets import bucket_named, new_bucket
from tests.ports.storing import put
from tests.waiting import until

CHUNK_BYTES = 256 << 10
LARGE = bytes(range(256)) * (2 * CHUNK_BYTES // 256) + b"the end"
"""Goes up in three requests of a resumable upload."""
QUICK = DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.02, multiplier=1).with_timeout(5)


@pytest.fixture
def cloud(storage_proxy: StorageProxy) -> Iterator[StorageProxy]:
    storage_proxy.heal()
    yield storage_proxy
    storage_proxy.heal()


@pytest.fixture
def store(cloud: StorageProxy, bucket: str) -> GcsArtifacts:
    return GcsArtifacts(bucket, retry=QUICK, chunk_bytes=CHUNK_BYTES)


@pytest.fixture(scope="module")
def any_names_server(storage_proxy: StorageProxy) -> Iterator[str]:
    """Cloud Storage that keeps objects in memory: on disk, not every name of an object is a file's."""
    with open_proxy(None) as proxy:
        yield proxy.url


@pytest.fixture
def any_names(any_names_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket there."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", any_names_server)
    return new_bucket()


def sent_bytes(cloud: StorageProxy) -> int:
    return sum(size for _, target, size in cloud.requests if "/upload/" in target)


def checksum(data: bytes) -> str:
    crc = Crc32c()
    crc.update(data)
    return crc.text


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 1]
)
def test_content_of_any_size_arrives_whole(store: GcsArtifacts, size: int) -> None:
    """Around the boundaries of what one request carries."""
    data = os.urandom(size)
    writer = store.create("x/file")
    for start in range(0, size, 100_001):
        writer.write(data[start : start + 100_001])
    assert writer.commit() == StoredFile("file", size, checksum(data))
    with store.open(store.uri("x/file")) as reader:
        assert reader.size == size
        assert reader.read(0, size) == data


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize(
    ("method", "part", "skip"),
    [("POST", "uploadType=resumable", 0), ("PUT", "upload_id", 0), ("PUT", "upload_id", 1), ("PUT", "upload_id", 2)],
    ids=["initiation", "first chunk", "second chunk", "last chunk"],
)
def test_a_large_upload_survives_faults(
    cloud: StorageProxy, store: GcsArtifacts, fault: Fault, method: str, part: str, skip: int
) -> None:
    """At every request: two 503s, two lost connections, or two answers that are lost after the deed."""
    cloud.fail(fault, method, part, skip=skip, times=2)
    assert put(store, "x/file", LARGE) == StoredFile("file", len(LARGE), checksum(LARGE))
    with store.open(store.uri("x/file")) as reader:
        assert reader.read(0, reader.size) == LARGE


@pytest.mark.parametrize("fault", Fault)
def test_a_small_upload_survives_faults(cloud: StorageProxy, store: GcsArtifacts, fault: Fault) -> None:
    """After a lost answer the name is taken: by the same content, which is success."""
    cloud.fail(fault, "POST", "uploadType=multipart", times=2)
    assert put(store, "x/file", b"small") == StoredFile("file", 5, checksum(b"small"))
    assert store.read(store.uri("x/file")) == b"small"


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.DROPPED])
def test_a_service_that_stays_away_is_unavailable(cloud: StorageProxy, bucket: str, fault: Fault) -> None:
    """Whatever is asked of it; and nothing can be written to what failed."""
    store = GcsArtifacts(bucket, retry=QUICK.with_timeout(0.05), chunk_bytes=CHUNK_BYTES)
    for method in ("GET", "POST"):
        cloud.fail(fault, method, bucket, times=10_000)
    for ask in (store.list, store.read, store.exists, store.open):
        with pytest.raises(Unavailable):
            ask(store.uri("x/file"))
    for ask_path in (store.children, store.delete_prefix):
        with pytest.raises(Unavailable):
            ask_path("x")
    writer = store.create("x/file")
    with pytest.raises(Unavailable):
        writer.write(LARGE)
    cloud.heal()
    with pytest.raises(Unavailable):
        writer.commit()
    assert cloud.requests == []
    assert store.list(store.uri("x")) == []


def test_the_same_large_content_is_not_sent_again(cloud: StorageProxy, store: GcsArtifacts) -> None:
    """The refusal comes at the first request; the rest is only summed up."""
    first = put(store, "x/file", LARGE)
    cloud.heal()
    writer = store.create("x/file")
    for start in range(0, len(LARGE), 100_000):
        writer.write(LARGE[start : start + 100_000])
    assert writer.commit() == first
    assert sent_bytes(cloud) < 1000


def test_other_large_content_is_a_conflict(cloud: StorageProxy, store: GcsArtifacts) -> None:
    """Even of the same size; and it is not sent either."""
    put(store, "x/file", LARGE)
    cloud.heal()
    with pytest.raises(ArtifactConflict):
        put(store, "x/file", LARGE[1:] + b"?")
    assert sent_bytes(cloud) < 1000
    assert store.list(store.uri("x")) == [StoredFile("file", len(LARGE), checksum(LARGE))]


@pytest.mark.parametrize("same", [True, False])
def test_of_two_large_uploads_at_once_the_first_to_finish_stays(store: GcsArtifacts, same: bool) -> None:
    """The other one learns of it at its end, where the precondition is checked again."""
    late = store.create("x/file")
    late.write(LARGE if same else LARGE[::-1])
    first = put(store, "x/file", LARGE)
    if same:
        assert late.commit() == first
    else:
        with pytest.raises(ArtifactConflict):
            late.commit()
    assert store.list(store.uri("x")) == [StoredFile("file", len(LARGE), checksum(LARGE))]


def test_an_abandoned_upload_shows_nowhere(cloud: StorageProxy, store: GcsArtifacts) -> None:
    """Discarded, or forgotten by whoever began it: io itself would close it, and so publish half a file."""
    writer = store.create("x/discarded")
    writer.write(LARGE)
    writer.discard()
    (cancelled,) = [target for method, target, _ in cloud.requests if method == "DELETE"]
    assert "upload_id" in cancelled
    writer = store.create("x/forgotten")
    writer.write(LARGE)
    del writer
    gc.collect()
    assert store.list(store.uri("x")) == []
    assert store.children("x") == []


def test_damage_on_the_way_is_noticed_and_not_kept(store: GcsArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the service, which is told the checksum of every upload."""
    import requests

    send = requests.Session.request

    def flipped(self: requests.Session, method: str, url: str, data: object = None, **more: object) -> object:
        if isinstance(data, bytes) and b"the end" in data:
            data = data.replace(b"the end", b"the 3nd")
        return send(self, method, url, data=data, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(requests.Session, "request", flipped)
    for content in (LARGE, b"small: the end"):
        with pytest.raises(Unavailable) as error:
            put(store, "x/file", content)
        assert error.value.error_code == "upload_corrupted"
    assert store.list(store.uri("x")) == []


def test_an_upload_takes_no_more_memory_than_a_few_chunks(bucket: str) -> None:
    """200 MB, written in one and in pieces: the process grows by less than a third of that."""
    program = f"""
from dispatcher.gcs_artifacts import GcsArtifacts

def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

store = GcsArtifacts({bucket!r})
store.create("warm").commit()
tensor = b"\\1" * 100_000_000
before = peak()
writer = store.create("file")
writer.write(tensor)
for _ in range(100):
    writer.write(tensor[:1_000_000])
assert writer.commit().size == 200_000_000
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64 << 20


def test_a_reader_notices_that_its_file_was_replaced_or_deleted(store: GcsArtifacts, bucket: str) -> None:
    """Instead of mixing the bytes of two."""
    put(store, "x/file", b"first")
    blob = bucket_named(bucket).blob("x/file")
    for change in (lambda: blob.upload_from_string(b"other"), blob.delete):
        with store.open(store.uri("x/file")) as reader:
            change()
            with pytest.raises(Unavailable) as error:
                reader.read(0, 5)
            assert error.value.error_code == "source_changed"


def test_a_listing_goes_on_beyond_its_first_page(bucket: str) -> None:
    """Of files, of folders, and of what is to be deleted."""
    store = GcsArtifacts(bucket, page_size=2)
    for number in range(5):
        put(store, f"x/{number}/file", b"1")
    assert [file.name for file in store.list(store.uri("x"))] == [f"{number}/file" for number in range(5)]
    assert store.children("x") == [str(number) for number in range(5)]
    assert store.delete_prefix("x") == 5
    assert store.list(store.uri("x")) == []


def test_what_was_replaced_since_it_was_listed_is_not_deleted(cloud: StorageProxy, store: GcsArtifacts) -> None:
    """Only what was seen is ours to delete."""
    put(store, "x/file", b"seen")
    uri = store.uri("x/file")
    cloud.fail(Fault.REFUSED, "DELETE", "file", times=10_000)
    counts: list[int] = []
    deleting = threading.Thread(target=lambda: counts.append(store.delete_prefix("x")))
    deleting.start()
    until(lambda: any(method == "DELETE" for method, _, _ in cloud.requests), "a request to delete")
    bucket_named(uri.split("/")[2]).blob("x/file").upload_from_string(b"newer")
    cloud.heal()
    deleting.join()
    assert counts == [0]
    assert store.read(uri) == b"newer"


def test_a_deletion_whose_answer_is_lost_is_no_error(cloud: StorageProxy, store: GcsArtifacts) -> None:
    """The second one finds nothing, which is what was wanted."""
    put(store, "x/file", b"1")
    cloud.fail(Fault.ANSWER_LOST, "DELETE", "file")
    store.delete_prefix("x")
    assert store.children("x") == []


def test_an_object_at_the_very_path_is_deleted_too(any_names: str) -> None:
    """A bucket has no folders: `x` and `x/file` are two objects."""
    store = GcsArtifacts(any_names)
    for path in ("x", "x/file", "xy"):
        put(store, path, b"1")
    assert store.delete_prefix("x") == 2
    assert store.exists(store.uri("xy"))


def test_placeholders_of_folders_are_no_files(any_names: str) -> None:
    """Consoles make them; they go with their folder."""
    store = GcsArtifacts(any_names)
    for name in ("x/", "x/folder/", "x/folder/file"):
        bucket_named(any_names).blob(name).upload_from_string(b"")
    assert [file.name for file in store.list(store.uri("x"))] == ["folder/file"]
    assert store.children("x") == ["folder"]
    assert store.delete_prefix("x") == 3


@pytest.mark.parametrize("name", ["..", "a/../b", "a//b", "/a", "./a", "a\nb", "a\x7fb", "a\u2028b"])
def test_an_object_name_that_is_no_file_name_is_refused(any_names: str, name: str) -> None:
    """It would lead out of the directory that it is copied to, or forge a line of a log."""
    bucket_named(any_names).blob(f"x/{name}").upload_from_string(b"")
    with pytest.raises(SourceError) as error:
        GcsArtifacts(any_names).list(f"gs://{any_names}/x")
    assert error.value.error_code == "file_name_invalid"
    assert "\n" not in error.value.message


def test_other_buckets_are_read_and_only_ours_is_written(store: GcsArtifacts, cloud: StorageProxy) -> None:
    """Adapters lie where the training service puts them."""
    theirs = new_bucket()
    bucket_named(theirs).blob("adapters/1/adapter_config.json").upload_from_string(b"{}")
    uri = f"gs://{theirs}/adapters/1"
    assert [file.name for file in store.list(uri)] == ["adapter_config.json"]
    assert store.list(f"{uri}/") == store.list(uri)
    assert [file.name for file in store.list(f"gs://{theirs}")] == ["adapters/1/adapter_config.json"]
    assert store.read(f"{uri}/adapter_config.json") == b"{}"
    assert store.exists(f"{uri}/adapter_config.json")
    assert store.fingerprint(uri) == store.fingerprint(f"{uri}/")


def test_our_own_bucket_has_to_exist_and_someone_elses_is_just_empty(cloud: StorageProxy) -> None:
    """The first is for the operator to mend, the second a file that is gone."""
    store = GcsArtifacts("no-such-bucket", chunk_bytes=CHUNK_BYTES)
    fails: list[Callable[[], object]] = [
        lambda: store.list(store.uri("x")),
        lambda: store.children("x"),
        lambda: store.delete_prefix("x"),
        lambda: put(store, "x/file", b"1"),
        lambda: put(store, "x/file", LARGE),
    ]
    for use in fails:
        with pytest.raises(Misconfigured) as error:
            use()
        assert error.value.error_code == "resource_missing"
    assert store.list("gs://no-other-bucket/x") == []
    with pytest.raises(NotFound):
        store.read("gs://no-other-bucket/x")


@pytest.mark.parametrize("uri", ["/a/b", "file:///a/b", "relative", "gs:/bucket/x", "gs:///x", "gs://bucket/a\nb"])
def test_a_path_of_a_machine_is_refused(store: GcsArtifacts, uri: str) -> None:
    """The exporter's machine is not the one that it lies on."""
    for use in (store.list, store.read, store.open, store.exists):
        with pytest.raises(SourceError) as error:
            use(uri)
        assert error.value.error_code == "uri_unsupported"
