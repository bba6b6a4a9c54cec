"""Runs a command as a whole process and says how long it took, how large any one of its processes grew, and how much
all of them wrote."""

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
    """One run of a command."""

    seconds: float
    """Wall time"""
    peak_bytes: int
    """Resident set of its largest process"""
    written_bytes: int
    """To files on a disk, by all of its processes, whether the files are still there or not"""
    output: str
    """What it printed"""


def measured(command: Sequence[str], environment: Mapping[str, str]) -> Measurement:
    """Run `command` after all earlier writes have reached the disk.

    The kernel's own figures of each process are read while it lives (Linux only). For the peak `ru_maxrss` will not do:
    it starts from the size of whoever launched the process. What is written to a tmpfs is not counted.

    Raises:
        RuntimeError: The command failed.
    """
    os.sync()
    ended = threading.Event()
    peaks: dict[int, int] = {}
    written = [0]
    started = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, written, ended))
        watcher.start()
        output, errors = process.communicate()
        seconds = time.monotonic() - started
        ended.set()
        watcher.join()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-1000:]}{errors[-3000:]}")
    return Measurement(seconds, max(peaks.values(), default=0), max(written), output)


def _watch(root: int, peaks: dict[int, int], written: list[int], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        so_far = 0
        for pid in _family(root):
            peaks[pid] = max(peaks.get(pid, 0), _figure(pid, "status", "VmHWM:") * 1024)
            # What a process has written becomes its parent's when that waits for it, so parents are looked at first.
            so_far += _figure(pid, "io", "write_bytes:")
        written.append(so_far)


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue
        for child in found:
            yield from _family(int(child))


def _figure(pid: int, file: str, name: str) -> int:
    """A number that the kernel has of a process; 0 once that has ended."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text()
    except OSError:
        return 0
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return int(lines[0].split()[1]) if lines else 0
