"""The stand-in for Cloud Storage, where it has to be as strict as the real service, and as slow as a bench wants it."""

import json
import signal
import subprocess
import sys
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from google.api_core.exceptions import PreconditionFailed

from infra.local.storage import Request, StorageProxy
from infra.local.storage import storage_proxy as open_proxy
from tests.buckets import bucket_named, new_bucket


@pytest.fixture
def bucket(storage_proxy: StorageProxy) -> str:
    """With the objects `a` and `b`."""
    name = new_bucket()
    for content in ("a", "b"):
        bucket_named(name).blob(content).upload_from_string(content)
    return name


def compose(proxy: StorageProxy, bucket: str, sources: list[dict[str, Any]], condition: str = "") -> tuple[int, Any]:
    document = json.dumps({"sourceObjects": sources, "destination": {}}).encode()
    headers = {"Content-Type": "application/json"}
    answer = proxy.answer(Request("POST", f"/storage/v1/b/{bucket}/o/whole/compose{condition}", headers, document))
    return answer.status, json.loads(answer.body)


def test_what_cannot_be_composed_is_refused_as_the_service_does(storage_proxy: StorageProxy, bucket: str) -> None:
    """Sources that are none, too many, gone, or of another generation; a target that is taken."""
    a, b = {"name": "a"}, {"name": "b"}
    live = bucket_named(bucket).get_blob("a").generation
    other = str(live + 1)
    refusals: list[tuple[list[dict[str, Any]], int]] = [
        ([], HTTPStatus.BAD_REQUEST),
        ([a] * 33, HTTPStatus.BAD_REQUEST),
        ([a, {"name": "gone"}], HTTPStatus.NOT_FOUND),
        ([{**a, "generation": other}, b], HTTPStatus.NOT_FOUND),
        ([{**a, "objectPreconditions": {"ifGenerationMatch": other}}], HTTPStatus.PRECONDITION_FAILED),
    ]
    for sources, status in refusals:
        assert compose(storage_proxy, bucket, sources)[0] == status
    assert bucket_named(bucket).get_blob("whole") is None
    pinned = {**a, "generation": str(live), "objectPreconditions": {"ifGenerationMatch": str(live)}}
    status, made = compose(storage_proxy, bucket, [pinned, b], "?ifGenerationMatch=0")
    assert (status, made["size"]) == (HTTPStatus.OK, "2")
    assert compose(storage_proxy, bucket, [b, a], "?ifGenerationMatch=0")[0] == HTTPStatus.PRECONDITION_FAILED
    assert bucket_named(bucket).blob("whole").download_as_bytes() == b"ab"
    replaced, _ = compose(storage_proxy, bucket, [b, a], f"?ifGenerationMatch={made['generation']}")
    assert replaced == HTTPStatus.OK


def test_a_connection_carries_so_many_bytes_a_second(
    storage_proxy: StorageProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way; idle time is not made up for."""
    del storage_proxy  # that fake-gcs-server is here
    with open_proxy(None, bytes_per_second=2_000_000) as slow:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", slow.url)
        blob = bucket_named(new_bucket()).blob("file")
        for move in (lambda: blob.upload_from_string(bytes(1_000_000)), blob.download_as_bytes):
            start = time.monotonic()
            move()
            assert 0.45 < time.monotonic() - start < 5


def test_it_runs_as_a_process_of_its_own(
    storage_proxy: StorageProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bucket; it says where it is, ends when told, and finds its objects again."""
    command = [sys.executable, "-m", "infra.local.storage", str(tmp_path / "objects"), "--bucket", "bench-bucket"]
    for found in (False, True):
        server = subprocess.Popen([*command, "--bytes-per-second", "1e8"], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.stdout.readline().strip())
            blob = bucket_named("bench-bucket").blob("file")
            assert blob.exists() is found
            blob.upload_from_string(b"content")
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
            server.stdout.close()


LARGE = bytes(range(256)) * (9 << 12)
"""More than the client sends in one request"""


@pytest.mark.parametrize("name", ["folder/large-1.bin", "a name that is escaped: 100 %"])
def test_a_finished_session_is_an_object_as_any_other(storage_proxy: StorageProxy, bucket: str, name: str) -> None:
    """Whether its file became the object or was sent; it is there once, replaced when that is asked for."""
    blob = bucket_named(bucket).blob(name, chunk_size=4 << 20)
    blob.upload_from_string(LARGE, content_type="text/plain", if_generation_match=0)
    found = bucket_named(bucket).get_blob(name)
    assert (found.size, found.crc32c, found.content_type) == (len(LARGE), blob.crc32c, "text/plain")
    assert found.generation == blob.generation
    assert found.download_as_bytes() == LARGE
    assert [other.name for other in bucket_named(bucket).list_blobs()] == sorted(["a", "b", name])
    for condition in (0, found.generation + 1):
        with pytest.raises(PreconditionFailed):
            bucket_named(bucket).blob(name, chunk_size=4 << 20).upload_from_string(
                LARGE[::-1], if_generation_match=condition
            )
    assert found.download_as_bytes() == LARGE
    replacing = bucket_named(bucket).blob(name, chunk_size=4 << 20)
    replacing.upload_from_string(LARGE[::-1], if_generation_match=found.generation)
    assert replacing.generation != found.generation
    assert replacing.download_as_bytes() == LARGE[::-1]
    replacing.delete()
    assert bucket_named(bucket).get_blob(name) is None


def test_of_two_sessions_that_end_together_one_is_the_object(storage_proxy: StorageProxy, bucket: str) -> None:
    """Both found the name free when they began."""
    starts = [f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable&name=c&ifGenerationMatch=0"] * 2
    begun = [storage_proxy.answer(Request("POST", target, {}, b"{}")).headers["Location"] for target in starts]
    ends = [
        storage_proxy.answer(
            Request(
                "PUT", urlsplit(url)._replace(scheme="", netloc="").geturl(), {"Content-Range": "bytes 0-0/1"}, b"x"
            )
        ).status
        for url in begun
    ]
    assert ends == [HTTPStatus.OK, HTTPStatus.PRECONDITION_FAILED]
