"""Where artifacts lie: create-only files under a root, each with its size and crc32c."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, Self
from urllib.parse import quote, unquote, urlsplit

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
    """Base64 of the 4 big-endian bytes, as Cloud Storage reports it; empty where it is not told, see `list`."""


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


class ArtifactReader(Protocol):
    """A published file, open: every byte comes from the very file that was there when it was opened."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from byte `offset`; fewer only at the file's end.

        Raises:
            Unavailable: It cannot be read, or (Cloud Storage) was deleted or replaced meanwhile (`source_changed`).
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ArtifactStore(Protocol):
    """A tree of files of which none is ever overwritten."""

    def uri(self, path: str) -> str:
        """The absolute URI of a path inside the store."""

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        """Start writing the file at a path inside the store; `size` is how many bytes it will have, if known.

        Raises:
            StorageFull: There is no room for `size` bytes.
        """

    def compose(self, path: str, parts: Sequence[str], *, scratch: str | None = None) -> StoredFile:
        """Publish the file that is all of `parts`, in order: paths inside the store, which stay as they are.

        The `name` of what is returned is the last part of the path.

        In Cloud Storage no byte of them passes through this process. Size and crc32c of the result are compared with
        those of the parts together.

        Args:
            path: Where to; appears whole, or not at all.
            parts: At least one.
            scratch: A folder inside the store for what a composition of very many parts makes on the way, and removes
                again unless it is killed; by default that of the first part.

        Raises:
            ArtifactConflict: The name is taken by other content. The same content counts as success.
            NotFound: A part is not there (`file_not_found`).
            Unavailable: A part was deleted or replaced meanwhile (`source_changed`), or the result is not what the
                parts are together, and was removed (`upload_corrupted`).
            StorageFull: No room; what was written is removed.
        """

    def children(self, path: str) -> list[str]:
        """The names directly under a path inside the store, of files and of folders, unpublished ones too."""

    def list(self, uri: str, *, checksums: bool = True) -> list[StoredFile]:
        """Every published file under a URI or plain path, recursively, by name; none when nothing is there.

        Without `checksums` no file is read for its crc32c, which is empty then, unless the store knows it anyway.

        Raises:
            SourceError: There are over `MAX_LISTED_FILES` (`too_many_files`), a symbolic link leads out of it
                (`link_refused`), a name cannot be a file's here (`file_name_invalid`), the bucket, of someone else, may
                not be read (`source_forbidden`), or it tells no checksum of an object (`checksum_missing`).
        """

    def read(self, uri: str, *, limit: int = SMALL_FILE_LIMIT) -> bytes:
        """A small file's content.

        Raises:
            NotFound: No such file (`file_not_found`).
            SourceError: It is larger than `limit` bytes (`file_too_large`).
        """

    def open(self, uri: str) -> ArtifactReader:
        """A published file, to read parts of it; leave the `with` statement to close it.

        Raises:
            NotFound: No such file (`file_not_found`).
            SourceError: It is stored compressed (`source_encoded`), so that its bytes are not the file's.
        """

    def exists(self, uri: str) -> bool:
        """Whether a published file is there."""

    def delete_prefix(self, path: str) -> int:
        """Remove everything under a path inside the store, unpublished files too; how many files that was.

        Cloud Storage shows no unpublished ones; it drops them by itself after a week.
        """

    def remove_unpublished(self, path: str) -> int:
        """Remove only what writers that were killed left under a path inside the store; how many files that was.

        A writer that is still at work loses its file too, and its `commit` then raises Unavailable.
        """

    def fingerprint(self, uri: str) -> str:
        """`contract.fingerprint_of` over the files under a URI or plain path."""

    def download_url(self, uri: str, expires: timedelta) -> str | None:
        """Where whoever holds the URL can fetch a published file, for as long as `expires`, at most 12 h.

        Returns:
            A `file://` URI for a local file, else a signed URL; None where the credentials of this process sign
            nothing, as a user's own do.

        Raises:
            Unavailable, Misconfigured: What signs does not answer, or refuses.
        """


def is_bucket(store: ArtifactStore) -> bool:
    """Whether a store is in Cloud Storage: its files are not this machine's, and it can put parts together itself."""
    return store.uri("any").startswith("gs://")


def path_of(uri: str) -> Path:
    """The local path that a `file://` URI or a plain path names, absolute.

    Raises:
        SourceError: It names something that is not on this machine.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:  # of an address in brackets that is none
        raise SourceError(f"{uri!r} is no URI: expected a file:// URI or a path", code="uri_unsupported") from error
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        text = unquote(parts.path)
    elif "://" in uri or parts.scheme == "file":
        raise SourceError(f"{uri!r} is not on this machine: expected a file:// URI or a path", code="uri_unsupported")
    else:
        text = uri
    if not text or "\0" in text:
        raise SourceError(f"{uri!r} names no file: expected a file:// URI or a path", code="uri_unsupported")
    return Path(text).absolute()


def checked_path(path: str) -> str:
    """A path inside a store, as it was given.

    Raises:
        Misconfigured: It is empty, absolute, or leads out of the store.
    """
    if not path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise Misconfigured(f"{path!r} is no path inside the artifact store: expected a/b/c without '..'")
    return path


def checked_parts(parts: Sequence[str]) -> list[str]:
    """Paths inside a store, as they were given.

    Raises:
        Misconfigured: There are none, or one leads out of the store.
    """
    if not parts:
        raise Misconfigured("no file is put together of no parts: expected one at least")
    return [checked_path(part) for part in parts]


def file_uri(uri: str, name: str) -> str:
    """The URI of a file that was listed under a URI or plain path."""
    return f"{uri.rstrip('/')}/{quote(name) if uri.startswith('file:') else name}"


def read_whole(store: ArtifactStore, uri: str, limit: int) -> bytes:
    """All of a file of at most `limit` bytes; what stores make `read` of."""
    with store.open(uri) as reader:
        if reader.size > limit:
            raise SourceError(
                f"{uri} has {reader.size} bytes, over {limit}: too large for what it should be", code="file_too_large"
            )
        return reader.read(0, reader.size)


def byte_view(data: bytes | bytearray | memoryview) -> memoryview:
    """The bytes of a contiguous buffer, whatever its items are."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty view cannot always be cast


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


def open_artifacts(url: str, *, signing_account: str | None = None, patience: float | None = None) -> ArtifactStore:
    """The artifact store that a URL selects: `file:///directory` or `gs://bucket`.

    Args:
        url: Which one.
        signing_account: The service account that signs download URLs; None is the one that the process runs as.
        patience: Seconds after which Cloud Storage counts as away, where an HTTP answer waits for it; None is for
            work that can wait minutes.

    Raises:
        Misconfigured: The URL is neither, or Cloud Storage has no credentials here.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        # It stands on this file, so it cannot be imported above.
        from dispatcher.local_artifacts import LocalArtifacts

        return LocalArtifacts(path_of(url))
    if re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9]/?", url):
        # Half a second of imports that a laptop does without.
        from dispatcher.gcs_artifacts import GcsArtifacts

        return GcsArtifacts(parts.netloc, signing_account=signing_account, patience=patience)
    raise Misconfigured(f"artifact store {url!r}: expected file:///directory or gs://bucket")
