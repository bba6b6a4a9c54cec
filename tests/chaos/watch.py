"""Looks on while exports are made: whether each record is whole, and whether two work on one export at a time."""

import threading
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from dispatcher.contract import UNFINISHED, ExportRecord, State, TrainingJob
from dispatcher.records import RecordStore

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
        "a token": record.token_ref is not None
        and state not in UNFINISHED
        and not (state is State.FAILED and record.error is not None and record.error.retryable),
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
        self.lock = threading.Lock()
        self._holder: dict[str, str] = {}
        self._held: dict[str, dict[str, str]] = {}
        self._lapsed: set[str] = set()

    def stored(self, old: ExportRecord | None, new: ExportRecord, caller: str) -> None:
        """A record was written; called under the lock, so in the order in which they were."""
        self.inconsistent += faults_of(new)
        before, after = old.lease if old else None, new.lease
        changes_hands = (before and before.lease_id) != (after and after.lease_id)
        if before is not None and changes_hands and before.expires_at <= datetime.now(UTC):
            self._lapsed.add(before.lease_id)
        if after is not None and changes_hands and new.state is State.RUNNING:
            self._holder[new.export_id] = after.lease_id
            self._held.setdefault(caller, {})[new.export_id] = after.lease_id

    def writes(self, caller: str, export_id: str, path: str) -> None:
        """Somebody is about to write a file of an export."""
        with self.lock:
            mine, holder = self._held.get(caller, {}).get(export_id), self._holder.get(export_id)
            if mine != holder and mine not in self._lapsed:
                self.doubled.append(f"{caller} writes {path}, and another has claimed it meanwhile")


class WatchedRecords:
    """A record store that a watch looks at.

    Args:
        inner: The real one.
        watch: Told of what is stored.
        caller: Whose it is.
    """

    def __init__(self, inner: RecordStore, watch: Watch, caller: str) -> None:
        self._inner = inner
        self._watch = watch
        self._caller = caller

    def get_job(self, job_id: str) -> TrainingJob | None:
        return self._inner.get_job(job_id)

    def put_job(self, job_id: str, document: dict[str, Any]) -> bool:
        return self._inner.put_job(job_id, document)

    def get_export(self, export_id: str) -> ExportRecord | None:
        return self._inner.get_export(export_id)

    def create_export(self, record: ExportRecord, *, job_result: Mapping[str, str] | None = None) -> bool:
        with self._watch.lock:
            done = self._inner.create_export(record, job_result=job_result)
            if done:
                self._watch.stored(None, record, self._caller)
        return done

    def replace_export(
        self, old: ExportRecord, new: ExportRecord, *, job_result: Mapping[str, str] | None = None
    ) -> bool:
        with self._watch.lock:
            done = self._inner.replace_export(old, new, job_result=job_result)
            if done:
                self._watch.stored(old, new, self._caller)
        return done

    def list_exports(
        self,
        *,
        user_id: str | None = None,
        job_id: str | None = None,
        states: Collection[State] | None = None,
        limit: int = 100,
        after: str | None = None,
        strict: bool = False,
    ) -> list[ExportRecord]:
        return self._inner.list_exports(
            user_id=user_id, job_id=job_id, states=states, limit=limit, after=after, strict=strict
        )

    def list_uncollected(self, states: Collection[State], *, until: datetime, limit: int = 100) -> list[ExportRecord]:
        return self._inner.list_uncollected(states, until=until, limit=limit)

    def close(self) -> None:
        self._inner.close()
