"""Who may do what in a planned deployment: every IAM grant, as (who, permission, on what).

`python -m tests.terraform.access` prints the table of infra/README.md.
"""

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.permissions import NEEDS, Resource
from tests.terraform import running
from tests.terraform.provider import PROJECT_NUMBER

PREDEFINED: Mapping[str, tuple[str, ...]] = {
    "roles/pubsub.publisher": ("pubsub.topics.publish",),
    "roles/secretmanager.secretAccessor": ("secretmanager.versions.access",),
    "roles/storage.objectViewer": ("storage.objects.get", "storage.objects.list"),
}
"""Google's own roles that our code is granted, with what they bring; of others, the role is told.
Source: https://cloud.google.com/iam/docs/roles-permissions"""
_ACCOUNT = re.compile(r"serviceAccount:gemma-export-(\w+)@.*|serviceAccount:service-\d+@gcp-sa-([\w-]+)\..*")
_LISTED = 'resource.type == "storage.googleapis.com/Bucket"'
_OBJECTS = re.compile(r'resource\.name\.startsWith\("projects/_/buckets/([^/]+)/objects/([^"]+)/"\)')
_PLACES = {
    "merged_models": Resource.ARTIFACTS.value,
    "gguf_models": Resource.ARTIFACTS.value,
    "base_models": Resource.BASES.value,
    "adapters": Resource.ADAPTERS.value,
}


@dataclass(frozen=True, order=True)
class Grant:
    """One permission of one identity on one thing."""

    who: str
    what: str
    permission: str


def grants(plan: Iterable[running.Resource]) -> set[Grant]:
    """Every grant of a plan.

    Raises:
        ValueError: A condition, or a grant on something, that this does not know.
    """
    resources = list(plan)
    names = _Names(resources)
    roles = {
        each.values["id"]: tuple(each.values["permissions"])
        for each in resources
        if each.kind == "google_project_iam_custom_role"
    }
    found = set()
    for each in resources:
        if "_iam_" not in each.kind or each.kind == "google_project_iam_custom_role":
            continue
        if not each.kind.endswith(("_iam_member", "_iam_binding")):
            raise ValueError(f"{each.kind} would take from others what they have")
        role = each.values["role"]
        for member in each.values.get("members") or [each.values["member"]]:
            who = _name_of(member)
            for what in names.granted_on(each, who):
                permissions = roles.get(role) or PREDEFINED.get(role, (role,))
                found |= {Grant(who, what, permission) for permission in permissions}
    return found


def needed() -> set[Grant]:
    """What dispatcher/permissions.py says is needed, of an adapter's place that of the artifact bucket."""
    return {
        Grant(identity.value, need.resource.value, permission)
        for identity, needs in NEEDS.items()
        for need in needs
        for permission in need.permissions
    }


def table(found: Iterable[Grant]) -> str:
    """Grants as a table in Markdown, a row for each identity and thing."""
    rows: dict[tuple[str, str], list[str]] = {}
    for grant in sorted(found):
        rows.setdefault((grant.who, grant.what), []).append(f"`{grant.permission}`")
    lines = [f"| {who} | {what} | {', '.join(permissions)} |" for (who, what), permissions in rows.items()]
    return "\n".join(["| who | on what | may |", "|---|---|---|", *lines])


def _name_of(member: str) -> str:
    match = _ACCOUNT.fullmatch(member)
    if match is None:
        raise ValueError(f"{member} is none of this deployment's accounts")
    return match[1] or f"Google's {match[2]}"


class _Names:
    """What a plan's own things are called, so that a grant on any other is told from one on these."""

    def __init__(self, plan: Iterable[running.Resource]) -> None:
        by_address = {each.address: each.values for each in plan}
        (job,) = by_address["google_cloud_run_v2_job.exporter"]["template"][0]["template"][0]["containers"]
        environment = {variable["name"]: variable["value"] for variable in job["env"]}
        project, _, database = environment["RECORDS_URL"].removeprefix("firestore://").partition("/")
        self._in_project = {
            "": Resource.PROJECT.value,
            f'resource.name == "projects/{project}/databases/{database}"': Resource.RECORDS.value,
            f'resource.name.startsWith("projects/{PROJECT_NUMBER}/secrets/gemma-export-")': Resource.TOKENS.value,
        }
        self._project = project
        self._region = environment["REGION"]
        self._bucket = environment["GCS_EXPORT_BUCKET_NAME"]
        self._topic = environment["EXPORT_TOPIC"]
        self._job = environment["EXPORTER_JOB"]

    def granted_on(self, grant: running.Resource, who: str) -> Iterator[str]:
        """What a grant is on, as `permissions.Resource` says it where it is one of those."""
        values = grant.values
        condition = (values.get("condition") or [{}])[0].get("expression", "")
        if grant.kind.startswith("google_project_"):
            if condition not in self._in_project or values["project"] != self._project:
                raise ValueError(f"in {values['project']}, under an unknown condition: {condition}")
            yield self._in_project[condition]
        elif grant.kind.startswith("google_storage_bucket_"):
            yield from self._in_bucket(values, condition)
        elif condition or values.get("location", self._region) != self._region:
            raise ValueError(f"{grant.kind} under {condition or 'no condition'} in {values.get('location')}")
        elif grant.kind.startswith("google_service_account_"):
            account = _name_of(f"serviceAccount:{values['service_account_id'].rpartition('/')[2]}")
            yield Resource.ITSELF.value if account == who else f"account {account}"
        elif (grant.kind, values.get("name")) == ("google_cloud_run_v2_job_iam_member", self._job):
            yield Resource.JOB.value
        elif (grant.kind, values.get("topic")) == ("google_pubsub_topic_iam_member", self._topic):
            yield Resource.TOPIC.value
        else:
            named = ("topic", "subscription", "name", "repository", "secret_id")
            yield next(f"{name} {values[name]}".removeprefix("name ") for name in named if values.get(name))

    def _in_bucket(self, values: Mapping[str, Any], condition: str) -> Iterator[str]:
        own = values["bucket"] == self._bucket
        if not condition:
            yield Resource.BUCKET.value if own else f"bucket {values['bucket']}"
            return
        parts = condition.split(" || ")
        if not own and parts.pop(0) != _LISTED:  # and of its objects those under a prefix
            raise ValueError(f"{values['bucket']} may not be listed: {condition}")
        for part in parts:
            match = _OBJECTS.fullmatch(part)
            if match is None or match[1] != values["bucket"]:
                raise ValueError(f"an unknown condition on {values['bucket']}: {condition}")
            yield _PLACES[match[2]] if own else f"gs://{match[1]}/{match[2]}/"


def main() -> int:
    """Print the table of a deployment with all defaults."""
    with tempfile.TemporaryDirectory() as directory, running.terraform(Path(directory)) as terraform:
        sys.stdout.write(table(grants(terraform.plan())) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
