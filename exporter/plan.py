"""The ledger: which base tensor each adapter tensor changes, decided from headers alone, before any weight is read.

Every change of the adapter ends at exactly one tensor of the base, or the export is refused by name. The output keeps
the base's files, tensor names, order, dtypes and shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dispatcher.errors import AdapterMismatch, Unsupported
from exporter.adapter import Adapter, Change, LoraPair
from exporter.checkpoint import Checkpoint, Tensor, TensorFile, header_bytes
from exporter.gemma import Family, canonical_name
from exporter.tensors import TORCH_DTYPE

FOLDABLE = frozenset(TORCH_DTYPE) - {"F64"}
TEXT_TOWERS = ("language_model.", "language_model.model.")
"""How the multimodal classes call their text tower, today and before transformers 4.52."""


@dataclass(frozen=True)
class OutputFile:
    """One file to write: `header`, then every tensor of `source` in its order, copied or changed."""

    source: TensorFile
    header: bytes
    changes: Mapping[str, Change]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.source.tensors)


@dataclass(frozen=True)
class Plan:
    """What a merge will write, and from what."""

    files: tuple[OutputFile, ...]
    index: bytes | None
    tower: str | None
    """The tower that a text-only adapter was mapped to, or taken out of; None when the names matched as they are."""

    @property
    def merged(self) -> int:
        """How many tensors a trained pair is added to."""
        return sum(isinstance(change, LoraPair) for file in self.files for change in file.changes.values())

    @property
    def replaced(self) -> int:
        """How many tensors, or rows of them, are the adapter's own."""
        return sum(len(file.changes) for file in self.files) - self.merged

    @property
    def copied(self) -> int:
        """How many tensors are the base's."""
        return sum(len(file.source.tensors) - len(file.changes) for file in self.files)

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def plan_merge(base: Checkpoint, adapter: Adapter, family: Family, config: Mapping[str, Any]) -> Plan:
    """Match every change of the adapter to the one base tensor it is for.

    Args:
        base: The base's headers.
        adapter: The adapter's headers.
        family: The base's key layout.
        config: The base's config.json.

    Raises:
        AdapterMismatch: A change fits no tensor, more than one, one that another also fits, or its shape differs.
        Unsupported: It fits, but a tensor that is not merged: quantized, or tied to another.
    """
    names = _by_canonical_name(base, family)
    tensors = {name: tensor for name, (_, tensor) in base.tensors().items()}
    move, targets = _resolve(adapter, family, names, tensors, tied=is_tied(config))
    changes: dict[str, Change] = {}
    for change, target in targets:
        if target in changes:
            raise AdapterMismatch(
                f"{changes[target].target!r} and {change.target!r} of the adapter both change {target!r}.",
                code="adapter_duplicate_target",
            )
        _check_fit(change, tensors[target])
        changes[target] = change
    files = tuple(
        OutputFile(
            source=file,
            header=header_bytes(file.tensors, file.metadata),
            changes={tensor.name: changes[tensor.name] for tensor in file.tensors if tensor.name in changes},
        )
        for file in base.files
    )
    return Plan(files, base.index, move.tower if move else None)


def _by_canonical_name(base: Checkpoint, family: Family) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for file in base.files:
        for tensor in file.tensors:
            names.setdefault(canonical_name(tensor.name, family), []).append(tensor.name)
    return names


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding; every Gemma's default is that it is."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings", True) if isinstance(text, dict) else True
    return bool(config.get("tie_word_embeddings", nested))


@dataclass(frozen=True, order=True)
class _Move:
    """How a module's name in the adapter becomes its name in the base: `take` off the front, `put` before the rest."""

    take: str
    put: str

    @property
    def tower(self) -> str:
        return (self.put or self.take).split(".")[0]

    def __call__(self, name: str) -> str:
        return self.put + name.removeprefix(self.take)


def _resolve(
    adapter: Adapter, family: Family, names: dict[str, list[str]], tensors: dict[str, Tensor], *, tied: bool
) -> tuple[_Move | None, list[tuple[Change, str]]]:
    wanted = [(change, canonical_name(change.target, family)) for change in adapter.changes]
    for change, name in wanted:
        if name == "lm_head.weight" and tied:
            raise Unsupported(
                f"the adapter trained {change.target!r}, which this base ties to its embedding.",
                code="unsupported_tied_lm_head",
            )
        if name.split(".")[-2:] == ["embed_tokens", "weight"] and tied and _is_whole(change):
            raise Unsupported(
                f"the adapter trained {change.target!r} alone, to which this base ties its output head.",
                code="unsupported_tied_embedding",
            )
    astray = [(change, name) for change, name in wanted if name not in names]
    move = _move_of(astray, names, tensors, found=[name for _, name in wanted if name in names]) if astray else None
    targets = []
    for change, name in wanted:
        mapped = name if name in names or move is None else move(name)
        if len(names[mapped]) > 1:
            raise AdapterMismatch(
                f"{change.target!r} fits more than one tensor of the base: {', '.join(names[mapped][:4])}.",
                code="adapter_ambiguous",
            )
        targets.append((change, names[mapped][0]))
    return move, targets


def _move_of(
    astray: list[tuple[Change, str]],
    names: dict[str, list[str]],
    tensors: dict[str, Tensor],
    found: list[str],
) -> _Move:
    """The one move into or out of a tower after which all of `astray` fit by name and shape.

    An adapter trained on the text-only class names its modules without the multimodal model's tower (and the other
    way round); PEFT applies nothing then, and says nothing.
    """
    first = astray[0][1]
    # A tower is a root: anything deeper (`vision_tower.encoder.`) fits by chance of its inner names alone.
    ends = [name.removesuffix(first) for name in names if name.endswith(f".{first}")]
    moves = {_Move("", end) for end in ends if end.count(".") == 1}
    moves |= {_Move(tower, "") for tower in TEXT_TOWERS if first.startswith(tower)}
    fitting = sorted(
        move
        for move in moves
        if all(move(name) in names and _fits(change, tensors[names[move(name)][0]]) for change, name in astray)
    )
    if len(fitting) > 1:
        raise AdapterMismatch(
            f"{astray[0][0].target!r} fits more than one tower of the base: "
            f"{', '.join(move.tower for move in fitting)}.",
            code="adapter_ambiguous",
        )
    if not fitting or any(name != "lm_head.weight" for name in found):
        raise AdapterMismatch(
            f"{len(astray)} of what the adapter trained match no tensor of the base, "
            f"first {astray[0][0].target!r}: was it trained on another base?",
            code="adapter_unmatched",
        )
    return fitting[0]


def _is_whole(change: Change) -> bool:
    """Whether it is a tensor of its own; rows of a tied embedding PEFT trains in both places."""
    return not isinstance(change, LoraPair) and change.rows is None


def _shape(change: Change, tensor: Tensor) -> tuple[int, ...]:
    """The shape of the base's tensor that a change is for, as far as the adapter tells."""
    if isinstance(change, LoraPair):
        return (change.b.shape[0], change.a.shape[1])
    return change.tensor.shape if change.rows is None else tensor.shape[:1] + change.tensor.shape[1:]


def _fits(change: Change, tensor: Tensor) -> bool:
    return tensor.shape == _shape(change, tensor)


def _check_fit(change: Change, tensor: Tensor) -> None:
    is_embedding = tensor.name.rpartition(".")[0].endswith(("embed_tokens", "embed_tokens_per_layer"))
    if is_embedding and isinstance(change, LoraPair):
        raise Unsupported(f"{change.module!r} is an embedding, not a linear layer.", code="unsupported_embedding_lora")
    if not _fits(change, tensor):
        raise AdapterMismatch(
            f"{change.target!r} of the adapter is for {list(_shape(change, tensor))}, "
            f"the base's {tensor.name!r} is {list(tensor.shape)}: was it trained on another size?",
            code="adapter_shape_mismatch",
        )
    if not isinstance(change, LoraPair) and change.rows and max(change.rows) >= tensor.shape[0]:
        raise AdapterMismatch(
            f"the adapter trained row {max(change.rows)} of {tensor.name!r}, which has {tensor.shape[0]} rows.",
            code="adapter_token_indices_invalid",
        )
    if tensor.dtype not in FOLDABLE:
        raise Unsupported(
            f"the base's {tensor.name!r} is stored as {tensor.dtype}; {', '.join(sorted(FOLDABLE))} are merged.",
            code="unsupported_base_dtype",
        )
