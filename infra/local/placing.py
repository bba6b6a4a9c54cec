"""Puts what a finished upload received where fake-gcs-server keeps objects, instead of sending it there once more.

Sent, it would be held in memory whole, under a lock that keeps everybody waiting: half a minute for two gigabytes,
which in the real service are there at once. Its layout is a file for each object, with the attributes as JSON in an
extended attribute: https://github.com/fsouza/fake-gcs-server/blob/main/internal/backend/fs.go
"""

import base64
import json
import os
import re
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_ATTRIBUTE = "user.metadata"
_PLAIN = re.compile(r"(?!.*(^|/)\.{0,2}(/|$))[A-Za-z0-9._@=+/-]+")
"""Names that are a file's as they are, whatever is escaped."""


def staging_file(directory: Path | None) -> IO[bytes]:
    """A file without a name for an upload, which can be given one in that directory where the machine allows it."""
    if directory is not None and hasattr(os, "O_TMPFILE"):
        with suppress(OSError):
            # tempfile's own have O_EXCL, and can never be given a name.
            return os.fdopen(os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600), "w+b")
    return tempfile.TemporaryFile()


def place(file: IO[bytes], directory: Path, bucket: str, metadata: dict[str, Any], crc: bytes, *, new: bool) -> bool:
    """Make an upload's file an object.

    Args:
        file: From `staging_file`.
        directory: Where fake-gcs-server keeps its buckets.
        bucket: Which one.
        metadata: The object's: `name`, `contentType`, perhaps `metadata`.
        crc: The content's CRC-32C, big-endian.
        new: Whether an object of that name must not be there.

    Returns:
        Whether it was done; if not, this machine or this name needs the other way.

    Raises:
        FileExistsError: With `new`, there is one.
    """
    name = metadata["name"]
    if not _PLAIN.fullmatch(name) or set(metadata) - {"name", "contentType", "metadata"}:
        return False
    target = directory / bucket / name
    file.flush()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.setxattr(file.fileno(), _ATTRIBUTE, _attributes(metadata, crc))
        if new:
            _link(file, target)
        else:
            between = target.with_name(f"{target.name}.{secrets.token_hex(8)}")
            _link(file, between)
            between.replace(target)
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # no extended attributes, no /proc, another file system
        return False
    return True


def _link(file: IO[bytes], target: Path) -> None:
    """Give a file without a name this one; see open(2) on O_TMPFILE."""
    descriptor = os.open("/", os.O_RDONLY)  # with one, os.link calls linkat, and follows the link in /proc
    try:
        os.link(f"/proc/self/fd/{file.fileno()}", target, src_dir_fd=descriptor, follow_symlinks=True)
    finally:
        os.close(descriptor)


def _attributes(metadata: dict[str, Any], crc: bytes) -> bytes:
    checksum = base64.b64encode(crc).decode()
    now = time.time_ns()
    told = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now % 10**9:09d}Z"
    return json.dumps(
        {
            "StorageClass": "STANDARD",
            "ContentType": metadata["contentType"],
            "Crc32c": checksum,
            "Md5Hash": "",  # as composed objects have none
            "Etag": checksum,
            "Metadata": metadata.get("metadata"),
            "Created": told,
            "Updated": told,
            "Generation": now // 1000,
        }
    ).encode()
