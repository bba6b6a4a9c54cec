"""The tensors of a merge, one by one, for a writer that has an order and a layout of its own."""

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import torch

from exporter.adapter import Adapter
from exporter.blocks import FOLD_ELEMENTS, Block, changed_blocks, copied_blocks, matrices_in
from exporter.byte_source import ByteReader, LocalFile
from exporter.lora import Delta, row_blocks
from exporter.merge import largest_change, note
from exporter.plan import OutputFile, OutputTensor, Plan
from exporter.tensors import TORCH_DTYPE


class MergedTensors:
    """What a plan says the output's tensors are; the base's files stay open until it is closed.

    Args:
        plan: The plan of a merge; of a model that nothing is merged into, one that changes nothing.
        adapter: What it merges; None where it changes nothing.
        origin: Equal for equal tensors alone: which base at which revision, and which adapter.
    """

    def __init__(self, plan: Plan, adapter: Adapter | None, origin: str = "") -> None:
        self.origin = origin
        self.outputs: Mapping[str, OutputTensor] = {output.tensor.name: output for output in plan.outputs}
        self.adapter = adapter
        self._deltas: dict[str, Delta] = {}
        self._largest = largest_change(plan.outputs)
        self._places = {output.tensor.name: file for file in plan.files for output in file.tensors}
        self._files: dict[str, ByteReader] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> "MergedTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._files.clear()

    @property
    def is_local(self) -> bool:
        """Whether all of the base is on this machine."""
        return all(isinstance(file.source.source, LocalFile) for file in self._places.values())

    @property
    def scratch_elements(self) -> int:
        """The float32 room that making a block takes."""
        return 2 * self._largest

    @property
    def block_bytes(self) -> int:
        """The largest block, in bytes."""
        widths = [matrices_in(output.tensor)[2] for output in self.outputs.values()]
        return 8 * max([FOLD_ELEMENTS, self._largest, *widths])

    def file_of(self, name: str) -> OutputFile:
        """The planned file that a tensor is in."""
        return self._places[name]

    def blocks(self, name: str) -> Iterator[Block]:
        """A tensor in blocks of whole rows, front to back."""
        output = self.outputs[name]
        if output.change is not None and self.adapter is not None:
            yield from changed_blocks(output, self.adapter, self._open(self._places[name]))
            return
        matrices, rows, width = matrices_in(output.tensor)
        counts = row_blocks(matrices * rows, width, FOLD_ELEMENTS)
        size = max((count for _, count in counts), default=1) * width * TORCH_DTYPE[output.tensor.dtype].itemsize
        yield from copied_blocks(output.source, max(1, size))

    def elements(self, name: str, block: Block) -> int:
        """How many of a tensor's values a block has."""
        return block.nbytes // TORCH_DTYPE[self.outputs[name].tensor.dtype].itemsize

    def fill(self, name: str, block: Block, buffer: bytearray, scratch: torch.Tensor) -> torch.Tensor:
        """Make a block: its values, flat, in the tensor's dtype, over `buffer`.

        Raises:
            Unavailable: The source changed while it was read (`source_changed`).
            VerificationFailed: A merged value is not finite.
        """
        if block.start is not None:
            self._open(self._places[name]).read_into(memoryview(buffer)[: block.nbytes], block.start)
        delta = block.make(buffer, scratch)
        with self._lock:
            note(self._deltas, name, delta)
        dtype = TORCH_DTYPE[self.outputs[name].tensor.dtype]
        return torch.frombuffer(buffer, dtype=dtype, count=self.elements(name, block))

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, in its own dtype; raises as `fill`."""
        tensor = self.outputs[name].tensor
        whole = torch.empty(math.prod(tensor.shape), dtype=TORCH_DTYPE[tensor.dtype])
        buffer, scratch = bytearray(self.block_bytes), torch.empty(self.scratch_elements, dtype=torch.float32)
        done = 0
        for block in self.blocks(name):
            values = self.fill(name, block, buffer, scratch)
            whole[done : done + len(values)].copy_(values)
            done += len(values)
        return whole.view(tensor.shape)

    def take_deltas(self) -> dict[str, Delta]:
        """Of every changed tensor that was read since this was last asked, how far it went from the base's."""
        with self._lock:
            taken, self._deltas = self._deltas, {}
        return taken

    def _open(self, file: OutputFile) -> ByteReader:
        with self._lock:
            if file.name not in self._files:
                self._files[file.name] = self._stack.enter_context(file.source.open())
            return self._files[file.name]
