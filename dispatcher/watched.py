"""The log lines that a deployment's alerts look at, by fields of their own and not by what they say to a reader.

`infra/alerts.tf` names the same fields; a test holds the two together.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from dispatcher.contract import ExportRecord, State
from dispatcher.lifecycle import holds_live_lease

STUCK_AFTER = timedelta(minutes=30)
"""So long after a lease ran out, every sweep and every grace of a launch should have taken the export back."""


def export_failed(code: str, *, retryable: bool) -> dict[str, Any]:
    """The fields of a line that says that an export has failed.

    Args:
        code: Why, as the record says it.
        retryable: Whether it was something that passes: then the platform is at fault, and not the model.
    """
    return {"event": "export_failed", "code": code, "retryable": retryable}


@dataclass
class Backlog:
    """What a sweep found unfinished, before it put anything right."""

    unfinished: int = 0
    oldest_queued_seconds: int = 0
    """How long the export that waits longest has waited for an execution."""
    stuck_leases: int = 0
    """Exports whose holder died `STUCK_AFTER` ago and that nobody has taken back."""

    def saw(self, record: ExportRecord, now: datetime) -> None:
        """Count one in."""
        self.unfinished += 1
        if record.state is State.QUEUED:
            waited = now - (record.queued_at or record.updated_at)
            self.oldest_queued_seconds = max(self.oldest_queued_seconds, round(waited.total_seconds()))
        elif record.lease is not None and not holds_live_lease(record, now - STUCK_AFTER):
            self.stuck_leases += 1

    def fields(self) -> dict[str, Any]:
        """The fields of a line that says that a sweep went through the records."""
        return {"event": "swept", **vars(self)}
