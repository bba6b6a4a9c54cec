"""Where the files of a finished export can be fetched: URLs that expire, made when asked for and kept for a while."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from dispatcher.artifacts import ArtifactStore, StoredFile, file_uri
from dispatcher.contract import Artifact, ExportRecord, State
from dispatcher.errors import ExportError, Unavailable
from dispatcher.published import listed_files

logger = logging.getLogger(__name__)
THREADS = 8
"""A signature is one request to IAM, and an export has some tens of files."""
MAX_KEPT = 256
"""Exports whose URLs are kept in memory."""
RETRY_AFTER = timedelta(minutes=1)
"""How long what could not be told or signed is left at that."""
MAX_FILES = 100
"""Files offered of one export. The largest model has some tens; an adapter's folder may have any number."""
PATIENCE_SECONDS = 5.0
"""For all of an answer's downloads: a status is there without them, and is not to wait for a service that hangs."""

T = TypeVar("T")


@dataclass(frozen=True)
class Download:
    """A file of an export."""

    name: str
    """Its path relative to the artifact."""
    bytes: int
    url: str | None
    """None where nothing here can sign one, or could in time."""


@dataclass(frozen=True)
class Downloads:
    """The files of a finished export, those of its folders after its own."""

    files: tuple[Download, ...]
    expire_at: datetime
    left_out: int = 0
    """How many more it has than are offered: `MAX_FILES`."""


class DownloadLinks:
    """Makes download URLs, and hands out the same ones for half of their life.

    Args:
        artifacts: Signs them.
        life: How long a URL is good.
        clock: The time now, in UTC.
        patience: Seconds that `of` takes at most.
    """

    def __init__(
        self,
        artifacts: ArtifactStore,
        life: timedelta,
        clock: Callable[[], datetime],
        *,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._artifacts = artifacts
        self._life = life
        self._clock = clock
        self._patience = patience
        # One for all: a service that hangs holds up these few, however many ask.
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="downloads")
        self._kept: dict[tuple[Artifact, ...], tuple[datetime, Downloads | None]] = {}
        self._lock = threading.Lock()

    def of(self, record: ExportRecord) -> Downloads | None:
        """The downloads of a completed export; None before that, and where its files cannot be told now."""
        if record.state is not State.COMPLETED:
            return None
        now = self._clock()
        with self._lock:
            until, known = self._kept.get(record.artifacts, (now, None))
        if now < until:
            return known
        found = self._found(record, now + self._life)
        whole = found is not None and all(file.url for file in found.files)
        keep = self._life / 2 if whole else min(RETRY_AFTER, self._life / 2)
        with self._lock:
            # The longest known goes first.
            while len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept.pop(record.artifacts, None)
            self._kept[record.artifacts] = (now + keep, found)
        return found

    def _found(self, record: ExportRecord, expire_at: datetime) -> Downloads | None:
        deadline = time.monotonic() + self._patience
        try:
            files = _within(self._pool.submit(self._files, record.artifacts), deadline)
        except ExportError as error:
            logger.warning("the files of %s cannot be told: %s", record.export_id, error)
            return None
        left_out = len(files) - MAX_FILES
        if left_out > 0:
            logger.info("of the %d files of %s, %d are offered", len(files), record.export_id, MAX_FILES)
        offered = files[:MAX_FILES]
        signatures = [self._pool.submit(self._artifacts.download_url, uri, self._life) for uri, _, _ in offered]
        urls: list[str | None] = []
        faults: list[str] = []
        for signature in signatures:
            try:
                urls.append(_within(signature, deadline))
            except ExportError as error:
                urls.append(None)
                faults.append(str(error))
        if faults:
            text = "no download URL for %d of %d files of %s: %s"
            logger.warning(text, len(faults), len(offered), record.export_id, faults[0])
        listed = tuple(Download(name, size, url) for (_, name, size), url in zip(offered, urls, strict=True))
        return Downloads(listed, expire_at, max(0, left_out))

    def _files(self, artifacts: tuple[Artifact, ...]) -> list[tuple[str, str, int]]:
        """URI, name and size in bytes of each file; what lies in folders, as checkpoints do, comes after the rest."""
        files = [
            (file_uri(artifact.uri, file.name), file.name, file.size)
            for artifact in artifacts
            for file in self._listed(artifact)
        ]
        return sorted(files, key=lambda file: (file[1].count("/"), file[1]))

    def _listed(self, artifact: Artifact) -> list[StoredFile]:
        if artifact.manifest is None:
            return self._artifacts.list(artifact.uri, checksums=False)
        return listed_files(self._artifacts, artifact.manifest)


def _within(future: Future[T], deadline: float) -> T:
    """The future's result.

    Raises:
        Unavailable: It is not there at the deadline. Nobody waits for it any more, and it is begun no more.
    """
    try:
        return future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError as error:
        future.cancel()
        raise Unavailable("there was no answer in time") from error
