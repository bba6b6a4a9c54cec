"""An exporter that is told to stop while a server that it waits for says nothing."""

import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dispatcher.bootstrap import build
from dispatcher.contract import State
from dispatcher.settings import Settings
from infra.local.hub_state import TOKEN
from tests.bench.deployment import Deployment
from tests.bench.servers import noted_servers

JOB_ID = "silenced"
LIMIT_SECONDS = 30.0
TRY_AGAIN = 75


@dataclass(frozen=True)
class SilentCase:
    """Which requests are not answered any more, and what the exporter is told then."""

    name: str
    server: str
    """`hub`: itself; `storage`: where it sends weights from; `bucket`"""
    request: str
    """A part of their method and target"""
    is_cancelled: bool = False


CASES = (
    SilentCase("SIGTERM, the hub tells nothing of the model", "hub", "GET /api/models/"),
    SilentCase("SIGTERM, the hub sends no weights", "storage", "GET /"),
    SilentCase("SIGTERM, the bucket lists nothing", "bucket", "GET /storage/v1/b/bench-bucket/o?"),
    SilentCase("SIGTERM, the bucket takes no files", "bucket", "/upload/storage/"),
    SilentCase("cancelled, the hub sends no weights", "storage", "GET /", is_cancelled=True),
    SilentCase("cancelled, the hub tells nothing of the model", "hub", "GET /api/models/", is_cancelled=True),
)


@dataclass
class Silenced:
    """What came of one."""

    name: str
    is_cancelled: bool
    seconds: float = LIMIT_SECONDS
    """Until the process had ended; it was killed where that is the limit"""
    faults: list[str] = field(default_factory=list)


class _Silence:
    """Holds what is asked of a server from some request on, until it is lifted."""

    def __init__(self, request: str) -> None:
        self._request = request
        self.reached = threading.Event()
        self.lifted = threading.Event()

    def __call__(self, method: str, target: str) -> None:
        if self._request in f"{method} {target}":
            self.reached.set()
            self.lifted.wait()


def stopped_in_silence(root: Path, base: Path, adapter: Path, case: SilentCase) -> Silenced:
    """Run `python -m exporter` between hub and bucket, and stop it when it has waited in vain for half a second.

    Args:
        root: Where objects, records and logs are.
        base: The base's directory.
        adapter: The adapter's.
        case: What does not answer.
    """
    found = Silenced(case.name, case.is_cancelled)
    silence = _Silence(case.request)
    with noted_servers(base, root / "objects", secret=TOKEN) as servers:
        servers.hub.gated = True
        deployment = Deployment(root, servers.hub.url, servers.storage.url, adapter)
        deployment.submit(JOB_ID, TOKEN)
        if case.server == "bucket":
            servers.storage.before = lambda request: silence(request.method, request.target)
        else:
            servers.hub.before = lambda seen: silence(seen.method, seen.target) if seen.host == case.server else None
        process = deployment.start(JOB_ID)
        try:
            if not silence.reached.wait(LIMIT_SECONDS):
                raise RuntimeError(f"{case.name}: nothing was asked: {deployment.said(JOB_ID)[-500:]}")
            time.sleep(0.5)
            began = time.monotonic()
            if case.is_cancelled:
                _cancel(deployment, root)
            else:
                process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LIMIT_SECONDS)
            found.seconds = time.monotonic() - began
        finally:
            silence.lifted.set()
            process.kill()
            status = process.wait()
        record = deployment.record(JOB_ID)
        state = State.CANCELLED if case.is_cancelled else State.QUEUED
        if (record.state, record.lease) != (state, None):
            found.faults.append(f"{case.name}: {record.export_id} is {record.state}, lease {record.lease}")
        if not case.is_cancelled and status != TRY_AGAIN:
            found.faults.append(f"{case.name}: it ended with {status}")
        if case.is_cancelled:
            found.faults += [f"{case.name}: {name}" for name in deployment.objects("merged_models/")]
            return found
        if deployment.start(JOB_ID, attempt=1).wait() or deployment.record(JOB_ID).state is not State.COMPLETED:
            found.faults.append(f"{case.name}: not completed: {deployment.said(JOB_ID, attempt=1)[-500:]}")
    return found


def _cancel(deployment: Deployment, root: Path) -> None:
    """As its owner does; embedded, since what counts is the record."""
    settings = {"GEMMA_EXPORT_HOME": str(root)}
    stack = build(Settings.from_env(settings))
    try:
        stack.service.cancel(f"{JOB_ID}.merged", deployment.record(JOB_ID).user_id)
    finally:
        stack.close()
