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

PREDEFINED: Mapping[str, tuple[str, ...]] = {
    "roles/pubsub.publisher": ("pubsub.topics.publish",),
    "roles/secretmanager.secretAccessor": ("secretmanager.versions.access",),
    "roles/storage.objectViewer": ("storage.objects.get", "storage.objects.list"),
}
"""Google's own roles that our code is granted, with what they bring; of others, the role is told.
Source: https://cloud.google.com/iam/docs/roles-permissions"""
_ACCOUNT = re.compile(r"serviceAccount:gemma-export-(\w+)@.*|serviceAccount:service-\d+@gcp-sa-([\w-]+)\..*")
_DATABASE = re.compile(r'resource\.name == "projects/[^/]+/databases/[^/"]+"')
_SECRETS = re.compile(r'resource\.name\.startsWith\("projects/\d+/secrets/gemma-export-"\)')
_OBJECTS = re.compile(r'resource\.name\.startsWith\("projects/_/buckets/([^/]+)/objects/([^"]+)/"\)')


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
    roles = {
        each.values["id"]: tuple(each.values["permissions"])
        for each in resources
        if each.kind == "google_project_iam_custom_role"
    }
    (bucket,) = (
        each.values["name"] for each in resources if (each.kind, each.name) == ("google_storage_bucket", "artifacts")
    )
    found = set()
    for each in resources:
        if "_iam_" not in each.kind or each.kind == "google_project_iam_custom_role":
            continue
        if not each.kind.endswith(("_iam_member", "_iam_binding")):
            raise ValueError(f"{each.kind} would take from others what they have")
        role = each.values["role"]
        for member in each.values.get("members") or [each.values["member"]]:
            who = _name_of(member)
            for what in _granted_on(each, who, bucket):
                found |= {
                    Grant(who, what, permission) for permission in roles.get(role) or PREDEFINED.get(role, (role,))
                }
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


def _granted_on(grant: running.Resource, who: str, bucket: str) -> Iterator[str]:
    values = grant.values
    condition = (values.get("condition") or [{}])[0].get("expression", "")
    if grant.kind.startswith("google_project_"):
        yield _in_project(condition)
    elif grant.kind.startswith("google_storage_bucket_"):
        yield from _in_bucket(values, condition, bucket)
    elif condition:
        raise ValueError(f"{grant.kind} under a condition: {condition}")
    elif grant.kind.startswith("google_cloud_run_v2_job_"):
        yield Resource.JOB.value
    elif grant.kind.startswith("google_service_account_"):
        account = _name_of(f"serviceAccount:{values['service_account_id'].rpartition('/')[2]}")
        yield Resource.ITSELF.value if account == who else f"account {account}"
    elif values.get("topic") == "gemma-export":
        yield Resource.TOPIC.value
    else:
        named = ("topic", "subscription", "name", "repository", "secret_id")
        yield next(f"{name} {values[name]}".removeprefix("name ") for name in named if values.get(name))


def _in_project(condition: str) -> str:
    if not condition:
        return Resource.PROJECT.value
    if _DATABASE.fullmatch(condition):
        return Resource.RECORDS.value
    if _SECRETS.fullmatch(condition):
        return Resource.TOKENS.value
    raise ValueError(f"an unknown condition: {condition}")


def _in_bucket(values: Mapping[str, Any], condition: str, bucket: str) -> Iterator[str]:
    places = {
        "merged_models": Resource.ARTIFACTS.value,
        "gguf_models": Resource.ARTIFACTS.value,
        "base_models": Resource.BASES.value,
        "adapters": Resource.ADAPTERS.value,
    }
    own = values["bucket"] == bucket
    if not condition:
        yield Resource.BUCKET.value if own else f"bucket {values['bucket']}"
        return
    listed, parts = 'resource.type == "storage.googleapis.com/Bucket"', condition.split(" || ")
    if not own and parts[0] == listed:  # its list, and of its objects those under a prefix
        del parts[0]
    for part in parts:
        match = _OBJECTS.fullmatch(part)
        if match is None or match[1] != values["bucket"]:
            raise ValueError(f"an unknown condition on {values['bucket']}: {condition}")
        yield places[match[2]] if own else f"gs://{match[1]}/{match[2]}/"


def main() -> int:
    """Print the table of a deployment with all defaults."""
    with tempfile.TemporaryDirectory() as directory, running.terraform(Path(directory)) as terraform:
        sys.stdout.write(table(grants(terraform.plan())) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
