"""Requests made from the OpenAPI document, by schemathesis, against a dispatcher that has exports in every state.

What is real: the HTTP server, functions-framework, the stores on disk, and the check of the callers' JWTs. Before it
stands what the API Gateway does with a token, and between the requests somebody works on what was asked for.
"""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dispatcher import bootstrap
from dispatcher.contract import State
from dispatcher.identity import USERINFO_HEADER
from dispatcher.openapi import document
from dispatcher.serve import local_app, open_server
from dispatcher.settings import Settings
from infra.local.servers import HOST, in_thread
from tests.dispatcher.issuer import published, signed
from tests.dispatcher.server import stack_of
from tests.dispatcher.world import World

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

REQUESTS_A_TURN = 5
_USERINFO = f"HTTP_{USERINFO_HEADER.upper().replace('-', '_')}"


@dataclass(frozen=True)
class Conformance:
    """What came of the requests."""

    statuses: dict[int, int]
    """How many answers had each status, by the server's own count."""
    contradictions: list[str]
    """Check and operation of each answer that is not as the document says."""
    errors: list[str]
    """What kept schemathesis from testing."""
    report: str
    """What it printed."""

    @property
    def requests(self) -> int:
        return sum(self.statuses.values())

    @property
    def faults(self) -> int:
        """Answers of 500 and above."""
        return sum(number for status, number in self.statuses.items() if status >= 500)


@dataclass
class _Gateway:
    """Names the caller by the token's own claims, as API Gateway does after its check; the dispatcher checks again.

    Source: https://cloud.google.com/api-gateway/docs/authenticating-users-jwt#receiving_authentication_results_in_your_api
    """

    app: "WSGIApplication"
    world: World
    statuses: Counter[int] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        environ.pop(_USERINFO, None)
        parts = str(environ.get("HTTP_AUTHORIZATION", "")).split(".")
        if len(parts) == 3:
            environ[_USERINFO] = parts[1]

        def counted(status: str, *rest: Any) -> Any:
            with self.lock:
                self.statuses[int(status.split()[0])] += 1
                if self.statuses.total() % REQUESTS_A_TURN == 0:
                    _work(self.world, self.statuses.total() // REQUESTS_A_TURN)
            return start_response(status, *rest)

        return self.app(environ, counted)


def run(root: Path, *, examples: int, seconds: int, seed: int = 1) -> Conformance:
    """Let schemathesis ask all that it can think of.

    Args:
        root: Where the dispatcher's stores and the report lie.
        examples: At most this many a phase and operation.
        seconds: At most this long; what is under way then is finished.
    """
    world = World(root / "home", max_unfinished_per_user=6)
    jobs, exports = _in_every_state(world)
    (root / "openapi.json").write_text(json.dumps(document()))
    try:
        with _served(world) as (url, token, statuses):
            (root / "schemathesis.toml").write_text(_settings(token, jobs, exports))
            report = root / "report.json"
            command = [str(Path(sys.executable).with_name("schemathesis"))]
            command += ["--config-file", str(root / "schemathesis.toml"), "run", str(root / "openapi.json")]
            command += ["--url", url, "--seed", str(seed), "--max-examples", str(examples)]
            command += ["--max-time", str(seconds), "--report", "json", "--report-json-path", str(report)]
            command += ["--continue-on-failure", "--no-color"]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=seconds + 120)
        found: dict[str, Any] = {"failures": [], "errors": [done.stderr]}
        if report.exists():
            found = json.loads(report.read_text())
    finally:
        world.close()
    faults: list[dict[str, Any]] = found["failures"]
    contradictions = [f"{fault['title']}: {', '.join(map(str, fault['operations']))}" for fault in faults]
    return Conformance(dict(statuses), contradictions, [str(error) for error in found["errors"]], done.stdout)


@contextmanager
def _served(world: World) -> Iterator[tuple[str, str, Counter[int]]]:
    """The URL, a caller's token, and the count of answers by status."""
    with published() as issuer:
        environ = {"GEMMA_EXPORT_HOME": str(world.home), **issuer.environment()}
        bootstrap.install(stack_of(world, Settings.from_env(environ)))
        gateway = _Gateway(local_app(None), world)
        server = open_server(gateway, 0)
        try:
            with in_thread(server):
                yield f"http://{HOST}:{server.server_port}", signed(exp=int(time.time()) + 3600), gateway.statuses
        finally:
            server.server_close()
            bootstrap.install(None)


def _in_every_state(world: World) -> tuple[list[str], list[str]]:
    """Jobs and exports of ann's in every state, and some that are not hers; the ids of both."""
    for job_id in ("new", "queued", "starting", "running", "done", "failed", "passing", "cancelled", "dotted."):
        world.job(job_id)
    world.job("bobs", user="bob")
    world.job("gone", adapter_path="/nowhere")
    world.submit("bobs", user="bob")
    world.submit("done", export_type="adapter")
    for job_id in ("starting", "running", "done", "failed", "passing"):
        export_id = world.launched(job_id).export_id
        if job_id != "starting":
            world.claim(export_id)
    world.complete("done.merged")
    world.fail("failed.merged")
    world.fail("passing.merged", retryable=True)
    world.submit("done", export_type="gguf", quantization="q4_k_m")
    world.queue.deliver_all(world.trigger)
    world.claim("done.gguf.q4_k_m")
    world.complete("done.gguf.q4_k_m")
    world.submit("cancelled")
    world.service.cancel("cancelled.merged", "ann")
    world.submit("queued")
    jobs = ["new", "queued", "starting", "running", "done", "failed", "passing", "cancelled", "dotted.", "bobs", "gone"]
    exports = [record.export_id for record in world.records.list_exports()]
    return jobs, [*exports, "new.merged", "dotted..merged", "new.gguf.q8_0"]


def _work(world: World, turn: int) -> None:
    """What the exporters do meanwhile: one step of one export of each kind."""
    world.queue.deliver_all(world.trigger)
    for record in world.records.list_exports(states={State.RUNNING}, limit=1):
        world.complete(record.export_id) if turn % 3 else world.fail(record.export_id, retryable=turn % 2 == 0)
    for record in world.records.list_exports(states={State.STARTING}, limit=1):
        world.claim(record.export_id)


def _settings(token: str, jobs: list[str], exports: list[str]) -> str:
    """How it goes about it; most ids are those of something, or all answers would be 404.

    Source: https://schemathesis.readthedocs.io/en/stable/reference/configuration/
    """
    return "\n".join(
        [
            "[generation]",
            'database = "none"',
            "[auth.openapi.bearer]",
            f"bearer = {json.dumps(token)}",
            "[dictionaries.jobs]",
            f"values = {json.dumps(jobs)}",
            "[dictionaries.exports]",
            f"values = {json.dumps(exports)}",
            "[parameters]",
            '"body.job_id" = {dictionary = "jobs", probability = 0.8}',
            '"query.job_id" = {dictionary = "jobs", probability = 0.5}',
            '"query.after" = {dictionary = "exports", probability = 0.5}',
            '"path.export_id" = {dictionary = "exports", probability = 0.8}',
        ]
    )
