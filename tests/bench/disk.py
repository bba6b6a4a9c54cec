"""Which files a process has on its disk, those included that it removes again."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOOK_SECONDS = 0.05


@contextmanager
def written_to(directory: Path) -> Iterator[dict[str, int]]:
    """Look into a directory again and again while the block runs.

    Yields:
        Of each file that was seen, its path in there, and its size at most, in bytes. A file that lasts less
        than a look may be missed; what it weighs is in the kernel's count of bytes written (`measure`).
    """
    found: dict[str, int] = {}
    ended = threading.Event()

    def look() -> None:
        for folder, _, names in os.walk(directory):
            for path in (Path(folder, name) for name in names):
                try:
                    size = path.lstat().st_size
                except FileNotFoundError:
                    continue
                name = path.relative_to(directory).as_posix()
                found[name] = max(found.get(name, 0), size)

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        look()
