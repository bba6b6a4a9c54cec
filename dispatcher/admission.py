"""The bound on a user's unfinished exports, which holds however many are asked for at once.

Whoever asks for one more counts, writes a record, and counts again: of several that did so at once, the last to write
sees all the others. So what is published is never more than the bound; and those that come first by their ids wait a
moment for the others to withdraw, or of a crowd nobody would be left.
"""

import random
import time

from dispatcher.contract import UNFINISHED, ExportRecord, State
from dispatcher.errors import TooManyExports
from dispatcher.limits import RETRY_AFTER_SECONDS
from dispatcher.records import RecordStore

PATIENCE_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
"""Seconds."""


class Admission:
    """Lets each user have so many unfinished exports, and no more.

    Args:
        bound: The most of one user.
        patience: Seconds to wait for others to withdraw.
    """

    def __init__(self, records: RecordStore, bound: int, *, patience: float = PATIENCE_SECONDS) -> None:
        self._records = records
        self._bound = bound
        self._patience = patience

    def ask(self, user: str) -> None:
        """Before anything is written for one more.

        Raises:
            TooManyExports: The user has as many as may be.
        """
        if len(self._records.list_exports(user_id=user, states=UNFINISHED, limit=self._bound)) >= self._bound:
            raise self.refusal()

    def is_admitted(self, record: ExportRecord) -> bool:
        """Whether a record that was written and not published yet is within the bound; if not, withdraw it."""
        deadline, pause = time.monotonic() + self._patience, _FIRST_PAUSE
        while True:
            # Enough to know one's place: of those before it in the list, at most `bound` are not candidates.
            limit = 4 * self._bound
            found = self._records.list_exports(user_id=record.user_id, states=UNFINISHED, limit=limit)
            if len(found) <= self._bound:
                return True
            before = sum(not is_candidate(other) or other.export_id < record.export_id for other in found)
            if before >= self._bound or time.monotonic() > deadline:
                return False
            time.sleep(random.uniform(0, pause))  # noqa: S311  # no secret
            pause = min(2 * pause, _LONGEST_PAUSE)

    def refusal(self) -> TooManyExports:
        """What a caller is told who has reached the bound."""
        message = f"{self._bound} exports of yours are unfinished, which is the limit: wait for one to end"
        return TooManyExports(message, headers={"Retry-After": str(RETRY_AFTER_SECONDS[TooManyExports.status])})


def is_candidate(record: ExportRecord) -> bool:
    """Whether nothing has come of a record yet: its message was never sent, no execution was started for it."""
    begun = record.published_at is not None or record.attempt or record.launches
    return record.state is State.QUEUED and not begun
