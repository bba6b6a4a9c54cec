"""What the Cloud Run runner makes of every answer, spoken over the wire with the local server."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.cloud import run_v2
from google.cloud.run_v2.services.executions.transports import ExecutionsGrpcTransport

from dispatcher.artifacts import path_of
from dispatcher.cloud_run import CloudRunRunner
from dispatcher.errors import ExportError, LaunchInDoubt, Misconfigured, Unavailable
from dispatcher.runner import open_runner
from infra.local.cloud_run import LocalCloudRun
from tests.waiting import until

JOB = "projects/project/locations/region/jobs/exporter"
DUMPS_ENVIRONMENT = "import json, os; os.write(1, json.dumps(dict(os.environ)).encode() + b'\\n')"
WAITS = "import signal; print('ready', flush=True); signal.pause()"
DEFINITE: dict[grpc.StatusCode, tuple[type[ExportError], str]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (Misconfigured, "call_refused"),
    grpc.StatusCode.FAILED_PRECONDITION: (Misconfigured, "call_refused"),
    grpc.StatusCode.OUT_OF_RANGE: (Misconfigured, "call_refused"),
    grpc.StatusCode.NOT_FOUND: (Misconfigured, "resource_missing"),
    grpc.StatusCode.PERMISSION_DENIED: (Misconfigured, "permission_denied"),
    grpc.StatusCode.UNAUTHENTICATED: (Misconfigured, "permission_denied"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (Unavailable, "runner_quota"),
}
FAILURES = [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK]


@contextmanager
def runner_at(address: str, *, job: str = "exporter", timeout: float = 30) -> Iterator[CloudRunRunner]:
    runner = CloudRunRunner("project", "region", job, emulator=address, timeout=timeout)
    try:
        yield runner
    finally:
        runner.close()


def served(tmp_path: Path, program: str) -> LocalCloudRun:
    return LocalCloudRun(
        "project",
        "region",
        "exporter",
        log_dir=tmp_path / "logs",
        environment={"STORE": "here"},
        program=(sys.executable, "-c", program),
        retry_delay=0.001,
    )


@pytest.fixture
def cloud(tmp_path: Path) -> LocalCloudRun:
    """Its program prints the environment it finds."""
    return served(tmp_path, DUMPS_ENVIRONMENT)


@pytest.fixture
def runner(cloud: LocalCloudRun) -> Iterator[CloudRunRunner]:
    with cloud.serving() as address, runner_at(address) as runner:
        yield runner


def test_the_job_is_asked_to_run_with_overrides_alone(cloud: LocalCloudRun, runner: CloudRunRunner) -> None:
    """One argument and the launch's variables: what is stored with the execution for days."""
    execution = runner.start("job-1", {"EXPORT_ID": "job-1.merged", "LEASE_ID": "lease"})
    variables = [{"name": "EXPORT_ID", "value": "job-1.merged"}, {"name": "LEASE_ID", "value": "lease"}]
    overrides = {"container_overrides": [{"args": ["job-1"], "env": variables}]}
    assert cloud.requests == [run_v2.RunJobRequest(name=JOB, overrides=overrides)]
    assert cloud.executions == [execution.name]


def test_a_task_finds_what_cloud_run_would_give_it(
    cloud: LocalCloudRun, runner: CloudRunRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's, the template's and the overrides' variables, and nothing of the server's own."""
    monkeypatch.setenv("SERVERS_OWN", "secret")
    execution = runner.start("job", {"LEASE_ID": "lease"})
    assert cloud.wait(execution.name, 60) == 0
    found = json.loads(path_of(execution.log_uri).read_text())
    expected = {
        "STORE": "here",
        "LEASE_ID": "lease",
        "CLOUD_RUN_JOB": "exporter",
        "CLOUD_RUN_EXECUTION": execution.name,
        "CLOUD_RUN_TASK_INDEX": "0",
        "CLOUD_RUN_TASK_COUNT": "1",
        "CLOUD_RUN_TASK_ATTEMPT": "0",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "SERVERS_OWN" not in found


def test_several_tasks_are_an_override_too(cloud: LocalCloudRun, runner: CloudRunRunner) -> None:
    """The template's count holds where one is enough."""
    execution = runner.start("job", {}, tasks=3)
    assert cloud.wait(execution.name, 60) == 0
    assert [request.overrides.task_count for request in cloud.requests] == [3]
    lines = [json.loads(line) for line in path_of(execution.log_uri).read_text().splitlines()]
    assert sorted(line["CLOUD_RUN_TASK_INDEX"] for line in lines) == ["0", "1", "2"]
    assert {line["CLOUD_RUN_TASK_COUNT"] for line in lines} == {"3"}
    with pytest.raises(Misconfigured):
        runner.start("job", {}, tasks=10_001)


def test_cloud_run_tries_even_a_verdict_again(tmp_path: Path) -> None:
    """Any exit code but 0: it does not know that 1 is final, so the exporter has to say so again."""
    cloud = served(tmp_path, "import os, sys; print(os.environ['CLOUD_RUN_TASK_ATTEMPT'], flush=True); sys.exit(1)")
    with cloud.serving() as address, runner_at(address) as runner:
        execution = runner.start("job", {})
        assert cloud.wait(execution.name, 60) == 1
    assert path_of(execution.log_uri).read_text().split() == ["0", "1", "2", "3"]


@pytest.mark.parametrize("status", FAILURES, ids=lambda status: status.name.lower())
def test_only_what_surely_started_nothing_is_definite(
    cloud: LocalCloudRun, runner: CloudRunRunner, status: grpc.StatusCode
) -> None:
    """Any other failure leaves a doubt; and whatever the answer, the client asks once."""
    cloud.refuse(status)
    with pytest.raises(ExportError) as error:
        runner.start("job", {})
    kind, code = DEFINITE.get(status, (LaunchInDoubt, "launch_in_doubt"))
    assert (type(error.value), error.value.error_code) == (kind, code)
    assert JOB in error.value.message
    assert len(cloud.requests) == 1


def test_a_lost_answer_is_a_launch_in_doubt(cloud: LocalCloudRun, runner: CloudRunRunner) -> None:
    """It was started, nobody was told, and nothing is started beside it."""
    cloud.lose_answers()
    with pytest.raises(LaunchInDoubt):
        runner.start("job", {})
    assert (len(cloud.executions), len(cloud.requests)) == (1, 1)


def test_an_answer_that_takes_too_long_is_a_launch_in_doubt(cloud: LocalCloudRun) -> None:
    """The caller does not wait for ever; this one was held before anything was started."""
    with cloud.serving() as address, runner_at(address, timeout=0.2) as runner:
        cloud.gate.clear()
        with pytest.raises(LaunchInDoubt):
            runner.start("job", {})
    assert (len(cloud.executions), len(cloud.requests)) == (0, 1)


def test_a_held_call_starts_when_it_is_let_through(cloud: LocalCloudRun, runner: CloudRunRunner) -> None:
    """Nothing before that: here is where a dispatcher can be killed between its lease and the start."""
    cloud.gate.clear()
    thread = threading.Thread(target=runner.start, args=("job", {}))
    thread.start()
    until(lambda: cloud.requests, "the call to arrive")
    assert cloud.executions == []
    cloud.gate.set()
    thread.join(60)
    assert len(cloud.executions) == 1


def test_a_job_that_does_not_exist_is_the_operators_to_mend(cloud: LocalCloudRun) -> None:
    """The message names it."""
    refused = pytest.raises(Misconfigured, match="jobs/other does not exist")
    with cloud.serving() as address, runner_at(address, job="other") as runner, refused as error:
        runner.start("job", {})
    assert error.value.error_code == "resource_missing"


def test_without_credentials_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A definite refusal: nobody was asked."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    runner = open_runner("run://project/region/exporter", log_dir=tmp_path, environment={})
    for ask in (lambda: runner.start("job", {}), lambda: runner.cancel("execution")):
        with pytest.raises(Misconfigured) as error:
            ask()
        assert error.value.error_code == "no_credentials"


def test_an_execution_is_cancelled_by_its_short_name(tmp_path: Path) -> None:
    """The full one is composed here, since records and leases hold the short one."""
    cloud = served(tmp_path, WAITS)
    with cloud.serving() as address, runner_at(address) as runner:
        execution = runner.start("job", {}, tasks=2)
        until(lambda: path_of(execution.log_uri).read_text().count("ready") == 2, "both tasks to be ready")
        runner.cancel(execution.name)
        assert cloud.wait(execution.name, 60) is not None
        full_name = f"{JOB}/executions/{execution.name}"
        assert cloud.requests[1:] == [run_v2.CancelExecutionRequest(name=full_name)]
        client = run_v2.ExecutionsClient(transport=ExecutionsGrpcTransport(channel=grpc.insecure_channel(address)))
        with client:
            found = client.get_execution(name=full_name)
    assert (found.name, found.task_count, found.running_count, found.cancelled_count) == (full_name, 2, 0, 2)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(grpc.StatusCode.UNAVAILABLE, Unavailable), (grpc.StatusCode.PERMISSION_DENIED, Misconfigured)],
    ids=["unavailable", "permission_denied"],
)
def test_a_cancellation_that_was_not_heard_is_said(
    cloud: LocalCloudRun, runner: CloudRunRunner, status: grpc.StatusCode, kind: type[ExportError]
) -> None:
    """Only an execution that has ended, or that nobody knows, needs none."""
    cloud.refuse(status)
    with pytest.raises(kind, match="executions/e-1"):
        runner.cancel("e-1")


def test_the_server_ends_what_it_started(tmp_path: Path) -> None:
    """No test and no demo leaves a process behind."""
    cloud = served(tmp_path, WAITS)
    with cloud.serving() as address, runner_at(address) as runner:
        execution = runner.start("job", {})
        until(lambda: path_of(execution.log_uri).read_text(), "the program to be ready")
        assert cloud.wait(execution.name, 0) is None
    assert cloud.wait(execution.name, 0) is not None


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "project",
        "project/region",
        "project/region/",
        "project/region/job/more",
        "project/region/job?timeout=3",
        "project/region/job?emulator=",
        "project/region/job?emulator=127.0.0.1",
        "project/region/job?emulator=127.0.0.1:http",
        "project/region/job?emulator=run.example.com:80",
        "project/region/job?emulator=127.0.0.1.example.com:80",
        "project/region/job?emulator=127.0.0.1:80@example.com:80",
        "project/region/job#x",
        "project/region/job\n",
        "pro ject/region/job",
        "project/../job",
    ],
)
def test_a_url_that_names_no_job_is_refused(tmp_path: Path, rest: str) -> None:
    """It says what is expected; and nobody can turn the calls to another machine by an emulator's address."""
    with pytest.raises(Misconfigured, match="expected run://PROJECT/REGION/JOB"):
        open_runner(f"run://{rest}", log_dir=tmp_path, environment={})


@pytest.mark.parametrize(
    "url",
    [
        "run://project-1/us-central1/gemma-exporter",
        "run://example.com:project/europe-west4/job",
        "run://project/region/job?emulator=127.0.0.1:8080",
        "run://project/region/job?emulator=localhost:1",
        "run://project/region/job?emulator=[::1]:65535",
    ],
)
def test_a_url_that_names_a_job_opens_its_runner(tmp_path: Path, url: str) -> None:
    """Projects of a domain have a colon; an emulator is on this machine."""
    assert isinstance(open_runner(url, log_dir=tmp_path, environment={}), CloudRunRunner)


def test_only_a_start_imports_googles_client() -> None:
    """In a fresh interpreter: a dispatcher that starts nothing must not wait for that import."""
    program = (
        "import sys, pathlib\n"
        "import dispatcher.main\n"
        "from dispatcher.runner import open_runner\n"
        "url = 'run://project/region/job?emulator=127.0.0.1:1'\n"
        "runner = open_runner(url, log_dir=pathlib.Path(), environment={})\n"
        "print('google.cloud.run_v2' in sys.modules)\n"
        "try: runner.start('job', {})\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print('google.cloud.run_v2' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "LaunchInDoubt", "True"]
