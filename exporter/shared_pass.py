"""Passes over a base for several exports: in each round every one brings a part of its file, and like ones are written.

Every export goes its own way otherwise, in a thread of its own: one that is cancelled, or finds no room, ends alone.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from exporter.gguf_file import GgufPart
from exporter.gguf_write import write_parts
from exporter.lora import Delta
from exporter.making import MEMORY_BUDGET
from exporter.merge import OnBytes, Sink
from exporter.merged_tensors import MergedTensors

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Entry:
    """One export's part of a file; a sink that swallows what comes after its failure, while others go on."""

    part: GgufPart
    sink: Sink
    merged: MergedTensors
    on_bytes: OnBytes
    group: Sequence["_Entry"] = ()
    error: Exception | None = None
    deltas: dict[str, Delta] = field(default_factory=dict)
    is_done: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Which tensors of which model: what is the same can be written at once."""
        return self.merged.origin, *(tensor.name for tensor in self.part.tensors)

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
    """Passes that a known number of exports may take part in, in rounds.

    A round begins when every export that has not left has brought a part. Of these the earliest in its file is written,
    with the same of others; whoever brought a later one waits for the rounds in which the others have come that far.

    Args:
        members: How many; each has a `Share`.
        memory_budget: Bytes that the buffers of a pass may take.
    """

    def __init__(self, members: int, *, memory_budget: int = MEMORY_BUDGET) -> None:
        self._members = members
        self._memory_budget = memory_budget
        self._waiting: list[_Entry] = []
        self._changed = threading.Condition()
        self.passes = 0
        """How often the base was read, or a part of it"""

    def write(self, entry: _Entry) -> None:
        """Have an entry written, in a round with the other members'; returns when it is."""
        with self._changed:
            self._waiting.append(entry)
            self._changed.notify_all()
            self._changed.wait_for(lambda: entry.is_done or self._round()[:1] == [entry])
            group = [] if entry.is_done else self._round()
        if not group:
            return
        self.run(group)
        with self._changed:
            self._waiting = [other for other in self._waiting if other not in group]
            for other in group:
                other.is_done = True
            self._changed.notify_all()

    def leave(self) -> None:
        """Do not wait for one of the members any more."""
        with self._changed:
            self._members -= 1
            self._changed.notify_all()

    def run(self, group: Sequence[_Entry]) -> None:
        """One pass, for entries of the same tensors."""
        self.passes += 1
        log.info("one pass over the base for %s", ", ".join(entry.part.name for entry in group))
        for entry in group:
            entry.group = group
        try:
            write_parts(
                [entry.part for entry in group],
                group,
                group[0].merged,
                lambda place, error: group[place].give_up(error),
                memory_budget=self._memory_budget,
            )
        except Exception as error:  # noqa: BLE001  # raised where each export waits
            for entry in group:
                entry.error = entry.error or error
        read = group[0].merged.take_deltas()
        for entry in group:
            entry.deltas = entry.merged.take_deltas() | read

    def _round(self) -> list[_Entry]:
        """The entries that are written next, or now, the one whose thread does it first; none before all have come."""
        if len(self._waiting) < self._members:
            return []
        first = min(self._waiting, key=lambda entry: entry.part.number)
        return [entry for entry in self._waiting if entry.tensors == first.tensors]


class Share:
    """One export's part in shared passes.

    Args:
        shared: The passes; None is some of its own.
    """

    def __init__(self, shared: SharedPass | None = None) -> None:
        self._shared = shared or SharedPass(1)
        self._has_left = False

    def write(self, part: GgufPart, sink: Sink, merged: MergedTensors, on_bytes: OnBytes) -> Mapping[str, Delta]:
        """Have a part of a file written along with those of the others; after `leave`, at once and alone.

        Args:
            part: What to write; later ones come later in the file.
            sink: Where to.
            merged: What of; what others bring of the same origin is of the same model.
            on_bytes: Told of every block, in bytes of this part.

        Returns:
            Of every changed tensor that was read for it, how far it went from the base's.

        Raises:
            Exception: What the sink or `on_bytes` raised, or `write_parts` did.
        """
        entry = _Entry(part, sink, merged, on_bytes)
        if self._has_left:
            self._shared.run([entry])
        else:
            self._shared.write(entry)
        if entry.error is not None:
            raise entry.error
        return entry.deltas

    def leave(self) -> None:
        """Say that this export has nothing more to write, or will not take part: found finished, refused, failed."""
        if not self._has_left:
            self._has_left = True
            self._shared.leave()
