"""Directories for what an export needs on the way; what a killed process left is removed by the next one."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "gemma-export-"
_LOCK = ".lock"


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """An empty directory that lasts as long as the `with`.

    Beside it lies a file that is locked for as long as its process lives, by which others know that it is in use.

    Raises:
        OSError: It cannot be made.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        place = Path(name)
        lock = os.open(place / f"{_LOCK}ing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(place / f"{_LOCK}ing", place / _LOCK)  # so that nobody sees it before it is locked
            content = place / "content"
            content.mkdir()
            yield content
        finally:
            os.close(lock)


def _remove_abandoned(root: Path) -> None:
    """Remove what belongs to no living process; whatever cannot be read, or looked at, belongs to somebody else."""
    for lock in root.glob(f"{PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(lock.parent)
            finally:
                os.close(descriptor)
