"""A deployment for doctor to look at: every server on this machine, each able to refuse."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from google.cloud import firestore, storage

from dispatcher.doctor import groups
from dispatcher.doctor_examination import END_SECONDS, RUN_SECONDS, Examination
from dispatcher.doctor_findings import Finding, Group, Outcome, Wanted
from dispatcher.permissions import Identity
from dispatcher.settings import Settings
from infra.local.cloud_run import LocalCloudRun
from infra.local.hub import serving
from infra.local.hub_state import Hub
from infra.local.secret_manager import LocalSecretManager
from infra.local.storage import StorageProxy
from infra.local.topics import topic
from tests.dispatcher.interposed import Iam, interposed

REGION, JOB, TOPIC = "region", "exporter", "topic-of-exports"
ALL = tuple(Identity)


@dataclass
class Deployed:
    """What the deployment is made of, and what doctor says of it."""

    project: str
    bucket: str
    environment: dict[str, str]
    records: Iam
    """In front of Firestore."""
    messages: Iam
    """In front of Pub/Sub."""
    storage: StorageProxy
    run: LocalCloudRun
    secrets: LocalSecretManager
    hub: Hub
    seconds: float = field(default=0.0)
    """How long doctor took the last time."""

    def findings(
        self,
        *identities: Identity,
        adapters: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        limit: float = RUN_SECONDS,
    ) -> dict[str, Finding]:
        """What doctor finds, by the names of its checks."""
        began = time.monotonic()
        asked = groups(self.settings(environment), Wanted(identities or ALL), adapters=adapters)
        found = examined(asked, limit=limit)
        self.seconds = time.monotonic() - began
        assert all(finding.document()["remedy"] for finding in found if finding.is_fault)
        named = {finding.check.name: finding for finding in found}
        assert len(named) == len(found)
        return named

    def settings(self, environment: Mapping[str, str] | None = None) -> Settings:
        """The deployment's, or some that differ from them."""
        return Settings.from_env({**self.environment, "HF_ENDPOINT": self.hub.url, **(environment or {})})

    def faults(
        self, *identities: Identity, adapters: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The code of each check that found a fault."""
        return faults_in(self.findings(*identities, adapters=adapters, environment=environment))

    def documents(self) -> list[str]:
        """The paths of all that there is in the database."""
        client = firestore.Client(project=self.project)
        found = [each.id for name in ("exports", "training_jobs") for each in client.collection(name).list_documents()]
        client.close()
        return found

    def objects(self) -> list[str]:
        """The names of all that there is in the bucket."""
        with storage.Client(project="test") as client:
            return [blob.name for blob in client.list_blobs(self.bucket)]


def examined(groups: Sequence[Group], *, limit: float = RUN_SECONDS, ending: float = END_SECONDS) -> list[Finding]:
    """All that is found and said of what is left."""
    examination = Examination(groups)
    return [*examination.findings(limit), *examination.end(ending)]


def faults_in(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.verdict.code for name, finding in findings.items() if finding.is_fault}


def unknown_in(findings: dict[str, Finding]) -> dict[str, str]:
    """The code of each check that could not tell."""
    found = findings.items()
    return {name: each.verdict.code for name, each in found if each.verdict.outcome is Outcome.UNKNOWN}


@contextmanager
def deployed(
    directory: Path, firestore_server: str, pubsub_server: str, storage_proxy: StorageProxy
) -> Iterator[Deployed]:
    """A whole and sound deployment; nothing is denied at first."""
    project = f"project-{secrets.token_hex(6)}"
    bucket = f"bucket-{secrets.token_hex(6)}"
    with storage.Client(project="test") as client:
        made = client.bucket(bucket)
        made.iam_configuration.uniform_bucket_level_access_enabled = True
        client.create_bucket(made)
    storage_proxy.heal()
    base = {"PROJECT_ID": project, "GCS_EXPORT_BUCKET_NAME": bucket, "EXPORT_TOPIC": TOPIC, "CLOCK_SKEW_SECONDS": "0"}
    tokens = LocalSecretManager(project)
    with ExitStack() as stack:
        stack.enter_context(topic(project, TOPIC))
        base["TOKENS_URL"] = f"secretmanager://{project}?emulator={stack.enter_context(tokens.serving())}"
        run = LocalCloudRun(project, REGION, JOB, log_dir=directory / "logs", environment=base)
        run_url = f"run://{project}/{REGION}/{JOB}?emulator={stack.enter_context(run.serving())}"
        records = stack.enter_context(interposed(firestore_server))
        messages = stack.enter_context(interposed(pubsub_server))
        hub = stack.enter_context(serving(Hub(directory)))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("FIRESTORE_EMULATOR_HOST", records.address)
        patch.setenv("PUBSUB_EMULATOR_HOST", messages.address)
        environment = {**base, "RUNNER_URL": run_url}
        yield Deployed(project, bucket, environment, records, messages, storage_proxy, run, tokens, hub)
    storage_proxy.heal()
