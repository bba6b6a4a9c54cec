"""Cloud Run Jobs on this machine: a server that speaks the API's own gRPC and runs executions as processes."""

import os
import secrets
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.cloud import run_v2
from google.iam.v1 import iam_policy_pb2
from google.longrunning import operations_pb2

from dispatcher.errors import Unavailable
from dispatcher.runner import EXPORTER, Execution, ProcessRunner
from infra.local.rpc import abort, deny, method, serving
from infra.local.servers import STOP_SECONDS

IMAGE_VARIABLES = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH")
"""All that a task gets of this process's environment; in the cloud its container image brings these."""
MAX_TASKS = 10_000
"""https://cloud.google.com/run/quotas"""
_LOOK_SECONDS = 0.05
"""How often a held call looks whether its caller is still there."""

Request = run_v2.RunJobRequest | run_v2.GetJobRequest | run_v2.CancelExecutionRequest | run_v2.GetExecutionRequest
"""Besides `iam_policy_pb2.TestIamPermissionsRequest`, which has no type."""


class LocalCloudRun:
    """One Cloud Run job and its executions.

    A task gets the variables of its image, of the job's template and of the overrides, and nothing else. Like Cloud
    Run, it is started again after any exit code but 0. The template has one task and no arguments; operations are not
    stored, and a cancelled task that ignores SIGTERM goes on until the server is closed.

    Args:
        project, region, job: The names the job goes by; any other is NOT_FOUND.
        log_dir: One log file per execution lies here; its `log_uri` names it.
        environment: The variables of the job's template.
        program: What the image runs.
        max_retries: How often a failed task is started again.
        retry_delay: Seconds before the first retry; it doubles each time.
        parallelism: How many tasks of an execution run at a time, the others after them, as under a quota; None is all.
    """

    def __init__(
        self,
        project: str,
        region: str,
        job: str,
        *,
        log_dir: Path,
        environment: Mapping[str, str],
        program: Sequence[str] = EXPORTER,
        max_retries: int = 3,
        retry_delay: float = 0.1,
        parallelism: int | None = None,
    ) -> None:
        self.job = f"projects/{project}/locations/{region}/jobs/{job}"
        self.requests: list[Request] = []
        """Every request received, whatever became of it."""
        self.gate = threading.Event()
        """While it is cleared, RunJob waits before it starts anything; whoever has hung up by then gets nothing."""
        self.hung_up = threading.Event()
        """Set when a caller of RunJob has hung up before anything was started."""
        self.gate.set()
        self.denied: set[str] = set()
        """The permissions that callers lack."""
        self._short_name = job
        self._max_retries = max_retries
        self._variables = dict(environment)
        image = {name: os.environ[name] for name in IMAGE_VARIABLES if name in os.environ}
        self._processes = ProcessRunner(
            log_dir,
            {**image, "CLOUD_RUN_JOB": job, **environment},
            max_retries=max_retries,
            retry_delay=retry_delay,
            program=program,
            final_codes=(0,),
            inherits=False,
            parallelism=parallelism,
        )
        self._refusals: deque[grpc.StatusCode] = deque()
        self._answers_to_lose = 0
        self._executions: dict[str, Execution] = {}
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()

    @property
    def executions(self) -> list[str]:
        """The short names of all executions, in the order of their start."""
        with self._lock:
            return list(self._executions)

    def refuse(self, status: grpc.StatusCode, times: int = 1) -> None:
        """Answer the next calls, of whatever method, with this status and do nothing."""
        with self._lock:
            self._refusals.extend([status] * times)

    def heal(self) -> None:
        """Forget what was to be refused."""
        with self._lock:
            self._refusals.clear()

    def lose_answers(self, times: int = 1) -> None:
        """Do what the next RunJob calls ask for, and then answer UNAVAILABLE."""
        with self._lock:
            self._answers_to_lose += times

    def wait(self, execution: str, timeout: float | None = None) -> int | None:
        """The exit code of an execution, as `ProcessRunner.wait`; None when it has not ended in `timeout` seconds."""
        return self._processes.wait(execution, timeout)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Listen on a free port and yield `host:port`; at the end, end every execution too."""
        try:
            with serving(*self._services()) as address:
                yield address
        finally:
            # Only now: until the server's threads had ended, a call could still be starting its process.
            self.gate.set()
            self._processes.end(grace=STOP_SECONDS)

    def _services(self) -> tuple[grpc.GenericRpcHandler, ...]:
        operation = operations_pb2.Operation.SerializeToString
        jobs = {
            "RunJob": method(self._run_job, run_v2.RunJobRequest, operation),
            "GetJob": method(self._get_job, run_v2.GetJobRequest, run_v2.Job.serialize),
            "TestIamPermissions": grpc.unary_unary_rpc_method_handler(
                self._test_permissions,
                request_deserializer=iam_policy_pb2.TestIamPermissionsRequest.FromString,
                response_serializer=iam_policy_pb2.TestIamPermissionsResponse.SerializeToString,
            ),
        }
        executions = {
            "CancelExecution": method(self._cancel, run_v2.CancelExecutionRequest, operation),
            "GetExecution": method(self._get, run_v2.GetExecutionRequest, run_v2.Execution.serialize),
        }
        return (
            grpc.method_handlers_generic_handler("google.cloud.run.v2.Jobs", jobs),
            grpc.method_handlers_generic_handler("google.cloud.run.v2.Executions", executions),
        )

    def _run_job(self, request: run_v2.RunJobRequest, context: grpc.ServicerContext) -> operations_pb2.Operation:
        overridden = ["run.jobs.runWithOverrides"] if "overrides" in request else []
        self._receive(request, context, "run.jobs.run", *overridden)
        self._of_the_job(request.name, context)
        overrides = list(request.overrides.container_overrides)
        if len(overrides) > 1:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "The job has one container.")
        if not 0 <= request.overrides.task_count <= MAX_TASKS:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"The task count must be from 1 to {MAX_TASKS}.")
        while not self.gate.wait(_LOOK_SECONDS) and context.is_active():
            pass
        if not context.is_active():
            self.hung_up.set()
            abort(context, grpc.StatusCode.CANCELLED, "The caller hung up before anything was started.")
        arguments = [argument for override in overrides for argument in override.args]
        variables = {variable.name: variable.value for override in overrides for variable in override.env}
        name = f"{self._short_name}-{secrets.token_hex(4)}"
        try:
            started = self._processes.execute(name, arguments, variables, tasks=request.overrides.task_count or 1)
        except Unavailable as error:
            abort(context, grpc.StatusCode.INTERNAL, error.message)
        with self._lock:
            self._executions[name] = started
            lost = self._answers_to_lose > 0
            self._answers_to_lose -= lost
        if lost:
            abort(context, grpc.StatusCode.UNAVAILABLE, "The answer was lost.")
        return self._operation(name)

    def _get_job(self, request: run_v2.GetJobRequest, context: grpc.ServicerContext) -> run_v2.Job:
        self._receive(request, context, "run.jobs.get")
        self._of_the_job(request.name, context)
        variables = [run_v2.EnvVar(name=name, value=value) for name, value in self._variables.items()]
        task = run_v2.TaskTemplate(containers=[run_v2.Container(env=variables)], max_retries=self._max_retries)
        return run_v2.Job(name=self.job, template=run_v2.ExecutionTemplate(task_count=1, template=task))

    def _test_permissions(
        self, request: iam_policy_pb2.TestIamPermissionsRequest, context: grpc.ServicerContext
    ) -> iam_policy_pb2.TestIamPermissionsResponse:
        self._receive(request, context)
        # Of what is not there, IAM says that nobody may do anything with it.
        held = set(request.permissions) - self.denied if request.resource == self.job else set()
        return iam_policy_pb2.TestIamPermissionsResponse(permissions=sorted(held))

    def _cancel(
        self, request: run_v2.CancelExecutionRequest, context: grpc.ServicerContext
    ) -> operations_pb2.Operation:
        self._receive(request, context, "run.executions.cancel")
        name = self._known(request.name, context)
        if self.wait(name, 0) is not None:
            abort(context, grpc.StatusCode.FAILED_PRECONDITION, "The execution has ended.")
        with self._lock:
            self._cancelled.add(name)
        self._processes.cancel(name)
        return self._operation(name)

    def _get(self, request: run_v2.GetExecutionRequest, context: grpc.ServicerContext) -> run_v2.Execution:
        self._receive(request, context, "run.executions.get")
        return self._described(self._known(request.name, context))

    def _of_the_job(self, name: str, context: grpc.ServicerContext) -> None:
        if name != self.job:
            abort(context, grpc.StatusCode.NOT_FOUND, f"Resource '{name}' of kind 'JOB' does not exist.")

    def _receive(self, request: Request, context: grpc.ServicerContext, *permissions: str) -> None:
        """Note a call, and refuse it if it is to be refused, or if its caller lacks a permission."""
        with self._lock:
            self.requests.append(request)
            refusal = self._refusals.popleft() if self._refusals else None
        if refusal is not None:
            abort(context, refusal, "Refused, as a test wants it.")
        for permission in sorted(self.denied.intersection(permissions)):
            deny(context, permission, self.job)

    def _known(self, full_name: str, context: grpc.ServicerContext) -> str:
        parent, _, name = full_name.rpartition("/executions/")
        with self._lock:
            known = parent == self.job and name in self._executions
        if not known:
            abort(context, grpc.StatusCode.NOT_FOUND, f"Resource '{full_name}' of kind 'EXECUTION' does not exist.")
        return name

    def _operation(self, name: str) -> operations_pb2.Operation:
        parent = self.job.rpartition("/jobs/")[0]
        operation = operations_pb2.Operation(name=f"{parent}/operations/{secrets.token_hex(8)}")
        operation.metadata.Pack(run_v2.Execution.pb(self._described(name)))
        return operation

    def _described(self, name: str) -> run_v2.Execution:
        codes = self._processes.exit_codes(name)
        with self._lock:
            started, cancelled = self._executions[name], name in self._cancelled
        succeeded = codes.count(0)
        running = codes.count(None)
        failed = len(codes) - succeeded - running
        return run_v2.Execution(
            name=f"{self.job}/executions/{name}",
            log_uri=started.log_uri,
            task_count=len(codes),
            running_count=running,
            succeeded_count=succeeded,
            failed_count=0 if cancelled else failed,
            cancelled_count=failed if cancelled else 0,
        )
