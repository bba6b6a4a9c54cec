"""Embedding and output head of one adapter: what becomes of two layers that the base stores as one tensor.

Every Gemma ties its head to its embedding. PEFT trains them apart: what it adds to one is not in the other, until
`merge_and_unload` puts both into the tensor that they share. Right is what base and adapter compute unmerged; so where
they end up different, both are written, and the config says that they are no longer tied.
Source: https://github.com/huggingface/peft/issues/2777
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dispatcher.errors import AdapterMismatch, Unsupported
from exporter.adapter import Change
from exporter.checkpoint import Tensor, TensorFile
from exporter.gemma import HEAD
from exporter.pairs import Layout, LoraPair
from exporter.saved import Saved
from exporter.targets import Target
from exporter.tensors import read_tensor, same_values

Stored = Mapping[str, tuple[TensorFile, Tensor]]
"""The base's tensors by name."""


@dataclass(frozen=True)
class Settled:
    """The changes, each for one tensor of the output."""

    targets: tuple[Target, ...]
    confirmed: tuple[Change, ...]
    """Copies of what the base has, and twins of another change: nothing is left to do for them."""
    untied: bool
    """Whether the head, which has no tensor in a tied base, gets one."""


def settle(
    targets: Sequence[Target], file: TensorFile, stored: Stored, embedding: str | None, *, hidden_head: bool
) -> Settled:
    """Tell copies from changes, and decide whether embedding and head stay one tensor.

    Args:
        targets: What the adapter changes.
        file: The adapter's.
        stored: The base's tensors.
        embedding: The name of the embedding in a base that ties its head to it; None when they are not tied.
        hidden_head: Whether PEFT trains single tokens in the embedding alone.

    Raises:
        AdapterMismatch: `adapter_duplicate_target`.
        Unsupported: `unsupported_tokens_beside_head`, `unsupported_tokens_of_a_copy`.
    """
    targets, confirmed = _without_copies(targets, file, stored, embedding)
    if embedding is None:
        return Settled(tuple(targets), tuple(confirmed), untied=False)
    of_embedding = [target.change for target in targets if target.name == embedding]
    of_head = [target.change for target in targets if target.name == HEAD]
    if of_head and len(of_head) == len(of_embedding) == 1 and _are_twins(of_embedding[0], of_head[0], file):
        kept = [target for target in targets if target.name != HEAD]
        return Settled(tuple(kept), (*confirmed, *of_head), untied=False)
    rows_and_more = any(_is_rows(change) for change in of_embedding) and not all(map(_is_rows, of_head))
    if rows_and_more and not hidden_head:
        raise Unsupported(
            f"the adapter trained single tokens of the embedding, which the head shares, and {of_head[0].target!r} "
            "besides: what the two make of the head together is not merged.",
            code="unsupported_tokens_beside_head",
        )
    tied = not of_head and not any(_is_of_one_layer(change, hidden_head) for change in of_embedding)
    if not tied and not of_head and (copy := _base_of(of_embedding)) is not None:
        targets = [*targets, Target(Saved(HEAD, copy, None), HEAD)]
    if not tied and not of_embedding and (copy := _base_of(of_head)) is not None:
        targets = [*targets, Target(Saved(embedding, copy, None), embedding)]
    return Settled(tuple(targets), tuple(confirmed), untied=not tied)


def _is_rows(change: Change) -> bool:
    return isinstance(change, Saved) and change.rows is not None


def _is_of_one_layer(change: Change, hidden_head: bool) -> bool:
    """PEFT trains single tokens in both places as one, if it finds both, unless it is told otherwise and stores both;
    and a copy of one tensor is one of both."""
    return not isinstance(change, Saved) or (hidden_head if change.rows is not None else not change.copy)


def _base_of(changes: Sequence[Change]) -> Tensor | None:
    return next((change.base for change in changes if isinstance(change, LoraPair) and change.base), None)


def _without_copies(
    targets: Sequence[Target], file: TensorFile, stored: Stored, embedding: str | None
) -> tuple[list[Target], list[Change]]:
    """Leave out copies of what the base has; a copy of anything else is what its pair is added to, or a change."""
    kept = [target for target in targets if not _is_copy(target.change)]
    confirmed: list[Change] = []
    for target in targets:
        copy = target.change
        if not isinstance(copy, Saved) or not copy.copy:
            continue
        name = embedding if target.name == HEAD and embedding is not None else target.name
        if same_values(file, copy.tensor, *stored[name]):
            confirmed.append(copy)
            continue
        at = next((i for i, other in enumerate(kept) if other.name == target.name), None)
        if at is None:
            kept.append(target)
        elif isinstance(pair := kept[at].change, LoraPair):
            kept[at] = replace(kept[at], change=replace(pair, base=copy.tensor))
        elif _is_rows(kept[at].change):
            raise Unsupported(
                f"the adapter trained single tokens of {copy.target!r}, and brings another one than the base's "
                "(a resized vocabulary?), which is not merged: train the layer whole (modules_to_save).",
                code="unsupported_tokens_of_a_copy",
            )
        else:
            raise AdapterMismatch(
                f"the adapter stores {copy.target!r} twice: as trained, and as a copy that is not the base's.",
                code="adapter_duplicate_target",
            )
    return kept, confirmed


def _is_copy(change: Change) -> bool:
    return isinstance(change, Saved) and change.copy


def _are_twins(one: Change, other: Change, file: TensorFile) -> bool:
    """Whether two changes make the same of the tensor that they share (`ensure_weight_tying`)."""
    if isinstance(one, Saved) and isinstance(other, Saved):
        return one.rows == other.rows and same_values(file, one.tensor, file, other.tensor)
    if not isinstance(one, LoraPair) or not isinstance(other, LoraPair) or one.layout is not Layout.EMBEDDING:
        return False
    if other.layout is not Layout.LINEAR or one.magnitude or other.magnitude or one.scale != other.scale:
        return False
    if (one.base is None) != (other.base is None) or one.shape != other.shape:
        return False
    if one.base and other.base and not same_values(file, one.base, file, other.base):
        return False
    halves = ((one.a, other.b), (one.b, other.a))
    return all(
        bool((read_tensor(file, second).double() == read_tensor(file, first).double().T).all())
        for first, second in halves
    )
