"""What can be made to happen to a request to a local server, and to which."""

import threading
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus


class Fault(Enum):
    """What can be made to happen to a request."""

    REFUSED = auto()
    """503, and nothing was done."""
    DROPPED = auto()
    """The connection ends, and nothing was done."""
    ANSWER_LOST = auto()
    """It is done, and then the connection ends."""


@dataclass
class _Planned:
    fault: Fault | HTTPStatus
    method: str
    part: str
    skip: int
    times: int


class Faults:
    """Which requests something is to happen to; threads may share it."""

    def __init__(self) -> None:
        self._planned: list[_Planned] = []
        self._lock = threading.Lock()

    def plan(self, fault: Fault | HTTPStatus, method: str, part: str, *, skip: int = 0, times: int = 1) -> None:
        """Let something happen to the next requests of a method whose target contains `part`, after `skip` others.

        A status is what such a request is answered with, and nothing is done.
        """
        with self._lock:
            self._planned.append(_Planned(fault, method, part, skip, times))

    def forget(self) -> None:
        """Let nothing happen any more."""
        with self._lock:
            self._planned.clear()

    def next(self, method: str, target: str) -> Fault | HTTPStatus | None:
        """What is to happen to a request that has come."""
        with self._lock:
            for planned in self._planned:
                if planned.method != method or planned.part not in target or not planned.times:
                    continue
                if planned.skip:
                    planned.skip -= 1
                    continue
                planned.times -= 1
                return planned.fault
        return None
