"""What only the artifact store in a directory can show."""

import errno
import os
import sys
from pathlib import Path

import pytest

from dispatcher.artifacts import open_artifacts, path_of
from dispatcher.errors import Misconfigured, NotFound, SourceError, StorageFull, Unavailable
from dispatcher.local_artifacts import LocalArtifacts
from tests.ports.storing import put, write_at_once


def on_disk(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
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


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may take less than it was given."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    store = LocalArtifacts(tmp_path)
    put(store, "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_without_hard_links_publishing_is_still_create_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none."""

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refused)
    assert write_at_once(LocalArtifacts(tmp_path), "x/file") == ["conflict"] * 7 + ["published"]
    assert on_disk(tmp_path) == ["x/file"]


def test_a_directory_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    """A file stands in its way."""
    (tmp_path / "x").write_text("")
    with pytest.raises(Unavailable):
        LocalArtifacts(tmp_path).create("x/file")


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    """The checksum is kept only as long as size and time of change are the same."""
    store = LocalArtifacts(tmp_path / "store")
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter" / "weights"
    file.write_bytes(b"one")
    before = store.fingerprint(str(tmp_path / "adapter"))
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert store.fingerprint(str(tmp_path / "adapter")) != before


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
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
def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path, kind: str) -> None:
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


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Only regular files are listed."""
    os.mkfifo(tmp_path / "pipe")
    assert LocalArtifacts(tmp_path / "store").list(str(tmp_path)) == []


def test_a_linked_prefix_does_not_delete_what_it_points_to(tmp_path: Path) -> None:
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
def test_a_uri_of_another_machine_is_refused(uri: str) -> None:
    """By name, and as a fault of the source."""
    with pytest.raises(SourceError) as error:
        path_of(uri)
    assert error.value.error_code == "uri_unsupported"


@pytest.mark.parametrize("name", ["plain", "with space", "per%20cent", "ha#sh", "quest?ion", "ümlaut"])
def test_a_uri_leads_back_to_its_path(tmp_path: Path, name: str) -> None:
    """Whatever its characters."""
    store = open_artifacts((tmp_path / name).as_uri())
    assert path_of(store.uri("a")) == tmp_path / name / "a"
    assert path_of(str(tmp_path / name)) == tmp_path / name


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


def test_an_unpublished_file_is_a_child_and_goes_with_its_prefix(tmp_path: Path) -> None:
    """What a killed writer leaves takes room."""
    store = LocalArtifacts(tmp_path)
    writer = store.create("a/b/partial")
    writer.write(b"4")
    assert len(store.children("a/b")) == 1
    assert store.delete_prefix("a") == 1
    writer.discard()
    assert on_disk(tmp_path) == []


def test_an_open_file_stays_what_it_was(tmp_path: Path) -> None:
    """Whatever takes its place."""
    store = LocalArtifacts(tmp_path)
    put(store, "x/file", b"first")
    with store.open(store.uri("x/file")) as reader:
        (tmp_path / "x" / "other").write_bytes(b"second")
        os.replace(tmp_path / "x" / "other", tmp_path / "x" / "file")
        assert reader.read(0, 10) == b"first"


def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path: Path) -> None:
    """An adapter's directory may hold anything."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotFound):
        LocalArtifacts(tmp_path / "store").open(str(tmp_path / "pipe"))
