"""The ledger of a merge, `ledger.json`: what became of each tensor of the adapter, and of each tensor of the output."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dispatcher.errors import VerificationFailed
from exporter.adapter import Adapter, Change
from exporter.gemma import Family, canonical_name, tower_of
from exporter.lora import Delta
from exporter.pairs import LoraPair
from exporter.plan import OutputTensor, Plan
from exporter.saved import Saved

LEDGER_NAME = "ledger.json"
FORMAT_VERSION = 1


def ledger_of(plan: Plan, adapter: Adapter, family: Family, deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """The whole account of one merge.

    Args:
        plan: What was written.
        adapter: What it was made from.
        family: The base's.
        deltas: Of each changed tensor of the output, how far it went; empty before anything was written.

    Raises:
        VerificationFailed: `ledger_unbalanced`: a tensor of the adapter was not used.
    """
    used: dict[str, dict[str, Any]] = {}
    for change, outputs in _uses(plan):
        for tensor in change.tensors:
            # Twice only the adapter's own embedding: its pair is added to it, and the head that was tied to it is it.
            entry = used.setdefault(tensor.name, {"operation": _operation(change, outputs), "tensors": []})
            entry["tensors"] = sorted({*entry["tensors"], *outputs})
    if missing := sorted({tensor.name for tensor in adapter.file.tensors} - used.keys()):
        raise VerificationFailed(
            f"the ledger does not balance: nothing uses the adapter's {missing[0]!r}.", code="ledger_unbalanced"
        )
    return {
        "format_version": FORMAT_VERSION,
        "adapter": dict(sorted(used.items())),
        "output": {output.tensor.name: _entry(output, deltas) for output in plan.outputs},
        "towers": towers(plan, family),
    }


def _uses(plan: Plan) -> list[tuple[Change, list[str]]]:
    """Every change once, with the tensors of the output that it made."""
    uses: dict[str, tuple[Change, list[str]]] = {}
    for output in plan.outputs:
        if output.change is not None:
            key = output.change.tensors[0].name
            uses.setdefault(key, (output.change, []))[1].append(output.tensor.name)
    return [*uses.values(), *((change, []) for change in plan.unneeded)]


def _operation(change: Change, outputs: list[str]) -> str:
    if not outputs:
        return "confirmed"
    match change:
        case Saved():
            return "replaced"
        case LoraPair() if change.magnitude is not None:
            return "merged with magnitudes"
        case _:
            return "merged"


def _entry(output: OutputTensor, deltas: Mapping[str, Delta]) -> dict[str, Any]:
    entry: dict[str, Any] = {"operation": output.operation}
    if output.added:
        entry["from"] = output.source.name
    if (delta := deltas.get(output.tensor.name)) is not None:
        entry["max_abs_change"] = _rounded(delta.largest)
        if delta.before_squared > 0:
            entry["relative_norm"] = _rounded(math.sqrt(delta.squared / delta.before_squared))
    return entry


def _rounded(value: float) -> float:
    """Four digits: sums of many squares differ between machines in the last ones."""
    return float(f"{value:.4g}")


def towers(plan: Plan, family: Family) -> dict[str, dict[str, int]]:
    """How many tensors of each tower were copied, merged, replaced and added."""
    counts: dict[str, Counter[str]] = {}
    for output in plan.outputs:
        tower = tower_of(canonical_name(output.tensor.name, family))
        counts.setdefault(tower, Counter())[output.operation] += 1
    return {tower: {name: found[name] for name in Plan.operations} for tower, found in sorted(counts.items())}


def refuse_unchanged(deltas: Mapping[str, Delta]) -> None:
    """Refuse a merge after which every tensor is what it was.

    Raises:
        VerificationFailed: `nothing_changed`.
    """
    if not any(delta.written for delta in deltas.values()):
        largest = max((delta.largest for delta in deltas.values()), default=0.0)
        raise VerificationFailed(
            f"the adapter changes nothing: the most that it adds to a weight is {largest:.3g}, which the rounding to "
            "the base's dtype takes away. Was it saved before the training?",
            code="nothing_changed",
        )


def encoded(ledger: dict[str, Any]) -> bytes:
    """The file's bytes: the same for the same ledger."""
    return json.dumps(ledger, indent=1).encode() + b"\n"
