"""One pass over a base for several exports: each comes with its file, and the last to come sets the pass going.

Every export goes its own way otherwise, in a thread of its own: one that is cancelled, or finds no room, ends alone.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from exporter.gguf_file import GgufFile, write_files
from exporter.merge import OnBytes, Sink
from exporter.merged_tensors import MergedTensors


@dataclass
class _Entry:
    """One export's part; a sink that swallows what comes after its failure."""

    file: GgufFile
    sink: Sink
    merged: MergedTensors
    on_bytes: OnBytes
    alone: Callable[[], bool]
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def write(self, data: memoryview) -> None:
        if self.error is None:
            try:
                self.sink.write(data)
                self.on_bytes(len(data))
            except Exception as error:  # noqa: BLE001  # raised where this export waits
                self.error = error
        if self.error is not None and self.alone():
            raise self.error


class SharedPass:
    """A pass that a known number of exports may take part in.

    Args:
        members: How many; each calls `write` once, or `leave`.
    """

    def __init__(self, members: int) -> None:
        self._missing = members
        self._entries: list[_Entry] = []
        self._changed = threading.Condition()
        self.passes = 0
        """How often the base was read"""

    def leave(self) -> None:
        """Say that an export will not take part: found finished, refused, failed. Harmless after `write`."""
        with self._changed:
            self._missing -= 1
            self._changed.notify_all()

    def write(self, file: GgufFile, sink: Sink, merged: MergedTensors, on_bytes: OnBytes) -> None:
        """Have a file written along with those of the others; returns when it is.

        Raises:
            Exception: What its own sink or `on_bytes` raised, or what `write_files` did.
        """
        with self._changed:
            entry = _Entry(file, sink, merged, on_bytes, self._nobody_left)
            self._entries.append(entry)
            self._missing -= 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._missing <= 0)
            leads = self._entries[0] is entry
        if leads:
            self._run(entry)
        entry.done.wait()
        if entry.error is not None:
            raise entry.error

    def _nobody_left(self) -> bool:
        return all(entry.error is not None or entry.done.is_set() for entry in self._entries)

    def _run(self, leader: _Entry) -> None:
        names = [tensor.name for tensor in leader.file.tensors]
        together = [entry for entry in self._entries if [tensor.name for tensor in entry.file.tensors] == names]
        groups = [together, *([entry] for entry in self._entries if entry not in together)]
        for group in groups:
            self.passes += 1
            try:
                write_files([entry.file for entry in group], group, group[0].merged)
            except Exception as error:  # noqa: BLE001  # raised where each export waits
                for entry in group:
                    entry.error = entry.error or error
            finally:
                for entry in group:
                    entry.merged.deltas |= group[0].merged.deltas
                    entry.done.set()
