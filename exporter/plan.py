"""The plan of a merge: which bytes each output file will hold, decided before any of them is written.

Every change of the adapter ends at exactly one tensor of the output, or the export is refused by name. The output keeps
the base's files, tensor names, order and dtypes; what an adapter can add is an output head of its own, and rows to the
vocabulary.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dispatcher.errors import AdapterMismatch, Unsupported
from exporter.adapter import Adapter, Change
from exporter.checkpoint import ITEM_SIZE, Checkpoint, Tensor, TensorFile, header_bytes
from exporter.documents import parse_json_object
from exporter.gemma import EMBEDDINGS, HEAD, Family, canonical_name, head_name
from exporter.pairs import Layout, LoraPair
from exporter.saved import Saved
from exporter.targets import Target, fits, resolve, shape_of
from exporter.tensors import TORCH_DTYPE
from exporter.tying import settle

FOLDABLE = frozenset(TORCH_DTYPE) - {"F64"}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output file."""

    tensor: Tensor
    """As it is written; its `start` means nothing."""
    source: Tensor
    """The base's tensor that it begins with"""
    change: Change | None
    """What becomes of the base's values; None leaves them."""

    @property
    def added(self) -> bool:
        """Whether the base has no tensor of this name."""
        return self.tensor.name != self.source.name

    @property
    def resized(self) -> bool:
        """Whether it has other rows than the base's, and so none of the base's values."""
        return self.tensor.shape != self.source.shape

    @property
    def operation(self) -> str:
        """`copied`, `merged` (something is added to the base's values), `replaced`, or `added`."""
        if self.added:
            return "added"
        match self.change:
            case None:
                return "copied"
            case Saved():
                return "replaced"
            case _:
                return "merged"


@dataclass(frozen=True)
class OutputFile:
    """One file to write: `header`, then the bytes of every tensor in this order."""

    source: TensorFile
    header: bytes
    tensors: tuple[OutputTensor, ...]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def size(self) -> int:
        return len(self.header) + sum(output.tensor.nbytes for output in self.tensors)


@dataclass(frozen=True)
class Plan:
    """What a merge will write, and from what."""

    files: tuple[OutputFile, ...]
    index: bytes | None
    tower: str | None
    """The tower that a text-only adapter was mapped to, or taken out of; None when the names matched as they are."""
    unneeded: tuple[Change, ...]
    """What changes nothing: copies of what the base has, twins of other changes, biases that are zero"""
    untied: bool
    """Whether the base ties its head to its embedding, and the output does not."""
    vocabulary: int | None
    """How many rows the output's embedding has; None when the base has no embedding that we know."""
    resized: bool
    """Whether the base's has other rows."""

    operations = ("copied", "merged", "replaced", "added")

    @property
    def outputs(self) -> list[OutputTensor]:
        """Every tensor of the output."""
        return [output for file in self.files for output in file.tensors]

    def count(self, operation: str) -> int:
        return sum(output.operation == operation for output in self.outputs)

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def plan_merge(base: Checkpoint, adapter: Adapter, family: Family, config: Mapping[str, Any]) -> Plan:
    """Match every change of the adapter to the one tensor of the output that it is for.

    Reads headers; and, of an adapter that brings copies of the base's embedding, those and the embedding.

    Args:
        base: The base's headers.
        adapter: The adapter's headers.
        family: The base's key layout.
        config: The base's config.json.

    Raises:
        AdapterMismatch: A change fits no tensor, more than one, one that another also fits, or its shape differs.
        Unsupported: It fits, but a tensor that is not merged.
    """
    tied = is_tied(config)
    stored = base.tensors()
    resolved = resolve(adapter, base, family, tied=tied)
    embedding = next((name for name in stored if canonical_name(name, family) in EMBEDDINGS), None)
    settled = settle(
        resolved.targets, adapter.file, stored, embedding if tied else None, hidden_head=family.hidden_head
    )
    head = next((name for name in stored if canonical_name(name, family) == HEAD), None)
    changes = _by_tensor(settled.targets, head or (head_name(embedding) if embedding else HEAD), tied=tied)
    if tied and not settled.untied and head and embedding in changes:
        changes[head] = changes[embedding]  # a duplicate that the base stores beside the one that it uses
    added = None
    if settled.untied and head is None and embedding is not None:
        head = added = head_name(embedding)
    resized = _resized({name: changes.get(name) for name in (embedding, head) if name}, stored, embedding)
    files = tuple(_file(file, changes, embedding, added, resized) for file in base.files)
    return Plan(
        files=files,
        index=_index(base.index, files) if added or resized else base.index,
        tower=resolved.tower,
        unneeded=resolved.unneeded + settled.confirmed,
        untied=settled.untied,
        vocabulary=resized or (stored[embedding][1].shape[0] if embedding else None),
        resized=resized is not None,
    )


def plan_copy(model: Checkpoint) -> Plan:
    """The plan that leaves a whole model as it is."""
    files = tuple(_file(file, {}, None, None, None) for file in model.files)
    return Plan(files, model.index, None, (), untied=False, vocabulary=None, resized=False)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding; every Gemma's default is that it is."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings", True) if isinstance(text, dict) else True
    return bool(config.get("tie_word_embeddings", nested))


def _by_tensor(targets: tuple[Target, ...], head: str, *, tied: bool) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for target in targets:
        name = head if tied and target.name == HEAD else target.name
        if name in changes:
            raise AdapterMismatch(
                f"{changes[name].target!r} and {target.change.target!r} of the adapter both change {name!r}.",
                code="adapter_duplicate_target",
            )
        changes[name] = target.change
    return changes


def _resized(
    layers: Mapping[str, Change | None], stored: Mapping[str, tuple[TensorFile, Tensor]], embedding: str | None
) -> int | None:
    """How many rows embedding and head get, where the adapter brings them with other rows than the base has.

    Raises:
        AdapterMismatch: `vocabulary_mismatch`: one of them would have other rows than the other.
    """
    if embedding is None:
        return None
    base_rows = stored[embedding][1].shape[0]
    rows = {name: _rows_brought(change) or base_rows for name, change in layers.items()}
    if len(set(rows.values())) > 1:
        found = ", ".join(f"{name!r} {count}" for name, count in rows.items())
        raise AdapterMismatch(
            f"the adapter changed the size of the vocabulary in one place only. Rows: {found}; the base has "
            f"{base_rows}. Train embed_tokens and lm_head both, or neither.",
            code="vocabulary_mismatch",
        )
    count = next(iter(rows.values()))
    return count if count != base_rows else None


def _rows_brought(change: Change | None) -> int | None:
    match change:
        case Saved(rows=None):
            return change.tensor.shape[0] if change.tensor.shape else None
        case LoraPair(base=Tensor()):
            return change.shape[0]
        case _:
            return None


def _file(
    file: TensorFile, changes: Mapping[str, Change], embedding: str | None, added: str | None, resized: int | None
) -> OutputFile:
    outputs = []
    for tensor in file.tensors:
        rows = resized if tensor.name == embedding or tensor.name.endswith(HEAD) else None
        outputs.append(_output(tensor, tensor.name, changes, rows))
        if added and tensor.name == embedding:
            outputs.append(_output(tensor, added, changes, rows))
    return OutputFile(file, header_bytes([output.tensor for output in outputs], file.metadata), tuple(outputs))


def _output(source: Tensor, name: str, changes: Mapping[str, Change], rows: int | None) -> OutputTensor:
    """A tensor of the output, with as many rows as the vocabulary has now, if it is of one.

    Raises:
        AdapterMismatch: `adapter_shape_mismatch`, `adapter_ambiguous`, `adapter_token_indices_invalid`,
            `adapter_unknown_tensor`.
        Unsupported: `unsupported_base_dtype`.
    """
    shape = source.shape if rows is None else (rows, *source.shape[1:])
    tensor = replace(source, name=name, shape=shape, nbytes=math.prod(shape) * ITEM_SIZE[source.dtype])
    change = changes.get(name)
    if change is not None:
        _refuse_misfit(change, tensor)
    return OutputTensor(tensor, source, change)


def _refuse_misfit(change: Change, tensor: Tensor) -> None:
    if not fits(change, tensor) or (isinstance(change, LoraPair) and change.base and change.base.shape != tensor.shape):
        raise AdapterMismatch(
            f"{change.target!r} of the adapter is for {list(shape_of(change, tensor))}, "
            f"the base's {tensor.name!r} is {list(tensor.shape)}: was it trained on another size?",
            code="adapter_shape_mismatch",
        )
    is_embedding = tensor.name.rpartition(".")[0].endswith(("embed_tokens", "embed_tokens_per_layer"))
    if isinstance(change, LoraPair) and is_embedding and change.layout is not Layout.EMBEDDING:
        raise AdapterMismatch(
            f"{change.a.name!r} is half of a linear layer's pair, but {tensor.name!r} is an embedding: "
            "PEFT would not apply it.",
            code="adapter_unknown_tensor",
        )
    if isinstance(change, LoraPair) and change.layout is Layout.EXPERTS and change.shape == change.transposed_shape:
        raise AdapterMismatch(
            f"{tensor.name!r} is {list(tensor.shape)}: whether its matrices are stored transposed cannot be told.",
            code="adapter_ambiguous",
        )
    if isinstance(change, Saved) and change.rows and max(change.rows) >= tensor.shape[0]:
        raise AdapterMismatch(
            f"the adapter trained row {max(change.rows)} of {tensor.name!r}, which has {tensor.shape[0]} rows.",
            code="adapter_token_indices_invalid",
        )
    if tensor.dtype not in FOLDABLE:
        raise Unsupported(
            f"the base's {tensor.name!r} is stored as {tensor.dtype}; {', '.join(sorted(FOLDABLE))} are merged.",
            code="unsupported_base_dtype",
        )


def _index(base: bytes | None, files: tuple[OutputFile, ...]) -> bytes | None:
    """The base's index with the output's tensors and total size."""
    if base is None:
        return None
    index = parse_json_object(base)
    index["weight_map"] |= {output.tensor.name: file.name for file in files for output in file.tensors}
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(output.tensor.nbytes for file in files for output in file.tensors)
    return json.dumps(index, indent=2).encode() + b"\n"
