"""Which tensor of the base each change of an adapter is for, found by name, and by shape where names leave room."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dispatcher.errors import AdapterMismatch
from exporter.adapter import Adapter, Change
from exporter.checkpoint import Checkpoint, Tensor
from exporter.gemma import EMBEDDINGS, HEAD, Family, canonical_name
from exporter.pairs import LoraPair
from exporter.saved import Saved
from exporter.tensors import is_zero

TEXT_TOWERS = ("language_model.", "language_model.model.")
"""How the multimodal classes call their text tower, today and before transformers 4.52."""


@dataclass(frozen=True)
class Target:
    """A change, and the base's tensor that it is for."""

    change: Change
    name: str
    """As the base has it; of a head that is tied, the head's canonical name, which the base need not have"""


@dataclass(frozen=True)
class Resolved:
    """Every change of an adapter with its tensor."""

    targets: tuple[Target, ...]
    unneeded: tuple[Change, ...]
    """Biases that are zero, of modules that have none"""
    tower: str | None
    """The tower that a text-only adapter was mapped to, or taken out of; None when the names matched as they are."""


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


def names_of(base: Checkpoint, family: Family) -> dict[str, list[str]]:
    """The base's tensors by their canonical names; more than one only in a checkpoint that holds something twice."""
    names: dict[str, list[str]] = {}
    for file in base.files:
        for tensor in file.tensors:
            names.setdefault(canonical_name(tensor.name, family), []).append(tensor.name)
    return names


def resolve(adapter: Adapter, base: Checkpoint, family: Family, *, tied: bool) -> Resolved:
    """Find the base's tensor of every change.

    Raises:
        AdapterMismatch: A change fits no tensor or more than one (`adapter_unmatched`, `adapter_ambiguous`), or it is
            a bias for a module without one (`adapter_bias_without_base_bias`).
    """
    names = names_of(base, family)
    tensors = {name: tensor for name, (_, tensor) in base.tensors().items()}
    wanted = [(change, canonical_name(change.target, family)) for change in adapter.changes]
    heads = [(change, name) for change, name in wanted if name == HEAD and tied]
    wanted = [(change, name) for change, name in wanted if name != HEAD or not tied]
    astray = [(change, name) for change, name in wanted if name not in names and not name.endswith(".bias")]
    move = _move_of(astray, names, tensors, found=[name for _, name in wanted if name in names]) if astray else None

    def moved(name: str) -> str:
        return name if name in names or move is None else move(name)

    targets = [Target(change, HEAD) for change, _ in heads]
    unneeded = []
    for change, name in wanted:
        found = names.get(moved(name), [])
        if not found:
            weight = name.removesuffix(".bias") + ".weight"
            _refuse_bias(change, moved(weight) in names or (tied and weight == HEAD), adapter)
            unneeded.append(change)
            continue
        if len(found) > 1:
            raise AdapterMismatch(
                f"{change.target!r} fits more than one tensor of the base: {', '.join(found[:4])}.",
                code="adapter_ambiguous",
            )
        targets.append(Target(change, found[0]))
    return Resolved(tuple(targets), tuple(unneeded), move.tower if move else None)


def _refuse_bias(change: Change, has_module: bool, adapter: Adapter) -> None:
    """Refuse what is for no tensor of the base, but a bias that is zero, for a module without one."""
    if not has_module or not change.target.endswith(".bias"):
        raise _unmatched([change])
    if not all(is_zero(adapter.file, tensor) for tensor in change.tensors):
        raise AdapterMismatch(
            f"the adapter trained {change.target!r}, but the base's module has no bias, and can have none.",
            code="adapter_bias_without_base_bias",
        )


def _unmatched(changes: Sequence[Change]) -> AdapterMismatch:
    return AdapterMismatch(
        f"{len(changes)} of what the adapter trained match no tensor of the base, "
        f"first {changes[0].target!r}: was it trained on another base?",
        code="adapter_unmatched",
    )


def _move_of(
    astray: list[tuple[Change, str]],
    names: Mapping[str, list[str]],
    tensors: Mapping[str, Tensor],
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
        move for move in moves if all(_may_be_for(change, move(name), names, tensors) for change, name in astray)
    )
    if len(fitting) > 1:
        raise AdapterMismatch(
            f"{astray[0][0].target!r} fits more than one tower of the base: "
            f"{', '.join(move.tower for move in fitting)}.",
            code="adapter_ambiguous",
        )
    if not fitting or any(name != HEAD for name in found):
        raise _unmatched([change for change, _ in astray])
    return fitting[0]


def _may_be_for(change: Change, name: str, names: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of this canonical name is there and of the right shape; an embedding may have other rows."""
    if name not in names:
        return False
    tensor = tensors[names[name][0]]
    wanted, found = shape_of(change, tensor), tensor.shape
    return wanted[1:] == found[1:] if name in EMBEDDINGS else wanted == found


def shape_of(change: Change, tensor: Tensor) -> tuple[int, ...]:
    """The shape of the base's tensor that a change is for, as far as the adapter tells."""
    match change:
        case LoraPair():
            return tensor.shape if change.fits(tensor.shape) else change.shape
        case Saved(rows=None):
            return change.tensor.shape
        case Saved():
            return tensor.shape[:1] + change.tensor.shape[1:]
        case _:
            return change.tensor.shape


def fits(change: Change, tensor: Tensor) -> bool:
    """Whether a change is for a tensor of this shape."""
    return tensor.shape == shape_of(change, tensor)
