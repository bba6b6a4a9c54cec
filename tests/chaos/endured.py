"""An export through an outage: what its record says meanwhile, and whether asking again afterwards completes it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dispatcher import bootstrap
from tests.chaos.deployment import Deployment
from tests.chaos.storm import sweep
from tests.chaos.user import EXPORTS, Seen, User, client_of, exceptions_noted

PATIENCE_SECONDS = 300.0
PAUSE_SECONDS = 0.2
Files = dict[str, str]
"""Of each file, by its path under the roots of artifacts, what tells it from another"""


@dataclass
class Case:
    """What came of one outage."""

    what: str
    during: list[str] = field(default_factory=list)
    """What was answered before it ended"""
    clear: bool = True
    """Whether that says what is wrong, or that the export waits for another attempt"""
    completed: bool = False
    """Whether all exports were, after asking again once it was over"""
    different: list[str] = field(default_factory=list)
    """Files that are not as they are without an outage: other, missing, or left over"""
    unexpected: list[str] = field(default_factory=list)
    """Exceptions that are none of ours, answers of 500, and exports that two worked on"""
    seconds: float = 0.0
    """From its end until all was completed"""

    @property
    def is_good(self) -> bool:
        return self.clear and self.completed and not self.different and not self.unexpected


@contextmanager
def asking(deployment: Deployment, case: Case) -> Iterator[User]:
    """Someone who asks a deployment, which is closed at the end; what nobody expected is added to the case."""
    seen = Seen(0)
    bootstrap.install(deployment.stack)
    try:
        with exceptions_noted(seen), client_of() as client:
            yield User(client, seen)
    finally:
        bootstrap.install(None)
        deployment.close()
    watch = deployment.watch
    case.unexpected += [*seen.lost, *seen.unexpected, *deployment.runner.faults, *watch.doubled, *watch.inconsistent]


def endured(
    what: str,
    deployment: Deployment,
    *,
    lasts: Callable[[User, Case], object],
    files: Callable[[], Files],
    wanted: Files | None,
) -> Case:
    """Ask for all exports, let an outage come and go, and ask again until they are completed.

    Args:
        what: Names the case.
        deployment: Closed at the end.
        lasts: Returns when the outage is over; adds to the case what was answered while it lasted.
        files: What lies under the roots of artifacts.
        wanted: What is to lie there; None where that is not known yet.
    """
    case = Case(what)
    with asking(deployment, case) as user:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while user.accepted != EXPORTS.keys() and time.monotonic() < deadline:
            for kind in EXPORTS.keys() - user.accepted:
                user.ask(kind)
        lasts(user, case)
        began = time.monotonic()
        case.completed = _completed(deployment, user, began + PATIENCE_SECONDS)
        case.seconds = time.monotonic() - began
        deployment.settled()
    found = files()
    if wanted is not None:
        names = sorted(found.keys() | wanted.keys())
        case.different = [name for name in names if found.get(name) != wanted.get(name)]
    return case


def told(user: User, case: Case) -> None:
    """Add to a case what each export's status says."""
    for kind in EXPORTS:
        status = user.look(kind)
        case.during.append(f"{kind} {_said(status)}")
        case.clear = case.clear and _is_clear(status)


def _completed(deployment: Deployment, user: User, deadline: float) -> bool:
    """Ask again for what failed, sweep, and wait; whether all was completed before the deadline."""
    while time.monotonic() < deadline:
        statuses = {kind: user.look(kind) for kind in EXPORTS}
        states = {kind: status["state"] if status else None for kind, status in statuses.items()}
        if set(states.values()) == {"completed"}:
            return True
        for kind, state in states.items():
            if state == "failed":
                user.ask(kind)
        time.sleep(PAUSE_SECONDS)
        sweep(deployment)
    return False


def _said(status: dict[str, Any] | None) -> str:
    if status is None:
        return "503"
    error = status["error"]
    return f"{status['state']}, {error['code']}, retryable {error['retryable']}" if error else str(status["state"])


def _is_clear(status: dict[str, Any] | None) -> bool:
    if status is None or status["state"] != "failed":
        return status is None or status["state"] in ("queued", "starting", "running")
    return bool(status["error"]["message"]) and status["error"]["code"] != "internal"
