"""Which part of an execution's work is this task's: tasks are dealt theirs by index, and never wait for each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Tasks:
    """One task among those of its execution."""

    index: int = 0
    """From 0"""
    count: int = 1

    def deal(self, items: Sequence[T], sizes: Sequence[int]) -> list[T]:
        """Those of `items` that are this task's, in their order.

        Every task of a count deals the same way, so that together they have each item once: largest first, each to
        whoever has least so far. That is at most 4/3 of the best possible share
        (R. L. Graham 1969, https://doi.org/10.1137/0117039).

        Args:
            items: The same, in the same order, for every task.
            sizes: How much work each is, bytes say.
        """
        loads = [0] * self.count
        mine = set()
        by_size = sorted(enumerate(zip(items, sizes, strict=True)), key=lambda entry: -entry[1][1])
        for position, (_, size) in by_size:
            lightest = min(range(self.count), key=loads.__getitem__)
            loads[lightest] += size
            if lightest == self.index:
                mine.add(position)
        return [item for position, item in enumerate(items) if position in mine]
