"""Where artifacts lie: create-only files under a root, each with its size and crc32c."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from dispatcher.errors import Misconfigured, SourceError

SMALL_FILE_LIMIT = 16 << 20


@dataclass(frozen=True)
class StoredFile:
    """A published file."""

    name: str
    """Its path relative to the listed prefix, with `/` between the parts."""
    size: int
    """Bytes."""
    crc32c: str
    """Base64 of the 4 big-endian bytes, as Cloud Storage reports it; empty when it was not asked for."""


class ArtifactWriter(Protocol):
    """A file being written; invisible until `commit`."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`.

        Raises:
            StorageFull: No room; what was written is removed.
        """

    def commit(self) -> StoredFile:
        """Publish the file under its name, all of it or nothing; its `name` is the last part of the path.

        Raises:
            ArtifactConflict: The name is taken by other content. The same content counts as success.
            StorageFull: No room; what was written is removed.
        """

    def discard(self) -> None:
        """Remove what was written; harmless after `commit`."""


class ArtifactStore(Protocol):
    """A tree of files of which none is ever overwritten."""

    def uri(self, path: str) -> str:
        """The absolute URI of a path inside the store."""

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        """Start writing the file at a path inside the store; `size` is how many bytes it will have, if known.

        Raises:
            StorageFull: There is no room for `size` bytes.
        """

    def children(self, path: str) -> list[str]:
        """The names directly under a path inside the store, of files and of folders, unpublished ones too."""

    def list(self, uri: str, *, checksums: bool = True) -> list[StoredFile]:
        """Every published file under a URI or plain path, recursively, by name; none when nothing is there.

        Without `checksums` no file is read for its crc32c.

        Raises:
            SourceError: A symbolic link leads out of it (`link_refused`), or a name is not UTF-8
                (`file_name_invalid`).
        """

    def read(self, uri: str, *, limit: int = SMALL_FILE_LIMIT) -> bytes:
        """A small file's content.

        Raises:
            NotFound: No such file (`file_not_found`).
            SourceError: It is larger than `limit` bytes (`file_too_large`).
        """

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        """`length` bytes of a published file from byte `offset`; fewer only at its end.

        Raises:
            NotFound: No such file (`file_not_found`).
        """

    def exists(self, uri: str) -> bool:
        """Whether a published file is there."""

    def delete_prefix(self, path: str) -> int:
        """Remove everything under a path inside the store, unpublished files too; how many files that was."""

    def fingerprint(self, uri: str) -> str:
        """`contract.fingerprint_of` over the files under a URI or plain path."""


def path_of(uri: str) -> Path:
    """The local path that a `file://` URI or a plain path names, absolute.

    Raises:
        SourceError: It names something that is not on this machine.
    """
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        text = unquote(parts.path)
    elif "://" in uri or parts.scheme == "file":
        raise SourceError(f"{uri!r} is not on this machine: expected a file:// URI or a path", code="uri_unsupported")
    else:
        text = uri
    if not text or "\0" in text:
        raise SourceError(f"{uri!r} names no file: expected a file:// URI or a path", code="uri_unsupported")
    return Path(text).absolute()


def publish(
    store: ArtifactStore, path: str, fill: Callable[[ArtifactWriter], object], *, size: int | None = None
) -> StoredFile:
    """Create a file, let `fill` write its content, and publish it; when anything raises, nothing stays.

    Raises:
        ArtifactConflict, StorageFull: As the writer's `commit` and `write`.
    """
    writer = store.create(path, size=size)
    try:
        fill(writer)
        return writer.commit()
    except BaseException:
        writer.discard()
        raise


def open_artifacts(url: str) -> ArtifactStore:
    """The artifact store that a URL selects: `file:///directory` or `gs://bucket`."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        # It stands on this file, so it cannot be imported above.
        from dispatcher.local_artifacts import LocalArtifacts

        return LocalArtifacts(path_of(url))
    if parts.scheme == "gs":
        raise Misconfigured(f"artifact store {url!r}: Cloud Storage is not in this build yet", code="not_available_yet")
    raise Misconfigured(f"artifact store {url!r}: expected file:///directory or gs://bucket")
