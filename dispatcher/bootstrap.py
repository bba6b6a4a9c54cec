"""The one place where the dispatcher's parts are wired together, once per process and on first use."""

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from dispatcher import logs
from dispatcher.artifacts import ArtifactStore, open_artifacts
from dispatcher.collector import Collector
from dispatcher.jobqueue import JobQueue, open_queue
from dispatcher.lifecycle import LAUNCH_GRACE_SECONDS
from dispatcher.records import RecordStore, open_records
from dispatcher.runner import JobRunner, open_runner
from dispatcher.service import Service
from dispatcher.settings import Settings
from dispatcher.tokens import TokenStore, open_tokens
from dispatcher.trigger import Trigger

ANSWER_SECONDS = 5.0
"""How long an HTTP answer waits for a bucket; the caller is told to ask again then."""


@dataclass(frozen=True)
class Stack:
    """Everything a process needs, opened by the settings it was given."""

    settings: Settings
    records: RecordStore
    artifacts: ArtifactStore
    tokens: TokenStore
    queue: JobQueue
    runner: JobRunner
    trigger: Trigger
    service: Service

    @property
    def collector(self) -> Collector:
        """What removes older versions and abandoned attempts from these stores."""
        return Collector(self.records, self.artifacts, after=timedelta(seconds=self.settings.collect_after_seconds))

    def close(self) -> None:
        """Let the queue deliver what is due, and release what is open; started executions go on."""
        self.queue.close()
        self.runner.close()
        self.records.close()


def build(settings: Settings) -> Stack:
    """Open every port that the settings name.

    Raises:
        Misconfigured: A URL selects what this build does not have.
    """

    def deliver(body: bytes, attributes: Mapping[str, str]) -> None:
        # The queue is made before the trigger that it delivers to, and gets its first message after.
        trigger.deliver(body, attributes)

    records = open_records(settings.records_url)
    artifacts = open_artifacts(
        settings.artifacts_url, signing_account=settings.signing_account, patience=ANSWER_SECONDS
    )
    tokens = open_tokens(settings.tokens_url, ttl_seconds=settings.token_ttl_seconds)
    runner = open_runner(settings.runner_url, log_dir=settings.log_dir, environment=settings.to_environment())
    queue = open_queue(settings.queue_url, deliver)
    trigger = Trigger(
        records=records,
        queue=queue,
        runner=runner,
        lease_seconds=settings.lease_seconds + settings.clock_skew_seconds,
        max_attempts=settings.max_attempts,
        launch_grace_seconds=0 if settings.embedded else LAUNCH_GRACE_SECONDS,
        several_tasks=not settings.embedded,
    )
    service = Service(
        records=records,
        artifacts=artifacts,
        runner=runner,
        tokens=tokens,
        trigger=trigger,
        max_unfinished_per_user=settings.max_unfinished_per_user,
        download_url_seconds=settings.download_url_seconds,
    )
    return Stack(settings, records, artifacts, tokens, queue, runner, trigger, service)


_lock = threading.Lock()
_installed: list[Stack] = []


def install(stack: Stack | None) -> None:
    """Make `current` return this stack; None makes it build one from the environment again."""
    with _lock:
        _installed[:] = [] if stack is None else [stack]


def current() -> Stack:
    """This process's stack. functions-framework loads `main.py` as a second module, so it cannot keep it."""
    with _lock:
        if not _installed:
            _configure_logs(None)  # so that a setting that cannot be meant is logged like anything else
            settings = Settings.from_env()
            _configure_logs(settings.project_id)
            _installed.append(build(settings))
        return _installed[0]


def _configure_logs(project_id: str | None) -> None:
    logs.configure(sys.stdout, {"service": "dispatcher"}, project_id=project_id)
