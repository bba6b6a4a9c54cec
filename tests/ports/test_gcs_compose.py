"""How Cloud Storage puts objects together: by itself, through faults, and of the very parts that were looked at."""

import pytest

from dispatcher.artifacts import StoredFile
from dispatcher.errors import Unavailable
from dispatcher.gcs_artifacts import GcsArtifacts
from infra.local.storage import Fault, Request, StorageProxy
from infra.local.uploads import Answer
from tests.buckets import bucket_named
from tests.ports.storing import LARGE, checksum, put


def parts_of(store: GcsArtifacts, count: int) -> list[str]:
    return [f"x/parts/{put(store, f'x/parts/{number}', bytes([number])).name}" for number in range(count)]


def test_no_byte_of_the_parts_passes_through_this_process(cloud: StorageProxy, store: GcsArtifacts) -> None:
    """Neither down nor up."""
    for name in ("a", "b"):
        put(store, f"x/{name}", LARGE)
    cloud.heal()
    store.compose("x/whole", ["x/a", "x/b"])
    assert {method for method, _, _ in cloud.requests} == {"GET", "POST"}
    assert not any("alt=media" in target or "/upload/" in target for _, target, _ in cloud.requests)
    assert sum(size for _, _, size in cloud.requests) < 2000


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("skip", [0, 1, 2], ids=["first between", "second between", "whole"])
def test_it_survives_faults(cloud: StorageProxy, store: GcsArtifacts, fault: Fault, skip: int) -> None:
    """After a lost answer the name is taken: by the same content, which is success."""
    parts = parts_of(store, 40)
    cloud.fail(fault, "POST", "/compose", skip=skip, times=2)
    content = bytes(range(40))
    assert store.compose("x/whole", parts) == StoredFile("whole", 40, checksum(content))
    assert store.read(store.uri("x/whole")) == content
    assert len(store.children("x/parts")) == 40


def test_nothing_between_stays_after_a_fault(cloud: StorageProxy, store: GcsArtifacts) -> None:
    """Nor is anything published."""
    parts = parts_of(store, 40)
    cloud.fail(Fault.REFUSED, "POST", "whole/compose", times=10_000)
    with pytest.raises(Unavailable):
        store.compose("x/whole", parts)
    cloud.heal()
    assert len(store.children("x/parts")) == 40
    assert store.children("x") == ["parts"]


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_part_that_changes_meanwhile_is_noticed(
    cloud: StorageProxy, store: GcsArtifacts, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Between the look at it and the composition."""
    parts = parts_of(store, 2)
    bucket = store.uri("x").split("/")[2]
    told = cloud.answer

    def meanwhile(request: Request) -> Answer:
        if request.path.endswith("/compose"):
            monkeypatch.undo()
            blob = bucket_named(bucket).blob(parts[1])
            blob.upload_from_string(b"other") if change == "replaced" else blob.delete()
        return told(request)

    monkeypatch.setattr(cloud, "answer", meanwhile)
    with pytest.raises(Unavailable) as error:
        store.compose("x/whole", parts)
    assert error.value.error_code == "source_changed"
    assert not store.exists(store.uri("x/whole"))


def test_a_result_that_is_not_its_parts_is_not_kept(
    cloud: StorageProxy, store: GcsArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksum follows from theirs; this service leaves a part out."""
    parts = parts_of(store, 3)
    told = cloud.answer

    def careless(request: Request) -> Answer:
        if request.path.endswith("/compose"):
            first = request.body.replace(b"x/parts/2", b"x/parts/1")
            document = first.replace(b'"generation"', b'"ignored"')
            request = Request(request.method, request.target, request.headers, document)
        return told(request)

    monkeypatch.setattr(cloud, "answer", careless)
    with pytest.raises(Unavailable) as error:
        store.compose("x/whole", parts)
    assert error.value.error_code == "upload_corrupted"
    assert not store.exists(store.uri("x/whole"))
