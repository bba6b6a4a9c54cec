"""What the stand-in for Cloud Storage does about uploads: sessions that survive lost answers, checksums compared.

- https://cloud.google.com/storage/docs/performing-resumable-uploads
- https://cloud.google.com/storage/docs/data-validation
"""

import base64
import itertools
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

import google_crc32c

from infra.local.placing import staging_file

_BLOCK = 1 << 20
CLIENT_CLOSED = 499
"""What a cancelled session answers with; no status of HTTP's own."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, whole."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def refusal(status: int, message: str) -> Answer:
    """An error as Cloud Storage's JSON API says it."""
    error = {"code": status, "message": message, "errors": [{"domain": "global", "message": message}]}
    return Answer(status, {"Content-Type": "application/json"}, json.dumps({"error": error}).encode())


@dataclass(frozen=True)
class Upload:
    """A whole object, ready to be stored."""

    metadata: dict[str, Any]
    file: IO[bytes]
    """Its content, from the beginning."""
    size: int
    """Bytes."""
    crc: bytes
    """CRC-32C of the content, big-endian."""

    def as_multipart(self) -> tuple[dict[str, str], Iterator[bytes]]:
        """Headers and body of an upload in one request."""
        boundary = secrets.token_hex(16)
        kind = self.metadata["contentType"]
        head = f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps(self.metadata)}\r\n"
        head += f"--{boundary}\r\nContent-Type: {kind}\r\n\r\n"
        tail = f"\r\n--{boundary}--"
        headers = {
            "Content-Type": f"multipart/related; boundary={boundary}",
            "Content-Length": str(len(head.encode()) + self.size + len(tail)),
        }
        return headers, itertools.chain([head.encode()], self._blocks(), [tail.encode()])

    def _blocks(self) -> Iterator[bytes]:
        self.file.seek(0)
        while block := self.file.read(_BLOCK):
            yield block


class Session:
    """One resumable upload.

    Args:
        metadata: The object's, with its name.
        publish: Stores the whole object, if its preconditions hold.
        directory: Where objects lie, if that is a directory.
    """

    def __init__(
        self, metadata: dict[str, Any], publish: Callable[[Upload], Answer], directory: Path | None = None
    ) -> None:
        self.id = secrets.token_hex(16)
        self._metadata = metadata
        self._publish = publish
        self._file = staging_file(directory)  # lives as long as the session
        self._crc = google_crc32c.Checksum()
        self._received = 0
        self._end: Answer | None = None
        self._lock = threading.Lock()

    def put(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Take a chunk, or say how far the upload has got."""
        with self._lock:
            if self._end is not None:
                return self._end
            match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", ""))
            if match is None or (match[1] and int(match[1]) > self._received):
                return refusal(HTTPStatus.BAD_REQUEST, f"Content-Range does not continue at {self._received}")
            if match[1]:
                self._append(body[self._received - int(match[1]) :])
            if match[2] == str(self._received):
                self._finish(headers)
            return self._end or self._progress()

    def cancel(self) -> Answer:
        """Drop the session and what it received."""
        with self._lock:
            self._finish_with(Answer(CLIENT_CLOSED))
            return Answer(CLIENT_CLOSED)

    def close(self) -> None:
        """Drop what it received; nobody will ask any more."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._crc.update(data)
        self._received += len(data)

    def _progress(self) -> Answer:
        so_far = {"Range": f"bytes=0-{self._received - 1}"} if self._received else {}
        return Answer(HTTPStatus.PERMANENT_REDIRECT, so_far)

    def _finish(self, headers: Mapping[str, str]) -> None:
        said = re.search(r"crc32c=([^,]+)", headers.get("x-goog-hash", ""))
        found = base64.b64encode(self._crc.digest()).decode()
        if said and said[1] != found:
            self._finish_with(_damaged(said[1], found))
        else:
            self._finish_with(self._publish(Upload(self._metadata, self._file, self._received, self._crc.digest())))

    def _finish_with(self, end: Answer) -> None:
        self._end = end
        self._file.close()


def multipart_fault(content_type: str, body: bytes) -> Answer | None:
    """The refusal of a one-request upload whose content is not what its metadata says."""
    boundary = content_type.partition("boundary=")[2].strip("\"'").encode()
    parts = body.split(b"--" + boundary)
    if not boundary or len(parts) != 4:
        return None
    metadata, content = (part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in parts[1:3])
    said = json.loads(metadata).get("crc32c")
    found = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
    return _damaged(said, found) if said and said != found else None


def generation_in(body: bytes) -> str:
    """The generation in an object's metadata."""
    try:
        return str(json.loads(body).get("generation", "0"))
    except (ValueError, AttributeError):
        return "0"


def _damaged(said: str, found: str) -> Answer:
    message = f'Provided CRC32C "{said}" doesn\'t match calculated CRC32C "{found}".'
    return refusal(HTTPStatus.BAD_REQUEST, message)
