"""What the artifact bucket says of itself that would be a deployment's undoing."""

from typing import Any

from google.cloud.storage import Client

from dispatcher.doctor_findings import CALL_SECONDS, DENIED, FINE, Outcome, Verdict
from dispatcher.errors import Misconfigured
from dispatcher.google_errors import translating
from dispatcher.published import ROOTS


def bucket_facts(client: Client, bucket: str) -> dict[str, Any] | Verdict:
    """What the bucket says of itself, or why that is not known."""
    try:
        with translating(f"gs://{bucket}"):
            found = client.get_bucket(bucket, timeout=CALL_SECONDS, retry=None)
            return dict(found._properties)  # the client shows less of it
    except Misconfigured as error:
        if error.error_code != DENIED:
            raise
        message = "this needs storage.buckets.get, which an operator has, and no identity of the deployment"
        return Verdict(Outcome.UNKNOWN, "not_readable", message)


def uniform_access(facts: dict[str, Any] | Verdict) -> Verdict:
    """Whether only IAM decides about a bucket.

    Args:
        facts: https://cloud.google.com/storage/docs/json_api/v1/buckets, or why they are not known.
    """
    if isinstance(facts, Verdict):
        return facts
    access = facts.get("iamConfiguration", {}).get("uniformBucketLevelAccess")
    if access is None:
        return Verdict(Outcome.UNKNOWN, "not_readable", "this server does not say")
    if access.get("enabled"):
        return FINE
    message = "objects may have access lists of their own, beside IAM"
    return Verdict(
        Outcome.WRONG, "access_not_uniform", message, "gcloud storage buckets update --uniform-bucket-level-access"
    )


def lifecycle(facts: dict[str, Any] | Verdict) -> Verdict:
    """Whether a bucket leaves it to the sweep to remove what was published.

    Args:
        facts: As for `uniform_access`.
    """
    if isinstance(facts, Verdict):
        return facts
    found = [rule for rule in facts.get("lifecycle", {}).get("rule", []) if _removes_artifacts(rule)]
    if not found:
        return FINE
    message = f"a rule can remove published artifacts: {found[0]}"
    remedy = "remove the rule, or give it a matchesPrefix apart from " + " and ".join(sorted(ROOTS.values()))
    return Verdict(Outcome.WRONG, "lifecycle_matches", message, remedy)


def _removes_artifacts(rule: dict[str, Any]) -> bool:
    """Whether a rule deletes objects that are live, under a root of artifacts."""
    condition = rule.get("condition", {})
    only_old_ones = condition.get("isLive") is False or any(
        name in condition for name in ("daysSinceNoncurrentTime", "noncurrentTimeBefore", "numNewerVersions")
    )
    if rule.get("action", {}).get("type") != "Delete" or only_old_ones:
        return False
    prefixes = condition.get("matchesPrefix") or [""]
    roots = [f"{root}/" for root in ROOTS.values()]
    return any(root.startswith(prefix) or prefix.startswith(root) for root in roots for prefix in prefixes)
