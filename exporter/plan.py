"""The ledger: which base tensor each adapter tensor changes, decided from headers alone, before any weight is read.

Every pair of the adapter ends at exactly one tensor of the base, or the export is refused by name. The output keeps
the base's files, tensor names, order, dtypes and shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dispatcher.errors import AdapterMismatch, Unsupported
from exporter.adapter import Adapter, LoraPair
from exporter.checkpoint import Checkpoint, Tensor, TensorFile, header_bytes
from exporter.gemma import Family, canonical_name
from exporter.tensors import TORCH_DTYPE

FOLDABLE = frozenset(TORCH_DTYPE) - {"F64"}
TEXT_TOWERS = ("language_model.", "language_model.model.")
"""How the multimodal classes call their text tower, today and before transformers 4.52."""


@dataclass(frozen=True)
class OutputFile:
    """One file to write: `header`, then every tensor of `source` in its order, copied or merged."""

    source: TensorFile
    header: bytes
    merges: Mapping[str, LoraPair]

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
        return sum(len(file.merges) for file in self.files)

    @property
    def copied(self) -> int:
        return sum(len(file.source.tensors) for file in self.files) - self.merged

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def plan_merge(base: Checkpoint, adapter: Adapter, family: Family, config: Mapping[str, Any]) -> Plan:
    """Match every adapter pair to the one base tensor it changes.

    Args:
        base: The base's headers.
        adapter: The adapter's headers.
        family: The base's key layout.
        config: The base's config.json.

    Raises:
        AdapterMismatch: A pair fits no tensor, more than one, one that another pair also fits, or its shape differs.
        Unsupported: The pair fits, but not by plain LoRA on a 16- or 32-bit linear weight.
    """
    names = _by_canonical_name(base, family)
    tensors = {name: tensor for name, (_, tensor) in base.tensors().items()}
    move, targets = _resolve(adapter, family, names, tensors, tied=is_tied(config))
    merges: dict[str, LoraPair] = {}
    for pair, target in targets:
        if target in merges:
            raise AdapterMismatch(
                f"modules {merges[target].module!r} and {pair.module!r} both change {target!r}.",
                code="adapter_duplicate_target",
            )
        _check_fit(pair, tensors[target])
        merges[target] = pair
    files = tuple(
        OutputFile(
            source=file,
            header=header_bytes(file.tensors, file.metadata),
            merges={tensor.name: merges[tensor.name] for tensor in file.tensors if tensor.name in merges},
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
) -> tuple[_Move | None, list[tuple[LoraPair, str]]]:
    wanted = [(pair, canonical_name(f"{pair.module}.weight", family)) for pair in adapter.pairs]
    for pair, name in wanted:
        if name == "lm_head.weight" and tied:
            raise Unsupported(
                f"the adapter trained {pair.module!r}, which this base ties to its embedding.",
                code="unsupported_tied_lm_head",
            )
    astray = [(pair, name) for pair, name in wanted if name not in names]
    move = _move_of(astray, names, tensors, found=[name for _, name in wanted if name in names]) if astray else None
    targets = []
    for pair, name in wanted:
        mapped = name if name in names or move is None else move(name)
        if len(names[mapped]) > 1:
            raise AdapterMismatch(
                f"module {pair.module!r} fits more than one tensor of the base: {', '.join(names[mapped][:4])}.",
                code="adapter_ambiguous",
            )
        targets.append((pair, names[mapped][0]))
    return move, targets


def _move_of(
    astray: list[tuple[LoraPair, str]],
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
        if all(move(name) in names and _fits(pair, tensors[names[move(name)][0]]) for pair, name in astray)
    )
    if len(fitting) > 1:
        raise AdapterMismatch(
            f"module {astray[0][0].module!r} fits more than one tower of the base: "
            f"{', '.join(move.tower for move in fitting)}.",
            code="adapter_ambiguous",
        )
    if not fitting or any(name != "lm_head.weight" for name in found):
        raise AdapterMismatch(
            f"{len(astray)} of the adapter's modules match no tensor of the base, "
            f"first {astray[0][0].module!r}: was it trained on another base?",
            code="adapter_unmatched",
        )
    return fitting[0]


def _fits(pair: LoraPair, tensor: Tensor) -> bool:
    return tensor.shape == (pair.b.shape[0], pair.a.shape[1])


def _check_fit(pair: LoraPair, tensor: Tensor) -> None:
    if tensor.name.rpartition(".")[0].endswith(("embed_tokens", "embed_tokens_per_layer")):
        raise Unsupported(f"{pair.module!r} is an embedding, not a linear layer.", code="unsupported_embedding_lora")
    if not _fits(pair, tensor):
        raise AdapterMismatch(
            f"module {pair.module!r}: B @ A is [{pair.b.shape[0]}, {pair.a.shape[1]}], "
            f"the base's {tensor.name!r} is {list(tensor.shape)}: was it trained on another size?",
            code="adapter_shape_mismatch",
        )
    if tensor.dtype not in FOLDABLE:
        raise Unsupported(
            f"the base's {tensor.name!r} is stored as {tensor.dtype}; {', '.join(sorted(FOLDABLE))} are merged.",
            code="unsupported_base_dtype",
        )
