"""Files of an artifact store as local ones: of an adapter in Cloud Storage, a copy of what an export can use."""

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dispatcher.artifacts import ArtifactStore, StoredFile, file_uri, path_of
from dispatcher.crc32c import Crc32c
from dispatcher.errors import NotFound, SourceError, StorageFull, Unavailable
from exporter.adapter import WEIGHTS_NAME, refuse_without_weights
from exporter.byte_source import changed
from exporter.gemma import is_side_file
from exporter.peft_config import CONFIG_NAME
from exporter.scratch import scratch_directory
from exporter.sidefiles import refuse_too_large

log = logging.getLogger(__name__)
BLOCK_BYTES = 8 << 20


@contextmanager
def adapter_here(store: ArtifactStore, uri: str, files: list[StoredFile]) -> Iterator[Path]:
    """An adapter as a local directory: its own, or a copy that lasts as long as the `with` statement.

    Args:
        store: What reads the URI.
        uri: Where the adapter lies.
        files: What is listed there, with checksums; a copy holds these very bytes.

    Raises:
        SourceError: `adapter_missing`, `source_encoded`, `side_file_too_large`, and those of `refuse_without_weights`.
        Unavailable: A file is not what was listed any more (`source_changed`), or cannot be read.
        StorageFull: No room for the copy.
    """
    if not uri.startswith("gs://"):
        yield path_of(uri)
        return
    if not files:
        raise SourceError(f"there is no adapter at {uri}.", code="adapter_missing")
    names = [file.name for file in files]
    if CONFIG_NAME in names:
        refuse_without_weights([name for name in names if "/" not in name], uri)
    wanted = [file for file in files if file.name in (CONFIG_NAME, WEIGHTS_NAME) or is_side_file(file.name)]
    for file in wanted:
        if file.name != WEIGHTS_NAME:
            refuse_too_large(file.name, file.size)
    with files_here(store, uri, wanted) as directory:
        yield directory


@contextmanager
def files_here(store: ArtifactStore, uri: str, files: Sequence[StoredFile]) -> Iterator[Path]:
    """A directory of a store as a local one: itself, or a copy of some files that lasts as long as the `with`.

    Raises:
        SourceError: `source_encoded`.
        Unavailable: A file is not what was listed any more (`source_changed`), or cannot be read.
        StorageFull: No room for the copy.
    """
    if not uri.startswith("gs://"):
        yield path_of(uri)
        return
    with scratch_directory() as scratch:
        log.info("fetching %d files, %d bytes, from %s", len(files), sum(file.size for file in files), uri)
        for file in files:
            _fetch(store, file_uri(uri, file.name), file, scratch / file.name)
        yield scratch


def _fetch(store: ArtifactStore, uri: str, listed: StoredFile, target: Path) -> None:
    crc = Crc32c()
    try:
        target.parent.mkdir(exist_ok=True)
        with store.open(uri) as reader, target.open("xb") as file:
            for offset in range(0, reader.size, BLOCK_BYTES):
                block = reader.read(offset, BLOCK_BYTES)
                crc.update(block)
                file.write(block)
            size = reader.size
    except NotFound as error:
        raise changed(uri) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageFull(f"no room on this machine for a copy of {uri}: {listed.size} bytes.") from error
        raise Unavailable(f"{uri} cannot be copied: {error.strerror}.") from error
    if (size, crc.text) != (listed.size, listed.crc32c):
        raise changed(uri)
