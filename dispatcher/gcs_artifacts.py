"""Artifacts in a bucket of Cloud Storage: create-only by precondition, and read by generation."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

from google.api_core import exceptions as api
from google.api_core.retry import Retry
from google.cloud.storage import Blob, Client
from google.cloud.storage.retry import DEFAULT_RETRY

from dispatcher.artifacts import (
    SMALL_FILE_LIMIT,
    ArtifactReader,
    ArtifactWriter,
    StoredFile,
    checked_parts,
    checked_path,
    read_whole,
)
from dispatcher.contract import fingerprint_of
from dispatcher.errors import Misconfigured, NotFound, SourceError, Unavailable
from dispatcher.gcs_compose import GcsComposer
from dispatcher.gcs_signing import UrlSigner
from dispatcher.gcs_upload import CHUNK_BYTES, GcsWriter
from dispatcher.google_errors import translating
from dispatcher.limits import bounded_listing

MAX_URL_LIFE = timedelta(hours=12)
"""What IAM signs with, it may have replaced after that."""
MAX_NAME_BYTES = 255
"""What a part of a path may have on the usual file systems."""
PAGE = 1000
REQUEST_SECONDS = 60.0
"""The client's own."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]+[a-z0-9]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LISTED = "items(name,size,crc32c,generation),prefixes,nextPageToken"


class GcsArtifacts:
    """Artifacts in one bucket; what others published is read from any.

    Args:
        bucket: Its name.
        signing_account: Whose signature download URLs bear; None is the service account that this process runs as.
        signer: Signs them instead.
        retry: How each request is tried again.
        patience: Seconds after which a request and its repetitions are given up, where an HTTP answer waits for them;
            None is what `retry` says, and a minute for one request.
        page_size: How many objects one request lists.
        chunk_bytes: How much one request uploads; a multiple of 256 KiB, and at most 8 MiB.

    Raises:
        Misconfigured: There are no credentials (`no_credentials`).
    """

    def __init__(
        self,
        bucket: str,
        *,
        signing_account: str | None = None,
        signer: UrlSigner | None = None,
        retry: Retry = DEFAULT_RETRY,
        patience: float | None = None,
        page_size: int = PAGE,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        # The client would ask for the bucket itself, in a thread that outlives it, to describe it in traces.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        with translating("Cloud Storage"):
            self._client = Client(project=None)
        self._bucket = bucket
        # Nothing of Google's is spoken to without TLS, only an emulator; and that checks no signature.
        emulated = str(self._client.api_endpoint).startswith("http://")
        self._signer = signer or (None if emulated else UrlSigner(signing_account))
        # The last request may begin when the time for repetitions is just over.
        self._retry = retry if patience is None else retry.with_timeout(patience / 2)
        self._timeout = REQUEST_SECONDS if patience is None else patience / 2
        self._page_size = page_size
        self._chunk_bytes = chunk_bytes

    def uri(self, path: str) -> str:
        return f"gs://{self._bucket}/{checked_path(path)}"

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        return GcsWriter(self._blob(self._bucket, checked_path(path)), self._retry, self._chunk_bytes)

    def compose(self, path: str, parts: Sequence[str], *, scratch: str | None = None) -> StoredFile:
        sources = checked_parts(parts)
        between = checked_path(scratch) if scratch else sources[0].rpartition("/")[0] or "scratch"
        composer = GcsComposer(self._client.bucket(self._bucket), self._retry, self._timeout)
        return composer.compose(checked_path(path), sources, between)

    def children(self, path: str) -> list[str]:
        prefix = f"{checked_path(path)}/"
        with translating(f"bucket {self._bucket}"):
            pages = self._listing(self._bucket, prefix, delimiter="/")
            names = {blob.name.removeprefix(prefix) for blob in pages}
            names |= {folder.removeprefix(prefix).rstrip("/") for folder in pages.prefixes}
        return sorted(names - {""})

    def list(self, uri: str, *, checksums: bool = True) -> list[StoredFile]:
        bucket, name = _place(uri)
        prefix = f"{name}/" if name else ""
        with self._reading(bucket):
            try:
                blobs = bounded_listing(self._listing(bucket, prefix), uri)
            except api.NotFound:
                if bucket == self._bucket:
                    raise
                blobs = []  # with someone else's bucket, what was in it is gone
        found = []
        for blob in blobs:
            relative = blob.name.removeprefix(prefix)
            if relative and not relative.endswith("/"):  # else a folder, as consoles and FUSE mounts make them
                _refuse_unsafe(relative, uri)
                if blob.crc32c is None and checksums:
                    raise SourceError(
                        f"{uri}/{relative} has no crc32c, as objects under a customer-supplied key have none: "
                        "store it without such a key",
                        code="checksum_missing",
                    )
                found.append(StoredFile(relative, int(blob.size), blob.crc32c or ""))
        return sorted(found, key=lambda file: file.name)

    def read(self, uri: str, *, limit: int = SMALL_FILE_LIMIT) -> bytes:
        return read_whole(self, uri, limit)

    def open(self, uri: str) -> ArtifactReader:
        bucket, name = _place(uri)
        if not name:
            raise _missing(uri)
        blob = self._blob(bucket, name)
        with self._reading(bucket):
            try:
                blob.reload(retry=self._retry, timeout=self._timeout)
            except api.NotFound as error:
                raise _missing(uri) from error
        if blob.content_encoding:
            raise SourceError(
                f"{uri} is stored with Content-Encoding {blob.content_encoding}: expected the file as it is; "
                "upload it again uncompressed (gcloud storage cp without --gzip-local)",
                code="source_encoded",
            )
        return _GcsReader(self._blob(bucket, name), int(blob.size), int(blob.generation), self._retry, self._timeout)

    def exists(self, uri: str) -> bool:
        bucket, name = _place(uri)
        with self._reading(bucket):
            return bool(name) and bool(self._blob(bucket, name).exists(retry=self._retry, timeout=self._timeout))

    def delete_prefix(self, path: str) -> int:
        name = checked_path(path)
        with translating(f"bucket {self._bucket}"):
            exact = self._client.bucket(self._bucket).get_blob(name, retry=self._retry)
            under = self._listing(self._bucket, f"{name}/")
            return sum(self._deleted(blob) for blob in [*([exact] if exact else []), *under])

    def remove_unpublished(self, path: str) -> int:
        checked_path(path)
        return 0  # an upload that was begun is no object; the service drops it after a week

    def fingerprint(self, uri: str) -> str:
        return fingerprint_of([(file.name, file.size, file.crc32c) for file in self.list(uri)])

    def download_url(self, uri: str, expires: timedelta) -> str | None:
        if not timedelta() < expires <= MAX_URL_LIFE:
            raise Misconfigured(f"a download URL cannot live {expires}: expected at most {MAX_URL_LIFE}")
        blob = self._blob(*_place(uri))
        if self._signer is None:
            return str(blob.public_url)
        credentials = self._signer.credentials()
        if credentials is None:
            return None
        with translating("signing of download URLs"):
            return str(
                blob.generate_signed_url(version="v4", expiration=expires, method="GET", credentials=credentials)
            )

    def _blob(self, bucket: str, name: str) -> Blob:
        return self._client.bucket(bucket).blob(name)

    def _listing(self, bucket: str, prefix: str, *, delimiter: str | None = None) -> Any:
        """The objects under a prefix, page by page; then, with a delimiter, `prefixes` has the folders."""
        return self._client.list_blobs(
            bucket,
            prefix=prefix or None,
            delimiter=delimiter,
            page_size=self._page_size,
            fields=_LISTED,
            retry=self._retry,
            timeout=self._timeout,
        )

    @contextmanager
    def _reading(self, bucket: str) -> Iterator[None]:
        """A refusal is for our operator to mend, but in someone else's bucket it is a fault of the source."""
        try:
            with translating(f"bucket {bucket}"):
                yield
        except Misconfigured as error:
            if bucket == self._bucket or error.error_code != "permission_denied":
                raise
            raise SourceError(
                f"gs://{bucket} may not be read by this service account: make it a Storage Object Viewer there",
                code="source_forbidden",
            ) from error

    def _deleted(self, blob: Blob) -> bool:
        """Whether it was there still, and is not any more; what has replaced it since is left alone."""
        try:
            self._blob(self._bucket, blob.name).delete(if_generation_match=int(blob.generation), retry=self._retry)
        except (api.NotFound, api.PreconditionFailed):
            return False
        return True


class _GcsReader:
    """Reads one generation, as long as that is the live one."""

    def __init__(self, blob: Blob, size: int, generation: int, retry: Retry, timeout: float) -> None:
        self._blob = blob
        self._generation = generation
        self._retry = retry
        self._timeout = timeout
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        what = f"gs://{self._blob.bucket.name}/{self._blob.name}"
        with translating(what):
            try:
                data = self._blob.download_as_bytes(
                    start=offset,
                    end=offset + length - 1,
                    if_generation_match=self._generation,
                    # Else an object that is stored with gzip arrives unpacked, with other offsets than its own.
                    raw_download=True,
                    checksum=None,
                    retry=self._retry,
                    timeout=self._timeout,
                )
            except (api.NotFound, api.PreconditionFailed) as error:
                raise Unavailable(
                    f"{what} was deleted or replaced while it was read: try again", code="source_changed"
                ) from error
        if len(data) != length:
            raise Unavailable(f"{what}: {len(data)} of {length} bytes came from offset {offset}: try again")
        return bytes(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""


def _place(uri: str) -> tuple[str, str]:
    """Bucket and object name, or prefix without its last `/`, of a `gs://` URI; nothing in it is encoded.

    Raises:
        SourceError: It is of another kind (`uri_unsupported`).
    """
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    if not uri.startswith("gs://") or not _BUCKET.fullmatch(bucket) or _CONTROL.search(name):
        raise SourceError(
            f"{uri!r} is not in Cloud Storage, which is where this dispatcher reads: expected gs://bucket/path",
            code="uri_unsupported",
        )
    return bucket, name.rstrip("/")


def _refuse_unsafe(name: str, uri: str) -> None:
    """An object may have any name; but these become names of local files, in records and in manifests."""
    parts = name.split("/")
    too_long = any(len(part.encode()) > MAX_NAME_BYTES for part in parts)
    if too_long or _CONTROL.search(name) or any(part in ("", ".", "..") for part in parts):
        raise SourceError(
            f"the object name {name!r} under {uri} cannot be a file's"
            f"{f' (over {MAX_NAME_BYTES} bytes)' if too_long else ''}: rename or delete the object",
            code="file_name_invalid",
        )


def _missing(uri: str) -> NotFound:
    return NotFound(f"there is no file {uri}", code="file_not_found")
