"""Doctor's questions to Cloud Run: whether executions may be started and stopped, and how the job is set up."""

import secrets
from collections.abc import Callable
from functools import cache
from urllib.parse import urlsplit

from google.api_core import exceptions as api
from google.cloud import run_v2

from dispatcher.doctor_findings import CALL_SECONDS, DENIED, FINE, Check, Group, Outcome, Verdict, Wanted, needing
from dispatcher.emulated import connected, emulator_of
from dispatcher.errors import Misconfigured
from dispatcher.google_errors import translating
from dispatcher.permissions import Resource
from dispatcher.runner import open_runner
from dispatcher.settings import Settings

_SAME = (
    *("project_id", "records_url", "artifacts_url", "tokens_url"),
    *("max_attempts", "lease_seconds", "clock_skew_seconds"),
)
"""The settings in which dispatcher and exporter have to agree: all that both go by. How long a token lives is not among
them, since only who puts it there tells Secret Manager; nor is what collects, or limits callers."""


def job_group(settings: Settings, wanted: Wanted) -> Group:
    """The checks of the job that a deployment's `run://project/region/job` names."""
    parts = urlsplit(settings.runner_url)
    region, _, short_name = parts.path.strip("/").partition("/")
    job = f"projects/{parts.netloc}/locations/{region}/jobs/{short_name}"
    runner = cache(
        lambda: open_runner(settings.runner_url, log_dir=settings.log_dir, environment=settings.to_environment())
    )

    @cache
    def client() -> run_v2.JobsClient:
        with translating(job):
            return connected(run_v2.JobsClient, emulator_of(settings.runner_url))

    def cancel() -> Verdict:
        runner().cancel(f"{short_name}-doctor-{secrets.token_hex(4)}")
        return FINE

    def check(permission: str, asks: str, probe: Callable[[], Verdict]) -> list[Check]:
        name = f"job.{permission.rpartition('.')[2]}"
        return needing(Check(name, asks, probe), wanted.grant(Resource.JOB, permission, job))

    checks = [
        *check("run.jobs.run", f"see that {job} may be run", lambda: _may(client(), job, "run.jobs.run")),
        *check(
            "run.jobs.runWithOverrides",
            "see that it may be run with arguments",
            lambda: _may(client(), job, "run.jobs.runWithOverrides"),
        ),
        *check("run.executions.cancel", f"stop an execution of {job} that is not there", cancel),
    ]
    if checks:
        checks.append(
            Check(
                "job.settings", "see that its settings are this deployment's", lambda: _set_up(client(), job, settings)
            )
        )

    def close() -> None:
        if runner.cache_info().currsize:
            runner().close()
        if client.cache_info().currsize:
            client().transport.close()

    return Group(checks, close)


def _may(client: run_v2.JobsClient, job: str, permission: str) -> Verdict:
    with translating(job):
        request = {"resource": job, "permissions": [permission]}
        answer = client.test_iam_permissions(request=request, timeout=CALL_SECONDS, retry=None)
        if permission in answer.permissions:
            return FINE
        try:
            # IAM says the same of a job that is not there.
            client.get_job(name=job, timeout=CALL_SECONDS, retry=None)
        except api.Forbidden:
            return Verdict(Outcome.MISSING, DENIED, f"{permission} is not granted on {job}, or that is not there")
    return Verdict(Outcome.MISSING, DENIED, f"{permission} is not granted on {job}")


def _set_up(client: run_v2.JobsClient, job: str, settings: Settings) -> Verdict:
    """Whether the job's exporter opens the same stores, and is tried as often as the records allow."""
    with translating(job):
        try:
            template = client.get_job(name=job, timeout=CALL_SECONDS, retry=None).template.template
        except api.Forbidden:
            message = "this needs run.jobs.get, which an operator has, and no identity of the deployment"
            return Verdict(Outcome.UNKNOWN, "not_readable", message)
    # What comes from a secret has no value here, and is none of the settings below.
    variables = {variable.name: variable.value for container in template.containers for variable in container.env}
    try:
        theirs = Settings.from_env(variables)
    except Misconfigured as error:
        return Verdict(Outcome.WRONG, "job_differs", f"its exporter cannot start: {error.message}")
    differing = [
        f"{name} is {getattr(theirs, name)!r}, and {getattr(settings, name)!r} here"
        for name in _SAME
        if getattr(theirs, name) != getattr(settings, name)
    ]
    if template.max_retries != settings.max_attempts - 1:
        expected = f"MAX_ATTEMPTS less one is {settings.max_attempts - 1}"
        differing.append(f"its maximum of retries is {template.max_retries}, and {expected}")
    if not differing:
        return FINE
    remedy = "`terraform apply` in infra/ sets it as the functions are; or point doctor at the job's own deployment"
    return Verdict(Outcome.WRONG, "job_differs", "; ".join(differing), remedy)
