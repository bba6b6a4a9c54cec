"""One pass over a base for several exports: each comes with its file, and the last to come sets the pass going.

Every export goes its own way otherwise, in a thread of its own: one that is cancelled, or finds no room, ends alone.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from exporter.gguf_file import GgufFile, write_files
from exporter.merge import OnBytes, Sink
from exporter.merged_tensors import MergedTensors

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Entry:
    """One export's part; a sink that swallows what comes after its failure, while others go on."""

    file: GgufFile
    sink: Sink
    merged: MergedTensors
    on_bytes: OnBytes
    group: Sequence["_Entry"] = ()
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def write(self, data: memoryview) -> None:
        if self.error is None:
            try:
                self.sink.write(data)
                self.on_bytes(len(data))
            except Exception as error:  # noqa: BLE001  # raised where this export waits
                self.error = error
        self.refuse_idle()

    def give_up(self, error: Exception) -> None:
        """Let this export fail, and the others go on."""
        self.error = self.error or error
        self.refuse_idle()

    def refuse_idle(self) -> None:
        """Raise this export's error where no other goes on."""
        if self.error is not None and all(entry.error is not None for entry in self.group):
            raise self.error


class SharedPass:
    """A pass that a known number of exports may take part in.

    Args:
        members: How many; each has a `Share`.
    """

    def __init__(self, members: int) -> None:
        self._missing = members
        self._entries: list[_Entry] = []
        self._changed = threading.Condition()
        self.passes = 0
        """How often the base was read"""

    def write(self, entry: _Entry, *, awaited: bool) -> None:
        """Have an entry written, with those of all others if it is `awaited`; returns when it is."""
        leads = True
        if awaited:
            with self._changed:
                self._entries.append(entry)
                leads = self._entries[0] is entry
                self._came()
                self._changed.wait_for(lambda: self._missing == 0)
        if leads:
            self._run(self._entries if awaited else [entry])
        entry.done.wait()

    def leave(self) -> None:
        """Do not wait for one of the members any more."""
        with self._changed:
            self._came()

    def _came(self) -> None:
        self._missing -= 1
        self._changed.notify_all()

    def _run(self, entries: Sequence[_Entry]) -> None:
        groups: dict[object, list[_Entry]] = {}
        for entry in entries:
            same = (entry.merged.origin, *(tensor.name for tensor in entry.file.tensors))
            groups.setdefault(same, []).append(entry)
        for group in groups.values():
            self._run_group(group)

    def _run_group(self, group: Sequence[_Entry]) -> None:
        """One pass, for files of the same tensors in the same order, of the same base and adapter."""
        self.passes += 1
        log.info("one pass over the base for %s", ", ".join(entry.file.name for entry in group))
        for entry in group:
            entry.group = group
        try:
            write_files(
                [entry.file for entry in group],
                group,
                group[0].merged,
                lambda place, error: group[place].give_up(error),
            )
        except Exception as error:  # noqa: BLE001  # raised where each export waits
            for entry in group:
                entry.error = entry.error or error
        for entry in group:
            entry.merged.deltas |= group[0].merged.deltas
            entry.done.set()


class Share:
    """One export's part in a shared pass.

    Args:
        shared: The pass; None is one of its own.
    """

    def __init__(self, shared: SharedPass | None = None) -> None:
        self._shared = shared or SharedPass(1)
        self._awaited = True

    def write(self, file: GgufFile, sink: Sink, merged: MergedTensors, on_bytes: OnBytes) -> None:
        """Have a file written along with those of the others; a second one is written at once.

        Args:
            file: What to write.
            sink: Where to.
            merged: What of; the others' are of the same model.
            on_bytes: Told of every block, in bytes of this file.

        Raises:
            Exception: What the sink or `on_bytes` raised, or `write_files` did.
        """
        entry, awaited = _Entry(file, sink, merged, on_bytes), self._awaited
        self._awaited = False
        self._shared.write(entry, awaited=awaited)
        if entry.error is not None:
            raise entry.error

    def leave(self) -> None:
        """Say that this export is done, or will not take part: found finished, refused, failed."""
        if self._awaited:
            self._awaited = False
            self._shared.leave()
