"""Where the files of a finished export can be fetched: URLs that expire, made when asked for and kept for a while."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta

from dispatcher.artifacts import ArtifactStore, file_uri
from dispatcher.contract import Artifact, ExportRecord, State
from dispatcher.errors import ExportError
from dispatcher.published import listed_files

logger = logging.getLogger(__name__)
THREADS = 8
"""A signature is one request to IAM, and an export has some tens of files."""
MAX_KEPT = 256
"""Exports whose URLs are kept in memory."""
RETRY_AFTER = timedelta(minutes=1)
"""How long what could not be signed is left at that."""


@dataclass(frozen=True)
class Download:
    """A file of an export."""

    name: str
    """Its path relative to the artifact."""
    bytes: int
    url: str | None
    """None where nothing here can sign one."""


@dataclass(frozen=True)
class Downloads:
    """The files of a finished export, by name."""

    files: tuple[Download, ...]
    expire_at: datetime


class DownloadLinks:
    """Makes download URLs, and hands out the same ones for half of their life.

    Args:
        artifacts: Signs them.
        life: How long a URL is good.
        clock: The time now, in UTC.
    """

    def __init__(self, artifacts: ArtifactStore, life: timedelta, clock: Callable[[], datetime]) -> None:
        self._artifacts = artifacts
        self._life = life
        self._clock = clock
        self._kept: dict[tuple[Artifact, ...], tuple[datetime, Downloads]] = {}
        self._lock = threading.Lock()

    def of(self, record: ExportRecord) -> Downloads | None:
        """The downloads of a completed export; None before that, and where its files cannot be told now."""
        if record.state is not State.COMPLETED:
            return None
        now = self._clock()
        with self._lock:
            until, known = self._kept.get(record.artifacts, (now, None))
        if known is not None and now < until:
            return known
        try:
            files = [file for artifact in record.artifacts for file in self._files(artifact)]
        except ExportError as error:
            logger.warning("the files of %s cannot be told: %s", record.export_id, error)
            return None
        with ThreadPoolExecutor(THREADS) as pool:
            found = Downloads(tuple(pool.map(self._signed, files)), now + self._life)
        keep = self._life / 2 if all(file.url for file in found.files) else min(RETRY_AFTER, self._life / 2)
        with self._lock:
            # The longest known goes first.
            while len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept.pop(record.artifacts, None)
            self._kept[record.artifacts] = (now + keep, found)
        return found

    def _files(self, artifact: Artifact) -> list[tuple[str, str, int]]:
        """URI, name and size in bytes of each file."""
        if artifact.manifest is None:
            sizes = {file.name: file.size for file in self._artifacts.list(artifact.uri, checksums=False)}
        else:
            sizes = listed_files(self._artifacts, artifact.manifest)
        return [(file_uri(artifact.uri, name), name, size) for name, size in sorted(sizes.items())]

    def _signed(self, file: tuple[str, str, int]) -> Download:
        uri, name, size = file
        try:
            url = self._artifacts.download_url(uri, self._life)
        except ExportError as error:
            logger.warning("no download URL for %s: %s", uri, error)
            url = None
        return Download(name, size, url)
