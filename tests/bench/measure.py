"""Runs a command as a whole process and says how long it took, and how large any one of its processes grew."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Measurement:
    """One run: wall time in seconds, peak resident set in bytes of the largest process, and what it printed."""

    seconds: float
    peak_bytes: int
    output: str


def measured(command: Sequence[str], environment: Mapping[str, str]) -> Measurement:
    """Run `command` after all earlier writes have reached the disk.

    The kernel's own high-water mark of each process is read while it lives (Linux only). `ru_maxrss` will not do: it
    starts from the size of whoever launched the process.

    Raises:
        RuntimeError: The command failed.
    """
    os.sync()
    ended = threading.Event()
    peaks: dict[int, int] = {}
    started = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
        watcher.start()
        output, errors = process.communicate()
        seconds = time.monotonic() - started
        ended.set()
        watcher.join()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-1000:]}{errors[-3000:]}")
    return Measurement(seconds, max(peaks.values(), default=0), output)


def _watch(root: int, peaks: dict[int, int], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        for pid in _family(root):
            peaks[pid] = max(peaks.get(pid, 0), _high_water(pid))


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue
        for child in found:
            yield from _family(int(child))


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0
