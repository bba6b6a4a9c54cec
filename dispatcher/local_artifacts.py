"""Artifacts in a directory of this machine: written under a hidden name, and linked into place when whole."""

import errno
import fcntl
import os
import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath

from dispatcher.artifacts import (
    SMALL_FILE_LIMIT,
    ArtifactReader,
    ArtifactWriter,
    StoredFile,
    byte_view,
    checked_parts,
    checked_path,
    path_of,
    read_whole,
)
from dispatcher.contract import fingerprint_of
from dispatcher.crc32c import Crc32c
from dispatcher.errors import ArtifactConflict, Misconfigured, StorageFull, Unavailable
from dispatcher.limits import bounded_listing
from dispatcher.local_files import PARTIAL, LocalReader, is_partial, walk

_BLOCK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class LocalArtifacts:
    """Artifacts under a directory; processes may share it."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._checksums: dict[tuple[str, int, int], str] = {}
        self._lock = threading.Lock()

    def uri(self, path: str) -> str:
        return self._inside(path).as_uri()

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        return _LocalWriter(self, self._inside(path), size or 0)

    def compose(self, path: str, parts: Sequence[str], *, scratch: str | None = None) -> StoredFile:
        files = [self._inside(part) for part in checked_parts(parts)]
        sizes = []
        for file in files:
            with LocalReader(file) as reader:
                sizes.append(reader.size)
        writer = self.create(path, size=sum(sizes))
        try:
            for file in files:
                with LocalReader(file) as reader:
                    for start in range(0, reader.size, _BLOCK):
                        writer.write(reader.read(start, _BLOCK))
            return writer.commit()
        finally:
            writer.discard()

    def children(self, path: str) -> list[str]:
        top = self._inside(path)
        return sorted(os.listdir(top)) if top.is_dir() else []

    def list(self, uri: str, *, checksums: bool = True) -> list[StoredFile]:
        top = path_of(uri)
        if not os.path.isdir(top):  # Path.is_dir raises for a name that is too long
            return []
        files = bounded_listing(walk(top), uri)
        found = [StoredFile(name, size, self.checksum(path) if checksums else "") for name, path, size in files]
        return sorted(found, key=lambda file: file.name)

    def read(self, uri: str, *, limit: int = SMALL_FILE_LIMIT) -> bytes:
        return read_whole(self, uri, limit)

    def open(self, uri: str) -> ArtifactReader:
        return LocalReader(path_of(uri))

    def exists(self, uri: str) -> bool:
        return path_of(uri).is_file()

    def delete_prefix(self, path: str) -> int:
        top = self._inside(path)
        if self._root.resolve() not in top.resolve().parents:
            raise Misconfigured(f"{top} leads out of the artifact store {self._root}: nothing was deleted")
        if not top.is_dir() or top.is_symlink():
            existed = top.is_symlink() or top.exists()
            top.unlink(missing_ok=True)
            self._prune(top)
            return int(existed)
        count = 0
        try:
            for directory, folders, files in os.walk(top, topdown=False):
                for name in files:
                    (Path(directory) / name).unlink(missing_ok=True)
                    count += 1
                for name in folders:
                    folder = Path(directory) / name
                    folder.unlink() if folder.is_symlink() else folder.rmdir()
            top.rmdir()
        except OSError as error:
            raise Unavailable(f"{top} cannot be removed: {error.strerror}") from error
        self._prune(top)
        return count

    def remove_unpublished(self, path: str) -> int:
        count = 0
        for directory, _, files in os.walk(self._inside(path)):
            for name in filter(is_partial, files):
                try:
                    (Path(directory) / name).unlink(missing_ok=True)
                except OSError as error:
                    raise Unavailable(f"{directory}/{name} cannot be removed: {error.strerror}") from error
                count += 1
        return count

    def fingerprint(self, uri: str) -> str:
        return fingerprint_of([(file.name, file.size, file.crc32c) for file in self.list(uri)])

    def download_url(self, uri: str, expires: timedelta) -> str | None:
        return path_of(uri).as_uri()

    def checksum(self, path: Path) -> str:
        """The file's crc32c, read once per (path, size, modification time)."""
        try:
            with path.open("rb", buffering=0) as file:
                facts = os.fstat(file.fileno())
                key = (str(path), facts.st_size, facts.st_mtime_ns)
                with self._lock:
                    known = self._checksums.get(key)
                if known is not None:
                    return known
                crc, block = Crc32c(), bytearray(_BLOCK)
                while count := file.readinto(block):
                    crc.update(memoryview(block)[:count])
        except OSError as error:
            raise Unavailable(f"{path} cannot be read: {error.strerror}") from error
        self.remember(key, crc.text)
        return crc.text

    def remember(self, key: tuple[str, int, int], crc32c: str) -> None:
        """Note a checksum that was computed while writing."""
        with self._lock:
            self._checksums[key] = crc32c

    def _prune(self, removed: Path) -> None:
        """Remove the folders that are empty now: as in a bucket, there is none without a file."""
        for folder in removed.parents:
            if folder == self._root:
                return
            try:
                folder.rmdir()
            except OSError:
                return  # somebody has put a file into it

    def _inside(self, path: str) -> Path:
        return self._root / PurePosixPath(checked_path(path))


def _reserve(descriptor: int, size: int) -> None:
    """Take room for `size` bytes, where system (not macOS) and file system (not every network one) can."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        # A full disk shows at once; and writing into reserved blocks is three times as fast on ext4.
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise


class _LocalWriter:
    """Writes a hidden temporary file beside its target; `commit` links it into place."""

    def __init__(self, store: LocalArtifacts, target: Path, reserve: int) -> None:
        self._store = store
        self._target = target
        self._temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}{PARTIAL}")
        self._crc = Crc32c()
        self._size = 0
        self._descriptor = -1
        try:
            self._descriptor = self._opened()
            if reserve:
                _reserve(self._descriptor, reserve)
        except OSError as error:
            self.discard()
            raise self._translated(error) from error

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = byte_view(data)
        self._crc.update(data)
        self._size += view.nbytes
        try:
            while view.nbytes:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            self.discard()
            raise self._translated(error) from error

    def commit(self) -> StoredFile:
        try:
            os.ftruncate(self._descriptor, self._size)
            facts = os.fstat(self._descriptor)
            self._close()
            stored = StoredFile(self._target.name, self._size, self._crc.text)
            if self._published():
                self._store.remember((str(self._target), facts.st_size, facts.st_mtime_ns), stored.crc32c)
                return stored
            found = (self._target.stat().st_size, self._store.checksum(self._target))
        except OSError as error:
            raise self._translated(error) from error
        finally:
            self.discard()
        if found != (stored.size, stored.crc32c):
            raise ArtifactConflict(
                f"{self._target} is published already with other content: {found[0]} bytes, "
                f"crc32c {found[1]}; this one has {stored.size} bytes, crc32c {stored.crc32c}"
            )
        return stored

    def discard(self) -> None:
        self._close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _opened(self) -> int:
        while True:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            # The folder may be removed just now, with the last file that was in it.
            with suppress(FileNotFoundError):
                return os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def _published(self) -> bool:
        """Put the file in place unless the name is taken; whether it did."""
        try:
            os.link(self._temporary, self._target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return self._renamed()
        return True

    def _renamed(self) -> bool:
        # Without hard links (some network and FUSE file systems) nothing creates a name atomically with its
        # content, so writers take turns on the directory instead.
        directory = os.open(self._target.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            if self._target.exists():
                return False
            os.rename(self._temporary, self._target)
            return True
        finally:
            os.close(directory)

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _translated(self, error: OSError) -> StorageFull | Unavailable:
        if error.errno in _FULL:
            return StorageFull(f"no room left for {self._target} after {self._size} bytes: free some and ask again")
        return Unavailable(f"{self._target} cannot be written: {error.strerror}")
