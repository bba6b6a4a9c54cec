"""A whole deployment on this machine: Google's servers, the three functions, and the job that runs the exporter."""

import base64
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.cloud import storage

from dispatcher import main
from dispatcher.identity import USERINFO_HEADER
from dispatcher.runner import EXPORTER
from infra.functions import SIGNATURES
from infra.local import servers
from infra.local.cloud_run import LocalCloudRun
from infra.local.secret_manager import LocalSecretManager
from infra.local.storage import cloud_storage
from infra.local.topics import pushed, topic

PROJECT, REGION, JOB, BUCKET = "local-project", "local-region", "gemma-exporter", "local-bucket"
TOPIC = "gemma-export"
DEAD_LETTERS = f"{TOPIC}-dead-letters"
_SERVED = ("export_api", "start_export", "fail_export")


@dataclass(frozen=True)
class Function:
    """A served function."""

    url: str
    pid: int
    """Of its server, whose worker processes do the work."""


@dataclass(frozen=True)
class Cloud:
    """Where everything is, while it runs."""

    environment: dict[str, str]
    """What a deployment's process has in its environment: settings, and where the servers are."""
    functions: dict[str, Function]
    """By target."""
    run: LocalCloudRun
    secrets: LocalSecretManager
    subscription: str
    """The full name of the push subscription that starts exports."""
    logs: Path
    """One file per function, and one per execution."""
    objects: Path
    """The buckets' objects, one file each."""

    @property
    def url(self) -> str:
        """Where the HTTP function answers."""
        return self.functions["export_api"].url


@contextmanager
def local_cloud(
    directory: Path,
    *,
    settings: Mapping[str, str] | None = None,
    program: Sequence[str] = EXPORTER,
    deliveries: int = 5,
) -> Iterator[Cloud]:
    """Brings a deployment up under a directory, and down again.

    Args:
        directory: Where objects and logs lie.
        settings: Further variables for the functions and the job.
        program: What the job's image runs, with the job id as its last argument.
        deliveries: After so many a message is a dead letter.

    Raises:
        MissingServerError: A server is not on this machine.
    """
    logs, objects = directory / "logs", directory / "objects"
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        hosts = {
            "FIRESTORE_EMULATOR_HOST": stack.enter_context(servers.firestore()),
            "PUBSUB_EMULATOR_HOST": stack.enter_context(servers.pubsub()),
            "STORAGE_EMULATOR_HOST": stack.enter_context(cloud_storage(objects)),
        }
        stack.enter_context(_exported(hosts))
        _make_bucket()
        secrets = LocalSecretManager(PROJECT)
        tokens_url = f"secretmanager://{PROJECT}?emulator={stack.enter_context(secrets.serving())}"
        deployed = {
            **hosts,
            "PROJECT_ID": PROJECT,
            "GCS_EXPORT_BUCKET_NAME": BUCKET,
            "TOKENS_URL": tokens_url,
            "CLOCK_SKEW_SECONDS": "0",  # this machine has one clock
            **(settings or {}),
        }
        run = LocalCloudRun(PROJECT, REGION, JOB, log_dir=logs, environment=deployed, program=program)
        runner_url = f"run://{PROJECT}/{REGION}/{JOB}?emulator={stack.enter_context(run.serving())}"
        environment = {**_process(), **deployed, "RUNNER_URL": runner_url}

        stack.enter_context(topic(PROJECT, TOPIC))
        dead_letters = stack.enter_context(topic(PROJECT, DEAD_LETTERS))
        functions = {target: stack.enter_context(_function(target, environment, logs)) for target in _SERVED}
        starting = push_endpoint(functions["start_export"], TOPIC)
        failing = push_endpoint(functions["fail_export"], DEAD_LETTERS)
        subscription = stack.enter_context(
            pushed(PROJECT, TOPIC, starting, dead_letters=dead_letters, deliveries=deliveries)
        )
        stack.enter_context(pushed(PROJECT, DEAD_LETTERS, failing))
        yield Cloud(environment, functions, run, secrets, subscription, logs, objects)


@contextmanager
def _function(target: str, environment: Mapping[str, str], logs: Path) -> Iterator[Function]:
    """One of the dispatcher's functions, served as Cloud Run functions does."""
    source = ["--source", str(Path(main.__file__)), "--target", target, "--signature-type", SIGNATURES[target]]

    def command(port: int) -> list[str]:
        where = ["--host", servers.HOST, "--port", str(port)]
        return [sys.executable, "-m", "functions_framework", *source, *where]

    path = "/health" if SIGNATURES[target] == "http" else "/"
    log = logs / f"{target}.log"
    with servers.running(f"the function {target}", command, path=path, environment=environment, log=log) as server:
        yield Function(f"http://{servers.HOST}:{server.port}", server.pid)


def gateway_header(user: str) -> dict[str, str]:
    """The header with which API Gateway says who is calling."""
    claims = base64.urlsafe_b64encode(json.dumps({"sub": user}).encode()).decode()
    return {USERINFO_HEADER: claims}


def push_endpoint(function: Function, name: str) -> str:
    """Where a function takes a topic's raw pushes: functions-framework knows them by this form of the path."""
    return f"{function.url}/projects/{PROJECT}/topics/{name}"


def _process() -> dict[str, str]:
    """This process's own variables, without settings that lead elsewhere."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in kept if name in os.environ}


@contextmanager
def _exported(variables: Mapping[str, str]) -> Iterator[None]:
    """Google's clients in this very process look for the servers in the environment alone."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _make_bucket() -> None:
    client = storage.Client(project=PROJECT)
    bucket = client.bucket(BUCKET)
    bucket.iam_configuration.uniform_bucket_level_access_enabled = True
    client.create_bucket(bucket)
    client.close()
