"""Writes into artifact stores as the exporter does."""

import threading

from google.cloud.storage.retry import DEFAULT_RETRY

from dispatcher.artifacts import ArtifactStore, StoredFile
from dispatcher.crc32c import Crc32c
from dispatcher.errors import ArtifactConflict

CHUNK_BYTES = 256 << 10
"""The smallest that Cloud Storage takes in one request of several."""
LARGE = bytes(range(256)) * (2 * CHUNK_BYTES // 256) + b"the end"
"""Goes up in three requests of a resumable upload."""
QUICK = DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.02, multiplier=1).with_timeout(5)
"""Tries again as the client does, only sooner."""


def checksum(data: bytes) -> str:
    """The crc32c of content, as a listing has it."""
    crc = Crc32c()
    crc.update(data)
    return crc.text


def put(store: ArtifactStore, path: str, data: bytes) -> StoredFile:
    """Publish a file."""
    writer = store.create(path)
    writer.write(data)
    return writer.commit()


def write_at_once(store: ArtifactStore, path: str) -> list[str]:
    """What became of eight writers that publish different content under one name, sorted."""
    ready, results = threading.Barrier(8), []

    def write(number: int) -> None:
        ready.wait()
        try:
            put(store, path, bytes([number]) * 100_000)
        except ArtifactConflict:
            results.append("conflict")
        else:
            results.append("published")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results)
