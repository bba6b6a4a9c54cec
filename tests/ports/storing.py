"""Writes into artifact stores as the exporter does."""

import threading

from dispatcher.artifacts import ArtifactStore, StoredFile
from dispatcher.errors import ArtifactConflict


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
