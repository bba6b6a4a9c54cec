"""What is around the exporter gives out in the middle of an export: the disk, the bucket, the records."""

from dataclasses import dataclass, field
from http import HTTPStatus

STATUSES = (
    HTTPStatus.FORBIDDEN,
    HTTPStatus.PRECONDITION_FAILED,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
WRITTEN = 4
"""Uploads that get through before the bucket refuses"""
DISK_BYTES = 24 << 20
ROOM_BYTES = 300 << 10
"""What is left on the full disk: for records and small files, not for a model and its tokenizer"""
AWAY_SECONDS = 60.0
PATIENCE_SECONDS = 240.0
Files = dict[str, str]
"""Of each file of a job's artifacts size and crc32c, without manifests, which say where the adapter lies"""


@dataclass
class Case:
    """What came of one outage."""

    what: str
    during: list[str] = field(default_factory=list)
    """Of each export: its state while it lasts, its error's code, and whether that says that a retry may succeed"""
    clear: bool = True
    """Whether each of them has an error with a message, or waits for another attempt"""
    completed: bool = False
    """Whether it was, after asking again once all is well"""
    different: list[str] = field(default_factory=list)
    """Files that are not as they are without an outage: other, missing, or left over"""
    unexpected: list[str] = field(default_factory=list)
    """Exceptions that are none of ours, answers of 500, and exports that two worked on"""
    seconds: float = 0.0
    """From the end of the outage until all was completed"""

    @property
    def is_good(self) -> bool:
        return self.clear and self.completed and not self.different and not self.unexpected
