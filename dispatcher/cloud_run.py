"""Executions of a Cloud Run job: `run://project/region/job`."""

import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from google.api_core import exceptions as api

from dispatcher.contract import is_job_id
from dispatcher.errors import ExportError, LaunchInDoubt, Misconfigured, Unavailable
from dispatcher.google_errors import FAULTS, translated, translating
from dispatcher.runner import Execution

if TYPE_CHECKING:
    from google.cloud import run_v2

_URL = re.compile(
    r"run://(?P<project>[a-z0-9][a-z0-9.:-]*)/(?P<region>[a-z][a-z0-9-]*)/(?P<job>[a-z][a-z0-9-]*)"
    r"(\?emulator=(?P<emulator>(127\.0\.0\.1|localhost|\[::1\]):[1-9][0-9]{0,4}))?"
)
_REFUSED = (api.BadRequest, api.Unauthorized, api.Forbidden, api.NotFound)
"""INVALID_ARGUMENT, FAILED_PRECONDITION, UNAUTHENTICATED, PERMISSION_DENIED, NOT_FOUND: nothing was started."""
_LONGEST = 300


class CloudRunRunner:
    """Starts executions of one Cloud Run job, and cancels them.

    An execution goes by its short name, the last part of the full one: that is what the exporter finds in
    CLOUD_RUN_EXECUTION and writes into its leases.

    Args:
        project: The Google Cloud project's id or number.
        region: Where the job lies.
        job: The job's short name.
        emulator: `host:port` of a local server, spoken to without TLS and without credentials.
        timeout: Seconds after which a call counts as not answered.
    """

    def __init__(
        self, project: str, region: str, job: str, *, emulator: str | None = None, timeout: float = 30.0
    ) -> None:
        self._job = f"projects/{project}/locations/{region}/jobs/{job}"
        self._what = f"the Cloud Run job {self._job}"
        self._emulator = emulator
        self._timeout = timeout
        self._clients: tuple[run_v2.JobsClient, run_v2.ExecutionsClient] | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_url(cls, url: str) -> "CloudRunRunner":
        """The runner for `run://project/region/job`, or `…?emulator=127.0.0.1:PORT`.

        Raises:
            Misconfigured: It is no such URL, or its emulator is not on this machine.
        """
        found = _URL.fullmatch(url)
        if found is None:
            expected = "run://PROJECT/REGION/JOB, or that and ?emulator=127.0.0.1:PORT for a server on this machine"
            raise Misconfigured(f"runner {url!r}: expected {expected}")
        return cls(found["project"], found["region"], found["job"], emulator=found["emulator"])

    def start(self, job_id: str, environment: Mapping[str, str], *, tasks: int = 1) -> Execution:
        if not is_job_id(job_id):  # it becomes an argument
            raise Misconfigured(f"{job_id!r} is no job id: nothing was started")
        variables = [{"name": name, "value": value} for name, value in environment.items()]
        overrides: dict[str, object] = {"container_overrides": [{"args": [job_id], "env": variables}]}
        if tasks > 1:
            overrides["task_count"] = tasks
        jobs, _ = self._connected()
        try:
            # Never tried again here: run_job has no request id, so a second call may start a second execution.
            operation = jobs.run_job(
                request={"name": self._job, "overrides": overrides}, retry=None, timeout=self._timeout
            )
        except FAULTS as error:
            raise self._not_started(error) from error
        started = operation.metadata
        if started is None or not started.name:
            raise LaunchInDoubt(f"{self._what} was started, but the answer does not name the execution")
        return Execution(started.name.rpartition("/")[2], started.log_uri)

    def cancel(self, execution: str) -> None:
        _, executions = self._connected()
        name = f"{self._job}/executions/{execution}"
        with translating(f"the Cloud Run execution {name}"):
            try:
                executions.cancel_execution(request={"name": name}, retry=None, timeout=self._timeout)
            except (api.NotFound, api.FailedPrecondition):
                return  # It was never ours, or it has ended.

    def close(self) -> None:
        with self._lock:
            clients, self._clients = self._clients, None
        for client in clients or ():
            client.transport.close()  # type: ignore[no-untyped-call]  # the library left it untyped

    def _connected(self) -> "tuple[run_v2.JobsClient, run_v2.ExecutionsClient]":
        with self._lock:
            if self._clients is None:
                with translating(self._what):
                    self._clients = _clients(self._emulator)
            return self._clients

    def _not_started(self, error: Exception) -> ExportError:
        """What a failed `run_job` means: only what Cloud Run refused in so many words has surely not been started."""
        said = str(error)[:_LONGEST]
        if isinstance(error, api.ResourceExhausted):
            return Unavailable(f"{self._what} is over a quota: {said}", code="runner_quota")
        if isinstance(error, _REFUSED):
            return translated(error, self._what)
        return LaunchInDoubt(
            f"{self._what} was asked to run, and nobody knows whether it does: {said}. "
            "It is asked again when the lease of this launch has run out"
        )


def _clients(emulator: str | None) -> "tuple[run_v2.JobsClient, run_v2.ExecutionsClient]":
    # Here and not above: it takes longer than all the rest of a cold start, and few requests start anything.
    from google.cloud import run_v2

    from dispatcher.emulated import connected

    return connected(run_v2.JobsClient, emulator), connected(run_v2.ExecutionsClient, emulator)
