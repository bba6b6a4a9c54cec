"""What only a bucket shows: preconditions, pages, names that no file has, other buckets, and a service that is away."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from dispatcher.artifacts import StoredFile, open_artifacts
from dispatcher.errors import Misconfigured, NotFound, SourceError, Unavailable
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.published import is_whole
from infra.local.storage import Fault, Request, StorageProxy
from infra.local.storage import storage_proxy as open_proxy
from infra.local.uploads import Answer
from tests.buckets import bucket_named, new_bucket
from tests.ports.storing import CHUNK_BYTES, LARGE, QUICK, put
from tests.waiting import until


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


def test_a_service_that_takes_the_call_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an HTTP answer waits for it, within that answer's patience, repetitions and all."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = open_artifacts("gs://bucket", patience=0.4)
        for ask in (store.list, store.read, store.exists):
            start = time.monotonic()
            with pytest.raises(Unavailable):
                ask(store.uri("x/file"))
            assert time.monotonic() - start < 2


def test_a_service_that_fails_each_time_is_given_up_as_soon(cloud: StorageProxy, bucket: str) -> None:
    """Also where the client itself would try again for two minutes."""
    store = GcsArtifacts(bucket, patience=0.4)
    cloud.fail(Fault.REFUSED, "GET", bucket, times=10_000)
    start = time.monotonic()
    with pytest.raises(Unavailable):
        store.list(store.uri("x"))
    assert time.monotonic() - start < 2


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


@pytest.mark.parametrize("name", ["..", "a/../b", "a//b", "/a", "./a", "a\nb", "a\x7fb", "a\u2028b", "ü" * 128])
def test_an_object_name_that_is_no_file_name_is_refused(any_names: str, name: str) -> None:
    """It would lead out of the directory that it is copied to, or forge a line of a log."""
    bucket_named(any_names).blob(f"x/{name}").upload_from_string(b"")
    with pytest.raises(SourceError) as error:
        GcsArtifacts(any_names).list(f"gs://{any_names}/x")
    assert error.value.error_code == "file_name_invalid"
    assert "\n" not in error.value.message


def test_a_compressed_object_is_refused_in_words(store: GcsArtifacts) -> None:
    """Its bytes are those of a gzip file, whatever its name says."""
    theirs = new_bucket()
    blob = bucket_named(theirs).blob("a/adapter_config.json")
    blob.content_encoding = "gzip"
    blob.upload_from_string(gzip.compress(b"{}"))
    with pytest.raises(SourceError) as error:
        store.read(f"gs://{theirs}/a/adapter_config.json")
    assert error.value.error_code == "source_encoded"
    assert "gzip" in error.value.message


def test_an_object_without_a_checksum_is_refused_where_one_is_asked_for(
    cloud: StorageProxy, store: GcsArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one under a key of its owner's is listed; a fingerprint over nothing would never change."""
    put(store, "x/file", b"1")
    told = cloud.answer

    def keyed(request: Request) -> Answer:
        answer = told(request)
        document = json.loads(answer.body)
        for item in document.get("items", []):
            del item["crc32c"]
        return replace(answer, body=json.dumps(document).encode())

    monkeypatch.setattr(cloud, "answer", keyed)
    for ask in (store.list, store.fingerprint):
        with pytest.raises(SourceError, match="x/file has no crc32c") as error:
            ask(store.uri("x"))
        assert error.value.error_code == "checksum_missing"
    assert store.list(store.uri("x"), checksums=False) == [StoredFile("file", 1, "")]


def test_damage_of_equal_size_is_noticed_without_reading(cloud: StorageProxy, store: GcsArtifacts) -> None:
    """A listing tells the checksums as well."""
    stored = put(store, "x/model", b"good")
    manifest = {"files": [{"name": "model", "bytes": stored.size, "crc32c": stored.crc32c}]}
    put(store, "x/export.json", json.dumps(manifest).encode())
    uri = store.uri("x/export.json")
    assert is_whole(store, uri)
    bucket_named(uri.split("/")[2]).blob("x/model").upload_from_string(b"evil")
    cloud.heal()
    assert not is_whole(store, uri)
    assert not any("model" in target for _, target, _ in cloud.requests)


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


def test_nothing_is_asked_of_the_bucket_itself(cloud: StorageProxy, store: GcsArtifacts, bucket: str) -> None:
    """Its metadata, for traces that nobody collects: another permission, and a thread that goes on for minutes."""
    put(store, "x/file", b"small")
    assert store.read(store.uri("x/file")) == b"small"
    for thread in threading.enumerate():
        if "fetch" in thread.name:
            thread.join()
    assert [target for _, target, _ in cloud.requests if target.partition("?")[0].endswith(f"/b/{bucket}")] == []
