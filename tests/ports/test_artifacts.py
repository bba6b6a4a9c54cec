"""What every artifact store promises."""

import array
import base64
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.artifacts import ArtifactStore, StoredFile, file_uri, open_artifacts
from dispatcher.contract import fingerprint_of
from dispatcher.crc32c import Crc32c, combined
from dispatcher.errors import ArtifactConflict, Misconfigured, NotFound, SourceError
from tests.ports.storing import checksum, put, write_at_once


def test_a_file_is_there_whole_once_committed_and_not_before(artifacts: ArtifactStore) -> None:
    """With its size and checksum; before that neither listed nor found."""
    writer = artifacts.create("a/b/model.bin")
    writer.write(b"12345")
    assert artifacts.list(artifacts.uri("a")) == []
    writer.write(memoryview(b"6789"))
    stored = writer.commit()
    assert stored == StoredFile("model.bin", 9, "4waSgw==")  # crc32c("123456789") = e3069283, RFC 3720
    assert artifacts.list(artifacts.uri("a")) == [StoredFile("b/model.bin", 9, "4waSgw==")]
    assert artifacts.read(artifacts.uri("a/b/model.bin")) == b"123456789"
    assert artifacts.exists(artifacts.uri("a/b/model.bin"))


def test_the_same_content_again_is_success_other_content_a_conflict(artifacts: ArtifactStore) -> None:
    """Nothing published is ever overwritten."""
    first = put(artifacts, "x/export.json", b"{}")
    assert put(artifacts, "x/export.json", b"{}") == first
    with pytest.raises(ArtifactConflict):
        put(artifacts, "x/export.json", b"[]")
    assert artifacts.read(artifacts.uri("x/export.json")) == b"{}"
    assert len(artifacts.list(artifacts.uri("x"))) == 1


def test_of_many_writers_one_publishes(artifacts: ArtifactStore) -> None:
    """The others learn of the conflict, and what is there is one writer's, whole."""
    assert write_at_once(artifacts, "x/file") == ["conflict"] * 7 + ["published"]
    assert len(set(artifacts.read(artifacts.uri("x/file")))) == 1


def test_a_discarded_file_leaves_nothing(artifacts: ArtifactStore) -> None:
    """And may be discarded twice, or after it was published."""
    writer = artifacts.create("x/file")
    writer.write(b"1")
    writer.discard()
    writer.discard()
    assert artifacts.list(artifacts.uri("x")) == []
    writer = artifacts.create("x/file")
    writer.commit()
    writer.discard()
    assert artifacts.list(artifacts.uri("x")) == [StoredFile("file", 0, "AAAAAA==")]


def test_what_is_not_there_is_an_empty_list_and_no_file(artifacts: ArtifactStore) -> None:
    """Listing is not an error, reading is."""
    assert artifacts.list(artifacts.uri("nothing")) == []
    assert not artifacts.exists(artifacts.uri("nothing"))
    with pytest.raises(NotFound) as error:
        artifacts.read(artifacts.uri("nothing"))
    assert error.value.error_code == "file_not_found"


def test_a_file_over_the_limit_is_not_read(artifacts: ArtifactStore) -> None:
    """What should be small is not trusted to be."""
    put(artifacts, "x/file", b"12345")
    assert artifacts.read(artifacts.uri("x/file"), limit=5) == b"12345"
    with pytest.raises(SourceError):
        artifacts.read(artifacts.uri("x/file"), limit=4)


def test_a_range_is_read_and_ends_with_the_file(artifacts: ArtifactStore) -> None:
    """For headers of files too large to read."""
    put(artifacts, "x/file", b"0123456789")
    with artifacts.open(artifacts.uri("x/file")) as reader:
        assert reader.size == 10
        assert reader.read(3, 4) == b"3456"
        assert reader.read(8, 4) == b"89"
        assert reader.read(10, 4) == b""
        assert reader.read(11, 4) == b""
        assert reader.read(3, 0) == b""


def test_an_empty_file_is_one_too(artifacts: ArtifactStore) -> None:
    """It has no range that could be asked for."""
    put(artifacts, "x/empty", b"")
    assert artifacts.read(artifacts.uri("x/empty")) == b""
    with artifacts.open(artifacts.uri("x/empty")) as reader:
        assert (reader.size, reader.read(0, 1)) == (0, b"")


@pytest.mark.parametrize("path", ["x", "x/file/under", "nothing"])
def test_only_a_file_can_be_opened(artifacts: ArtifactStore, path: str) -> None:
    """Neither a folder nor what is not there."""
    put(artifacts, "x/file", b"1")
    with pytest.raises(NotFound) as error:
        artifacts.open(artifacts.uri(path))
    assert error.value.error_code == "file_not_found"


def test_children_are_files_and_folders(artifacts: ArtifactStore) -> None:
    """Each once, and none that is deeper."""
    for path in ("a/b/one", "a/b/two", "a/c/d/three", "a/four", "ab/five"):
        put(artifacts, path, b"")
    assert artifacts.children("a") == ["b", "c", "four"]
    assert artifacts.children("a/c") == ["d"]
    assert artifacts.children("nothing") == []


def test_deleting_a_prefix_takes_everything_under_it_and_nothing_beside(artifacts: ArtifactStore) -> None:
    """Not even what begins with the same letters."""
    put(artifacts, "a/b/one", b"1")
    put(artifacts, "a/two", b"2")
    put(artifacts, "ab/three", b"3")
    assert artifacts.delete_prefix("a") == 2
    assert artifacts.delete_prefix("a") == 0
    assert artifacts.list(artifacts.uri("a")) == []
    assert artifacts.exists(artifacts.uri("ab/three"))


def test_removing_what_is_unpublished_leaves_what_is_published(artifacts: ArtifactStore) -> None:
    """However deep it lies."""
    files = [put(artifacts, f"x/{name}", b"1").name for name in ("one", "deep/two")]
    writers = [artifacts.create("x/three"), artifacts.create("x/deep/four")]
    artifacts.remove_unpublished("x")
    artifacts.remove_unpublished("nothing")
    assert len(artifacts.list(artifacts.uri("x"))) == len(files)
    assert artifacts.children("x") == ["deep", "one"]
    assert artifacts.children("x/deep") == ["two"]
    for writer in writers:
        writer.discard()


@given(st.lists(st.binary(max_size=5000), max_size=5), st.integers(0, 1 << 20))
def test_the_checksum_of_a_whole_follows_from_its_parts(pieces: list[bytes], zeros: int) -> None:
    """Empty ones too, and ones of many bytes that are all the same."""
    pieces = [*pieces, bytes(zeros)]
    assert combined((len(piece), checksum(piece)) for piece in pieces) == checksum(b"".join(pieces))


def test_parts_are_put_together_in_order_and_stay(artifacts: ArtifactStore) -> None:
    """An empty one and a repeated one too."""
    for name, content in (("a", b"first,"), ("b", b""), ("c", b"second,")):
        put(artifacts, f"x/parts/{name}", content)
    composed = artifacts.compose("x/whole", ["x/parts/c", "x/parts/a", "x/parts/b", "x/parts/c"])
    content = b"second,first,second,"
    assert composed == StoredFile("whole", len(content), checksum(content))
    assert artifacts.read(artifacts.uri("x/whole")) == content
    assert artifacts.children("x/parts") == ["a", "b", "c"]
    assert artifacts.children("x") == ["parts", "whole"]


@pytest.mark.parametrize("count", [1, 32, 33, 70])
def test_any_number_of_parts_is_put_together(artifacts: ArtifactStore, count: int) -> None:
    """And nothing is left of what more than one request takes."""
    pieces = [bytes([number]) * (number + 1) for number in range(count)]
    parts = [put(artifacts, f"x/parts/{number}", piece).name for number, piece in enumerate(pieces)]
    for scratch in (None, "x/scratch"):
        composed = artifacts.compose("x/whole", [f"x/parts/{name}" for name in parts], scratch=scratch)
        assert composed == StoredFile("whole", len(b"".join(pieces)), checksum(b"".join(pieces)))
        assert artifacts.read(artifacts.uri("x/whole")) == b"".join(pieces)
        artifacts.delete_prefix("x/whole")
        assert artifacts.children("x") == ["parts"]
    assert len(artifacts.children("x/parts")) == count


def test_the_same_whole_again_is_success_another_a_conflict(artifacts: ArtifactStore) -> None:
    """However it came there."""
    for name in ("a", "b"):
        put(artifacts, f"x/{name}", name.encode())
    put(artifacts, "x/whole", b"ab")
    found = artifacts.compose("x/whole", ["x/a", "x/b"])
    assert found == StoredFile("whole", 2, checksum(b"ab"))
    with pytest.raises(ArtifactConflict):
        artifacts.compose("x/whole", ["x/b", "x/a"])
    assert artifacts.read(artifacts.uri("x/whole")) == b"ab"


def test_of_many_that_put_the_same_together_all_succeed(artifacts: ArtifactStore) -> None:
    """Each with the same file."""
    parts = [f"x/parts/{put(artifacts, f'x/parts/{number}', b'1').name}" for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        composed = list(pool.map(lambda _: artifacts.compose("x/whole", parts), range(4)))
    assert set(composed) == {StoredFile("whole", 40, checksum(b"1" * 40))}
    assert len(artifacts.children("x/parts")) == 40


def test_what_lacks_a_part_is_not_put_together(artifacts: ArtifactStore) -> None:
    """Nothing is published; and of nothing, nothing is made."""
    put(artifacts, "x/a", b"1")
    with pytest.raises(NotFound) as error:
        artifacts.compose("x/whole", ["x/a", "x/b"])
    assert error.value.error_code == "file_not_found"
    assert "x/b" in error.value.message
    for path, parts in (("x/whole", []), ("x/whole", ["../a"]), ("../whole", ["x/a"])):
        with pytest.raises(Misconfigured):
            artifacts.compose(path, parts)
    assert artifacts.children("x") == ["a"]


@pytest.mark.parametrize("path", ["", "/", "..", "a/../b", "/etc", "a//b", "a/./b", "a\0b", "a/"])
def test_no_path_leads_out_of_the_store(artifacts: ArtifactStore, path: str) -> None:
    """Neither for writing nor for deleting."""
    for use in (artifacts.create, artifacts.delete_prefix, artifacts.remove_unpublished, artifacts.uri):
        with pytest.raises(Misconfigured):
            use(path)


def test_a_fingerprint_is_that_of_the_listing(artifacts: ArtifactStore) -> None:
    """Names, sizes and checksums, sorted."""
    files = [put(artifacts, f"x/{name}", name.encode()) for name in ("b", "a")]
    expected = fingerprint_of([(file.name, file.size, file.crc32c) for file in files])
    assert artifacts.fingerprint(artifacts.uri("x")) == expected


@pytest.mark.parametrize("name", ["plain", "with space", "per%20cent", "ha#sh", "quest?ion", "ümlaut", "a+b"])
def test_a_file_of_any_name_is_found_by_its_uri(artifacts: ArtifactStore, name: str) -> None:
    """And by the URI of its folder and its name."""
    put(artifacts, f"x/{name}", b"1")
    assert [file.name for file in artifacts.list(artifacts.uri("x"))] == [name]
    assert artifacts.read(artifacts.uri(f"x/{name}")) == b"1"
    assert artifacts.read(file_uri(artifacts.uri("x"), name)) == b"1"


@pytest.mark.parametrize("uri", ["s3://bucket/a", "http://x/a", ""])
def test_a_uri_that_no_store_reads_is_refused(artifacts: ArtifactStore, uri: str) -> None:
    """As a fault of the source."""
    for use in (artifacts.list, artifacts.read, artifacts.open, artifacts.exists):
        with pytest.raises(SourceError) as error:
            use(uri)
        assert error.value.error_code == "uri_unsupported"


def test_a_download_url_gives_the_file(artifacts: ArtifactStore) -> None:
    """To whoever has it, without more."""
    put(artifacts, "x/a file.bin", b"content")
    url = artifacts.download_url(artifacts.uri("x/a file.bin"), timedelta(hours=1))
    assert url is not None
    with urllib.request.urlopen(url) as answer:  # noqa: S310  # a URL of ours
        assert answer.read() == b"content"


@given(st.lists(st.binary(max_size=2_000_000), max_size=5))
def test_a_checksum_is_the_same_for_every_kind_of_buffer(pieces: list[bytes]) -> None:
    """bytes, bytearray, writable and read-only views."""
    expected = google_crc32c.value(b"".join(pieces))
    for kind in (bytes, bytearray, memoryview, lambda piece: memoryview(bytearray(piece))):
        crc = Crc32c()
        for piece in pieces:
            crc.update(kind(piece))
        assert int.from_bytes(base64.b64decode(crc.text), "big") == expected


def test_a_strided_or_typed_view_is_written_as_its_bytes(artifacts: ArtifactStore) -> None:
    """As tensors hand them over."""
    numbers = array.array("I", [1, 2, 3])
    stored = put(artifacts, "x/file", memoryview(numbers))  # type: ignore[arg-type]
    assert stored.size == numbers.itemsize * 3
    assert artifacts.read(artifacts.uri("x/file")) == numbers.tobytes()


def test_a_url_selects_the_store() -> None:
    """What selects none is refused by name."""
    for url in ("s3://bucket", "gs://", "gs://bucket/folder", "gs://Bucket", "bucket"):
        with pytest.raises(Misconfigured) as error:
            open_artifacts(url)
        assert repr(url) in error.value.message
