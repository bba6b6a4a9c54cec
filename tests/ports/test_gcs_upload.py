"""How content gets into Cloud Storage: whole, once, through lost answers and races, and in little memory."""

import gc
import os
import subprocess
import sys

import pytest

from dispatcher.artifacts import StoredFile
from dispatcher.errors import ArtifactConflict, Unavailable
from dispatcher.gcs_artifacts import GcsArtifacts
from infra.local.storage import Fault, StorageProxy
from tests.ports.storing import CHUNK_BYTES, LARGE, checksum, put


def sent_bytes(cloud: StorageProxy) -> int:
    return sum(size for _, target, size in cloud.requests if "/upload/" in target)


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
