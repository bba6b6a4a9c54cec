"""What every artifact store promises."""

import array
import base64
import errno
import os
import sys
import threading
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.artifacts import ArtifactStore, StoredFile, open_artifacts, path_of
from dispatcher.contract import fingerprint_of
from dispatcher.crc32c import Crc32c
from dispatcher.errors import ArtifactConflict, Misconfigured, NotFound, SourceError, StorageFull, Unavailable
from dispatcher.local_artifacts import LocalArtifacts


def put(store: ArtifactStore, path: str, data: bytes) -> StoredFile:
    writer = store.create(path)
    writer.write(data)
    return writer.commit()


def on_disk(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


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
    ready, results = threading.Barrier(8), []

    def write(number: int) -> None:
        ready.wait()
        try:
            put(artifacts, "x/file", bytes([number]) * 100_000)
        except ArtifactConflict:
            results.append("conflict")
        else:
            results.append("published")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["conflict"] * 7 + ["published"]
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
    assert artifacts.read_range(artifacts.uri("x/file"), 3, 4) == b"3456"
    assert artifacts.read_range(artifacts.uri("x/file"), 8, 4) == b"89"


def test_deleting_a_prefix_takes_everything_under_it_and_nothing_beside(artifacts: ArtifactStore) -> None:
    """Unpublished files too."""
    put(artifacts, "a/b/one", b"1")
    put(artifacts, "a/two", b"2")
    put(artifacts, "ab/three", b"3")
    artifacts.create("a/b/partial").write(b"4")
    assert artifacts.delete_prefix("a") == 3
    assert artifacts.delete_prefix("a") == 0
    assert artifacts.list(artifacts.uri("a")) == []
    assert artifacts.exists(artifacts.uri("ab/three"))


@pytest.mark.parametrize("path", ["", "/", "..", "a/../b", "/etc", "a//b", "a/./b", "a\0b", "a/"])
def test_no_path_leads_out_of_the_store(artifacts: ArtifactStore, path: str) -> None:
    """Neither for writing nor for deleting."""
    for use in (artifacts.create, artifacts.delete_prefix, artifacts.uri):
        with pytest.raises(Misconfigured):
            use(path)


def test_a_fingerprint_is_that_of_the_listing(artifacts: ArtifactStore) -> None:
    """Names, sizes and checksums, sorted."""
    files = [put(artifacts, f"x/{name}", name.encode()) for name in ("b", "a")]
    expected = fingerprint_of([(file.name, file.size, file.crc32c) for file in files])
    assert artifacts.fingerprint(artifacts.uri("x")) == expected


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


class TestLocal:
    """What only a directory can show."""

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_said_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """Half a file would take the room that is missing."""
        store = LocalArtifacts(tmp_path)
        writer = store.create("x/file")
        writer.write(b"12")

        def full(descriptor: int, data: memoryview) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StorageFull):
            writer.write(b"34")
        assert on_disk(tmp_path) == []

    def test_a_short_write_is_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel may take less than it was given."""
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
        store = LocalArtifacts(tmp_path)
        put(store, "file", b"0123456789")
        assert (tmp_path / "file").read_bytes() == b"0123456789"

    def test_without_hard_links_publishing_is_still_create_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Some network file systems have none."""

        def refused(*_: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refused)
        store = LocalArtifacts(tmp_path)
        test_of_many_writers_one_publishes(store)
        assert on_disk(tmp_path) == ["x/file"]

    def test_a_directory_that_cannot_be_made_is_unavailable(self, tmp_path: Path) -> None:
        """A file stands in its way."""
        (tmp_path / "x").write_text("")
        with pytest.raises(Unavailable):
            LocalArtifacts(tmp_path).create("x/file")

    def test_a_changed_file_has_another_fingerprint(self, tmp_path: Path) -> None:
        """The checksum is kept only as long as size and time of change are the same."""
        store = LocalArtifacts(tmp_path / "store")
        (tmp_path / "adapter").mkdir()
        file = tmp_path / "adapter" / "weights"
        file.write_bytes(b"one")
        before = store.fingerprint(str(tmp_path / "adapter"))
        file.write_bytes(b"two")
        os.utime(file, ns=(1, 1))
        assert store.fingerprint(str(tmp_path / "adapter")) != before

    def test_a_link_out_of_the_directory_is_refused(self, tmp_path: Path) -> None:
        """An adapter directory must not make us read something else; links inside are fine."""
        store = LocalArtifacts(tmp_path / "store")
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "real").write_text("1")
        (adapter / "alias").symlink_to("real")
        assert [file.name for file in store.list(str(adapter))] == ["alias", "real"]
        for target in ("/etc/passwd", str(tmp_path), "/nowhere"):
            link = adapter / "link"
            link.symlink_to(target)
            with pytest.raises(SourceError) as error:
                store.list(str(adapter))
            assert error.value.error_code == "link_refused"
            link.unlink()

    @pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses such names itself")
    @pytest.mark.parametrize("kind", ["file", "folder", "link"])
    def test_a_name_that_is_not_utf8_is_refused(self, tmp_path: Path, kind: str) -> None:
        """In words that can be logged and answered, which the name itself cannot."""
        name = os.fsencode(tmp_path) + b"/adapter/caf\xe9"
        (tmp_path / "adapter").mkdir()
        if kind == "file":
            Path(os.fsdecode(name)).write_text("1")
        elif kind == "folder":
            Path(os.fsdecode(name)).mkdir()
            (Path(os.fsdecode(name)) / "file").write_text("1")
        else:
            os.symlink(b"/etc/passwd", name)
        store = LocalArtifacts(tmp_path / "store")
        for checksums in (True, False):
            with pytest.raises(SourceError) as error:
                store.list(str(tmp_path / "adapter"), checksums=checksums)
            assert error.value.error_code == "file_name_invalid"
            assert r"caf\xe9" in error.value.message.encode().decode()

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        """Only regular files are listed."""
        os.mkfifo(tmp_path / "pipe")
        assert LocalArtifacts(tmp_path / "store").list(str(tmp_path)) == []

    def test_a_linked_prefix_does_not_delete_what_it_points_to(self, tmp_path: Path) -> None:
        """Neither by itself nor from within."""
        store, outside = LocalArtifacts(tmp_path / "store"), tmp_path / "outside"
        outside.mkdir()
        (outside / "keep").write_text("1")
        put(store, "a/file", b"1")
        (tmp_path / "store" / "a" / "link").symlink_to(outside)
        (tmp_path / "store" / "b").symlink_to(outside)
        store.delete_prefix("a")
        with pytest.raises(Misconfigured):
            store.delete_prefix("b")
        assert (outside / "keep").exists()

    @pytest.mark.parametrize("uri", ["gs://bucket/a", "s3://x", "file://host/a", "http://x/a", "", "a\0b"])
    def test_a_uri_of_another_machine_is_refused(self, uri: str) -> None:
        """By name, and as a fault of the source."""
        with pytest.raises(SourceError) as error:
            path_of(uri)
        assert error.value.error_code == "uri_unsupported"

    @pytest.mark.parametrize("name", ["plain", "with space", "per%20cent", "ha#sh", "quest?ion", "ümlaut"])
    def test_a_uri_leads_back_to_its_path(self, tmp_path: Path, name: str) -> None:
        """Whatever its characters."""
        store = open_artifacts((tmp_path / name).as_uri())
        assert path_of(store.uri("a")) == tmp_path / name / "a"
        assert path_of(str(tmp_path / name)) == tmp_path / name


def test_a_url_selects_the_store() -> None:
    """Cloud Storage is named, and says that it is not there yet."""
    with pytest.raises(Misconfigured) as error:
        open_artifacts("gs://bucket")
    assert error.value.error_code == "not_available_yet"
    with pytest.raises(Misconfigured):
        open_artifacts("s3://bucket")


needs_reservation = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no room")


@pytest.mark.parametrize("code", [None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_where_no_room_can_be_reserved_the_file_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """macOS has no such call, some file systems refuse it."""

    def refused(*_: object) -> None:
        assert code is not None
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refused, raising=False)
    writer = LocalArtifacts(tmp_path).create("x/file", size=1 << 20)
    writer.write(b"whole")
    assert writer.commit().size == 5
    assert (tmp_path / "x" / "file").read_bytes() == b"whole"


def test_a_disk_too_full_for_the_reservation_is_said_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That refusal is not ignored with the others."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(StorageFull):
        LocalArtifacts(tmp_path).create("x/file", size=1 << 20)
    assert on_disk(tmp_path) == []


@needs_reservation
def test_room_for_a_file_of_known_size_is_taken_at_once(tmp_path: Path) -> None:
    """Before a byte is written; what was reserved too much is given back."""
    writer = LocalArtifacts(tmp_path).create("a/b", size=1 << 20)
    (partial,) = tmp_path.rglob("*.partial")
    assert partial.stat().st_blocks * 512 >= 1 << 20
    writer.write(b"short")
    writer.commit()
    assert (tmp_path / "a" / "b").read_bytes() == b"short"
