"""`python -m infra.cost`: what one export costs on Cloud Run, as the table of infra/README.md.

Prices are list prices in US dollars of a region of tier 1, without free tier and discounts, as of 2026; look them up
before you rely on them: https://cloud.google.com/run/pricing, https://cloud.google.com/storage/pricing
"""

import sys
from dataclasses import dataclass

CPU_SECOND, GIB_SECOND, L4_SECOND = 0.000018, 0.000002, 0.0001867
GB_MONTH = 0.02
"""Standard storage"""
CPUS, GIB = 4, 16
"""Of a task, by default"""
START_SECONDS = 30
"""From the start of a task's container until it works; assumed, not measured."""


@dataclass(frozen=True)
class Size:
    """A Gemma 3, as it lies on the hub."""

    name: str
    base_gb: float
    """Its weights in bfloat16, in units of 10^9 bytes"""
    tasks: int
    """As dispatcher/tasks.py gives it"""


@dataclass(frozen=True)
class Kind:
    """What is made of it."""

    name: str
    seconds_per_gb: float
    """Of the base, in one task: measured from hub to bucket on two cores that served both besides"""
    share: float
    """Its size, as a part of the base's"""


SIZES = (Size("1B", 2.0, 1), Size("4B", 8.6, 1), Size("12B", 24.4, 2), Size("27B", 54.9, 4))
KINDS = (Kind("merged", 13, 1.0), Kind("gguf q4_k_m", 18, 0.33))


def task_seconds(size: Size, kind: Kind) -> float:
    """What all tasks of an export take together; they share the work, and each starts for itself."""
    return size.tasks * START_SECONDS + kind.seconds_per_gb * size.base_gb


def second(*, gpu: bool) -> float:
    """What a task costs a second."""
    return CPUS * CPU_SECOND + GIB * GIB_SECOND + (L4_SECOND if gpu else 0)


def table() -> str:
    """A row for each size and kind, in Markdown."""
    rows = [
        "| model | export | tasks | minutes | with an L4 | without | kept, a month |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        for kind in KINDS:
            seconds, stored = task_seconds(size, kind), size.base_gb * kind.share * GB_MONTH
            costs = f"${seconds * second(gpu=True):.3f} | ${seconds * second(gpu=False):.3f} | ${stored:.2f}"
            minutes = seconds / size.tasks / 60
            rows.append(f"| {size.name} | {kind.name} | {size.tasks} | {minutes:.1f} | {costs} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
