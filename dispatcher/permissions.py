"""Who needs which of Google's permissions on what, and why: the identities of a deployment, as one table.

Terraform grants exactly this (a test compares the two), and `gemma-export doctor` checks it. Names are IAM's own:
https://cloud.google.com/iam/docs/permissions-reference
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Identity(StrEnum):
    """A service account that code of ours runs as."""

    DISPATCHER = "dispatcher"
    """The function `export_api`."""
    TRIGGER = "trigger"
    """The functions `start_export` and `fail_export`."""
    SWEEPER = "sweeper"
    """The function `sweep`."""
    EXPORTER = "exporter"
    """The Cloud Run job."""


class Resource(StrEnum):
    """What a permission is needed on; nothing wider is granted."""

    RECORDS = "records"
    """The Firestore database."""
    BUCKET = "bucket"
    """The artifact bucket as a whole."""
    ARTIFACTS = "artifacts"
    """In the artifact bucket, the objects under `published.ROOTS`."""
    BASES = "bases"
    """In the artifact bucket, the objects under `published.BASES_ROOT`."""
    ADAPTERS = "adapters"
    """Wherever training jobs keep their adapters: their objects, and the lists of the buckets that they are in."""
    TOPIC = "topic"
    """The Pub/Sub topic of job messages."""
    JOB = "job"
    """The exporter's Cloud Run job, with its executions."""
    PROJECT = "project"
    """The project: what makes a secret has no name yet that a condition could look at."""
    TOKENS = "tokens"
    """The secrets whose names begin with `gemma-export-`."""
    ITSELF = "itself"
    """The service account that needs it."""


@dataclass(frozen=True)
class Need:
    """Permissions on one resource, and what becomes impossible without them."""

    resource: Resource
    permissions: tuple[str, ...]
    why: str


_LIST = "storage.objects.list"
_READ = "storage.objects.get"
_WRITE = (_READ, "storage.objects.create", "storage.objects.delete")
_LISTING = Need(
    Resource.BUCKET, (_LIST,), "to list, and to be told 404 of what is not there: who may not list a bucket is told 403"
)
_DOCUMENTS = "datastore.entities."

NEEDS: Mapping[Identity, tuple[Need, ...]] = {
    Identity.DISPATCHER: (
        Need(
            Resource.RECORDS,
            (f"{_DOCUMENTS}create", f"{_DOCUMENTS}get", f"{_DOCUMENTS}list", f"{_DOCUMENTS}update"),
            "to read training jobs, and to write and list exports",
        ),
        _LISTING,
        Need(Resource.ARTIFACTS, (_READ,), "to see whether an export is whole, and to offer its files"),
        Need(Resource.ADAPTERS, (_READ, _LIST), "to take an adapter's fingerprint, and to offer its files"),
        Need(Resource.TOPIC, ("pubsub.topics.publish",), "to ask for an execution"),
        Need(Resource.JOB, ("run.executions.cancel",), "to stop what was cancelled"),
        Need(Resource.PROJECT, ("secretmanager.secrets.create",), "to keep a caller's Hugging Face token"),
        Need(
            Resource.TOKENS,
            (
                "secretmanager.secrets.update",
                "secretmanager.versions.add",
                "secretmanager.versions.destroy",
            ),
            "to keep a caller's Hugging Face token, and to destroy it",
        ),
        Need(Resource.ITSELF, ("iam.serviceAccounts.signBlob",), "to sign download URLs"),
    ),
    Identity.TRIGGER: (
        Need(Resource.RECORDS, (f"{_DOCUMENTS}get", f"{_DOCUMENTS}update"), "to take the lease of a launch"),
        Need(Resource.TOPIC, ("pubsub.topics.publish",), "to send again what a dead letter says was never sent"),
        Need(Resource.JOB, ("run.jobs.run", "run.jobs.runWithOverrides"), "to start executions"),
    ),
    Identity.SWEEPER: (
        Need(
            Resource.RECORDS,
            (f"{_DOCUMENTS}get", f"{_DOCUMENTS}list", f"{_DOCUMENTS}update"),
            "to find what died, and to put it right",
        ),
        _LISTING,
        Need(Resource.ARTIFACTS, _WRITE, "to mark and remove versions that nobody needs any more"),
        Need(Resource.TOPIC, ("pubsub.topics.publish",), "to send lost messages again"),
    ),
    Identity.EXPORTER: (
        Need(
            Resource.RECORDS,
            (f"{_DOCUMENTS}create", f"{_DOCUMENTS}get", f"{_DOCUMENTS}list", f"{_DOCUMENTS}update"),
            "to claim exports, and to record how they went; an operator may ask for one that has no record yet",
        ),
        _LISTING,
        Need(Resource.ARTIFACTS, _WRITE, "to publish versions, and to remove what was begun in vain"),
        Need(Resource.BASES, _WRITE, "to keep bases that came from the hub"),
        Need(Resource.ADAPTERS, (_READ, _LIST), "to read adapters"),
        Need(
            Resource.TOKENS,
            ("secretmanager.versions.access", "secretmanager.versions.destroy"),
            "to use a caller's Hugging Face token, and to destroy it",
        ),
    ),
}
"""In the order of the ports, as `doctor` asks."""
