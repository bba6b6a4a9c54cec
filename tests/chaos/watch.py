"""Looks on while exports are made: whether each record is whole, and whether two work on one export at a time."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime

from dispatcher.contract import ExportRecord, State

LEASED = frozenset({State.STARTING, State.RUNNING})


def faults_of(record: ExportRecord) -> list[str]:
    """What of a record contradicts the rest of it."""
    state = record.state
    wrong = {
        "a lease": (record.lease is not None) is not (state in LEASED),
        "artifacts": bool(record.artifacts) is not (state is State.COMPLETED),
        "an error": (record.error is not None) is not (state is State.FAILED),
        "a stage": record.stage is not None and state not in LEASED,
        "progress": state is State.COMPLETED and record.progress != 1.0,
        "a token": record.token_ref is not None and state is State.CANCELLED,
    }
    return [f"{record.export_id} is {state} with or without {what}" for what, is_wrong in wrong.items() if is_wrong]


class Watch:
    """What was seen.

    Attributes:
        inconsistent: Of each record that was not whole, what was wrong.
        doubled: Who wrote for an export that another had begun, whose own lease had not run out.
    """

    def __init__(self) -> None:
        self.inconsistent: list[str] = []
        self.doubled: list[str] = []
        self._lock = threading.Lock()
        self._holder: dict[str, str] = {}
        self._held: dict[str, dict[str, str]] = {}
        self._lapsed: set[str] = set()

    def stored(
        self, old: ExportRecord | None, new: ExportRecord, caller: str, store: Callable[[], bool] = lambda: True
    ) -> bool:
        """Write a record, and look at it if it was written: one at a time, so that the order is known.

        Args:
            old: What it replaces.
            new: The record.
            caller: Who writes it; what an execution's tasks are called begins with its name and `/`.
            store: Writes it; whether it did.
        """
        with self._lock:
            done = store()
            if done:
                self._noted(old, new, caller)
        return done

    def writes(self, caller: str, export_id: str, path: str) -> None:
        """Somebody is about to write a file of an export."""
        with self._lock:
            mine, holder = self._held.get(caller, {}).get(export_id), self._holder.get(export_id)
            if mine != holder and mine not in self._lapsed:
                self.doubled.append(f"{caller} writes {path}, and another has claimed it meanwhile")

    def _noted(self, old: ExportRecord | None, new: ExportRecord, caller: str) -> None:
        self.inconsistent += faults_of(new)
        before, after = old.lease if old else None, new.lease
        changes_hands = (before and before.lease_id) != (after and after.lease_id)
        if before is not None and changes_hands and before.expires_at <= datetime.now(UTC):
            self._lapsed.add(before.lease_id)
        if after is not None and new.state is State.RUNNING:
            self._holder[new.export_id] = after.lease_id
            if after.owner == caller.partition("/")[0]:  # several tasks hold one lease
                self._held.setdefault(caller, {})[new.export_id] = after.lease_id
