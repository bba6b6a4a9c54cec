"""One object on its way into Cloud Storage: create-only, in bounded memory, and never published by accident."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from google.api_core import exceptions as api
from google.api_core.retry import Retry
from google.cloud.storage import Blob
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.fileio import BlobWriter

from dispatcher.artifacts import StoredFile, byte_view
from dispatcher.crc32c import Crc32c
from dispatcher.errors import ArtifactConflict, ExportError, Unavailable
from dispatcher.google_errors import FAULTS, translated, translating

CHUNK_BYTES = 8 << 20
"""As much as the client itself sends in one request."""
_CONTENT_TYPE = "application/octet-stream"


class GcsWriter:
    """Uploads one object, which appears whole at `commit`.

    A name that is taken shows as 412 at any request. From then on nothing is sent any more, only the checksum is
    computed, and `commit` compares it with what lies there.

    Args:
        blob: The object, by name alone.
        retry: How each request is tried again.
        chunk_bytes: Up to this much goes up in one request; more in a resumable upload, whose requests have this size.
    """

    def __init__(self, blob: Blob, retry: Retry, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._blob = blob
        self._retry = retry
        self._chunk_bytes = chunk_bytes
        self._what = f"gs://{blob.bucket.name}/{blob.name}"
        self._crc = Crc32c()
        self._size = 0
        self._pending = bytearray()
        self._upload: _ResumableUpload | None = None
        self._taken = False
        self._ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._refuse_ended()
        view = byte_view(data)
        self._crc.update(data)
        self._size += view.nbytes
        if not self._taken:
            with self._sending():
                # In slices, since the client would copy all of it at once.
                for start in range(0, view.nbytes, self._chunk_bytes):
                    self._send(view[start : start + self._chunk_bytes])

    def commit(self) -> StoredFile:
        self._refuse_ended()
        if not self._taken:
            with self._sending():
                self._finish()
        self._ended = True
        stored = StoredFile(str(self._blob.name).rpartition("/")[2], self._size, self._crc.text)
        # The answer to a single request is in the blob already, and says which object is ours.
        ours = self._blob.generation
        found = self._found()
        if found == (stored.size, stored.crc32c):
            return stored
        if ours is not None:
            raise self._withdrawn(ours)
        raise ArtifactConflict(
            f"{self._what} is published already with other content: {found[0]} bytes, crc32c {found[1]}; "
            f"this one has {stored.size} bytes, crc32c {stored.crc32c}"
        )

    def discard(self) -> None:
        self._ended = True
        self._cancel()

    def _send(self, view: memoryview) -> None:
        if self._upload is None:
            if len(self._pending) + view.nbytes <= self._chunk_bytes:
                self._pending += view
                return
            self._upload = _ResumableUpload(
                self._blob,
                chunk_size=self._chunk_bytes,
                retry=self._retry,
                if_generation_match=0,
                checksum="crc32c",
                content_type=_CONTENT_TYPE,
            )
            self._upload.write(self._pending)
            self._pending = bytearray()
        self._upload.write(view)

    def _finish(self) -> None:
        if self._upload is None:
            self._blob.upload_from_string(
                bytes(self._pending),
                content_type=_CONTENT_TYPE,
                if_generation_match=0,
                checksum="crc32c",
                retry=self._retry,
            )
        else:
            self._upload.close()
            self._upload = None
        self._pending = bytearray()

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """Takes note of a 412, and ends the upload at any other fault."""
        try:
            yield
        except DataCorruption as error:
            self.discard()
            raise self._withdrawn(error.response.json()["generation"]) from error
        except (InvalidResponse, *FAULTS) as error:
            fault = _api_error(error) if isinstance(error, InvalidResponse) else error
            if isinstance(fault, api.PreconditionFailed):
                self._taken = True
                self._cancel()
                return
            self.discard()
            raise self._translated(fault) from error

    def _found(self) -> tuple[int, str]:
        """Size and crc32c of what lies under the name."""
        with translating(self._what):
            try:
                if self._blob.generation is None:
                    self._blob.reload(retry=self._retry)
            except api.NotFound as error:
                raise Unavailable(
                    f"{self._what} was deleted while it was published: try again", code="artifact_vanished"
                ) from error
        return int(self._blob.size), str(self._blob.crc32c)

    def _withdrawn(self, generation: int | str) -> Unavailable:
        """Delete what we published, which is not what we sent."""
        self._delete(int(generation))
        return self._corrupted()

    def _delete(self, generation: int) -> None:
        with translating(self._what), suppress(api.NotFound, api.PreconditionFailed):
            named = self._blob.bucket.blob(self._blob.name)
            named.delete(if_generation_match=generation, retry=self._retry)

    def _corrupted(self) -> Unavailable:
        return Unavailable(
            f"{self._what} did not arrive as it was sent, and was not kept: try again", code="upload_corrupted"
        )

    def _translated(self, fault: Exception) -> ExportError:
        if isinstance(fault, api.BadRequest) and "crc32c" in str(fault).lower():
            return self._corrupted()
        lost = isinstance(fault, api.NotFound) or getattr(fault, "code", None) == 410
        if lost and self._size > self._chunk_bytes and "upload_id" in str(fault):
            return Unavailable(f"the upload of {self._what} was dropped by the service: try again", code="upload_lost")
        return translated(fault, self._what)

    def _cancel(self) -> None:
        self._pending = bytearray()
        if self._upload is not None:
            upload, self._upload = self._upload, None
            # What cannot be cancelled stays invisible, and is dropped by the service after a week.
            with suppress(*FAULTS):
                upload.terminate()

    def _refuse_ended(self) -> None:
        if self._ended:
            raise Unavailable(f"{self._what} was given up, or is published: nothing more can be written to it")


class _ResumableUpload(BlobWriter):  # type: ignore[misc]  # the client ships no types
    """The client's own, with two of its ends tied up."""

    def terminate(self) -> None:
        """Cancel the upload session; the client's own sends that to a URL of no session (3.17.1)."""
        if self._upload_and_transport:
            upload, transport = self._upload_and_transport
            transport.delete(upload.resumable_url)
        self._buffer.close()

    def __del__(self) -> None:
        """Nothing: io's own finalizer closes what is collected, and closing is what publishes."""


def _api_error(error: InvalidResponse) -> api.GoogleAPICallError:
    """What the client makes of it wherever else it meets it."""
    response = error.response
    message = f"{response.request.method} {response.request.url}: {response.text}"
    fault: api.GoogleAPICallError = api.from_http_status(response.status_code, message, response=response)
    return fault
