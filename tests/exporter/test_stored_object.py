"""Objects of a bucket as sources of bytes, over the stand-in for Cloud Storage."""

import random

import pytest

from dispatcher.errors import Unavailable
from dispatcher.gcs_artifacts import GcsArtifacts
from exporter import stored_object
from exporter.stored_object import StoredObject
from tests.buckets import bucket_named, new_bucket

CHUNK = 1000


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(10 * CHUNK + 17)


@pytest.fixture
def bucket(storage_server: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with one object, `a`, that is many chunks long."""
    monkeypatch.setattr(stored_object, "CHUNK_BYTES", CHUNK)
    name = new_bucket()
    bucket_named(name).blob("a").upload_from_string(content)
    return name


def opened(bucket: str) -> StoredObject:
    store = GcsArtifacts(bucket)
    return StoredObject("a", store.open(store.uri("a")))


def test_any_part_of_an_object_is_read(bucket: str, content: bytes) -> None:
    source = opened(bucket)
    assert source.size == len(content)
    with source.open() as reader:
        for offset, length in ((0, 8), (17, 3 * CHUNK), (len(content) - 5, 5), (3, 0)):
            view = memoryview(bytearray(length))
            reader.read_into(view, offset)
            assert view == content[offset : offset + length]


@pytest.mark.parametrize(("start", "stop"), [(0, 10 * CHUNK + 17), (33, 5 * CHUNK + 1), (CHUNK, CHUNK)])
def test_a_stream_has_the_bytes_in_order(bucket: str, content: bytes, start: int, stop: int) -> None:
    """In pieces that are no chunks."""
    pieces = []
    with opened(bucket).open() as reader, reader.stream(start, stop) as stream:
        for offset in range(start, stop, 777):
            view = memoryview(bytearray(min(777, stop - offset)))
            stream.read_into(view)
            pieces.append(bytes(view))
    assert b"".join(pieces) == content[start:stop]


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_an_object_that_changes_while_it_is_read_is_never_a_mixture(bucket: str, content: bytes, change: str) -> None:
    """Of the same size even: the generation tells."""
    source = opened(bucket)
    with source.open() as reader, reader.stream(0, len(content)) as stream:
        stream.read_into(memoryview(bytearray(10)))
        blob = bucket_named(bucket).blob("a")
        if change == "replaced":
            blob.upload_from_string(bytes(len(content)))
        else:
            blob.delete()
        with pytest.raises(Unavailable) as error:
            stream.read_into(memoryview(bytearray(len(content) - 10)))
        assert error.value.error_code == "source_changed"
        with pytest.raises(Unavailable):
            reader.read_into(memoryview(bytearray(4)), 0)
