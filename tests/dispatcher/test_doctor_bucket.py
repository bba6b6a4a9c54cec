"""What `gemma-export doctor` finds of a bucket: what may not be done in it, and what would be its contents' undoing."""

import secrets
from http import HTTPStatus

import pytest

from dispatcher.doctor_bucket import FOLDER, bucket_group
from dispatcher.doctor_findings import FINE, Check, Group, Verdict, Wanted
from dispatcher.permissions import Identity
from dispatcher.published import BASES_ROOT, ROOTS
from infra.local.storage import Fault
from tests.buckets import bucket_named, new_bucket
from tests.dispatcher.deployed import Deployed, examined, faults_in, unknown_in

SEVERAL = 50
"""More often than anything is asked."""
ROOT = "merged_models"


@pytest.mark.parametrize("root", [*ROOTS.values(), BASES_ROOT])
def test_a_root_that_may_not_be_written_to_is_said(deployment: Deployed, root: str) -> None:
    """A grant may be for some prefixes and not for others."""
    part = f"/upload/storage/v1/b/{deployment.bucket}/o"
    # In the order of the roots, each of which is written to once.
    skip = [*ROOTS.values(), BASES_ROOT].index(root)
    deployment.storage.fail(HTTPStatus.FORBIDDEN, "POST", part, skip=skip)
    assert deployment.faults() == {f"{root}.create": "permission_denied"}
    assert deployment.objects() == []


def test_a_root_that_may_not_be_read_is_said(deployment: Deployed) -> None:
    """Whether something was written there to be read, or is not there."""
    for identity in (Identity.DISPATCHER, Identity.SWEEPER):
        deployment.storage.heal()
        deployment.storage.fail(HTTPStatus.FORBIDDEN, "GET", f"/o/{ROOT}%2F", times=SEVERAL)
        assert deployment.faults(identity) == {f"{ROOT}.get": "permission_denied"}
    deployment.storage.heal()
    assert deployment.objects() == []


def test_a_probe_that_may_not_be_removed_is_said_to_stay(deployment: Deployed) -> None:
    """By its name, since nobody but an operator can remove it then."""
    deployment.storage.fail(HTTPStatus.FORBIDDEN, "DELETE", f"/o/{ROOT}%2F", times=SEVERAL)
    findings = deployment.findings(Identity.EXPORTER)
    assert faults_in(findings) == {f"{ROOT}.delete": "permission_denied"}
    (left,) = deployment.objects()
    assert unknown_in(findings)["left_behind"] == "left_behind"
    assert f"gs://{deployment.bucket}/{left}" in findings["left_behind"].document()["message"]
    assert left.startswith(f"{ROOT}/{FOLDER}/")


def test_a_probe_that_could_not_be_removed_at_its_time_is_removed_at_the_end(deployment: Deployed) -> None:
    """Then nothing is left to be named."""
    deployment.storage.fail(HTTPStatus.SERVICE_UNAVAILABLE, "DELETE", f"/o/{ROOT}%2F")
    findings = deployment.findings(Identity.EXPORTER)
    assert faults_in(findings) == {f"{ROOT}.delete": "unavailable"}
    assert "left_behind" not in findings
    assert deployment.objects() == []


def test_a_probe_whose_writing_was_never_answered_is_removed(deployment: Deployed) -> None:
    """It may be there all the same; and here it is."""
    part = f"/upload/storage/v1/b/{deployment.bucket}/o"
    deployment.storage.fail(Fault.ANSWER_LOST, "POST", part)
    deployment.storage.fail(HTTPStatus.SERVICE_UNAVAILABLE, "POST", part, times=SEVERAL)
    group = bucket_group(deployment.bucket, Wanted((Identity.SWEEPER,)), patience=1)
    findings = {finding.check.name: finding for finding in examined([group])}
    assert faults_in(findings) == {f"{ROOT}.create": "unavailable"}
    assert findings[f"{ROOT}.delete"].verdict.code == "ok"
    assert deployment.objects() == []


def test_a_probe_that_holds_something_else_than_was_written_is_wrong(deployment: Deployed) -> None:
    """As where someone else's work replaces what lies there, or a proxy answers from its memory."""
    group = bucket_group(deployment.bucket, Wanted((Identity.SWEEPER,)))

    def replace() -> Verdict:
        (name,) = deployment.objects()
        bucket_named(deployment.bucket).blob(name).upload_from_string("something else")
        return FINE

    checks = list(group.checks)
    written = [check.name for check in checks].index(f"{ROOT}.create")
    checks.insert(written + 1, Check("replaced", "replace it", replace))
    findings = {finding.check.name: finding for finding in examined([Group(checks, group.close, group.left)])}
    assert faults_in(findings) == {f"{ROOT}.get": "content_changed"}
    assert deployment.objects() == []


def test_a_probe_is_removed_when_it_cannot_be_looked_at(deployment: Deployed) -> None:
    """Storage is away for a moment after it was written: the rest is not asked, but for its removal."""
    deployment.storage.fail(HTTPStatus.SERVICE_UNAVAILABLE, "GET", f"/o/{ROOT}%2F", times=SEVERAL)
    findings = deployment.findings(Identity.SWEEPER)
    assert faults_in(findings) == {f"{ROOT}.get": "unavailable"}
    assert findings["gguf_models.create"].verdict.code == "not_asked"
    assert findings[f"{ROOT}.delete"].verdict.code == "ok"
    assert deployment.objects() == []


def test_a_bucket_that_may_not_be_listed_is_said_and_what_that_hides(deployment: Deployed) -> None:
    """Who may not list is told 403 of what is not there: that is no want of the right to read."""
    deployment.storage.fail(HTTPStatus.FORBIDDEN, "GET", f"/b/{deployment.bucket}/o?", times=SEVERAL)
    deployment.storage.fail(HTTPStatus.FORBIDDEN, "GET", "/o/", times=SEVERAL)
    findings = deployment.findings(Identity.DISPATCHER)
    assert faults_in(findings) == {"bucket.list": "permission_denied"}
    assert findings[f"{ROOT}.get"].verdict.code == "needs_another"


def test_adapters_that_may_not_be_read_are_said(deployment: Deployed) -> None:
    """In another bucket, of which nothing lists or reads anything before an export asks for it."""
    elsewhere = new_bucket()
    bucket_named(elsewhere).blob("adapters/job/adapter_config.json").upload_from_string("{}")
    uri = f"gs://{elsewhere}/adapters"
    assert deployment.faults(Identity.EXPORTER, adapters=(uri,)) == {}
    deployment.storage.fail(HTTPStatus.FORBIDDEN, "GET", "/o/adapters%2Fjob", times=SEVERAL)
    assert deployment.faults(Identity.EXPORTER, adapters=(uri,)) == {f"adapters.get:{uri}": "permission_denied"}
    deployment.storage.heal()
    deployment.storage.fail(HTTPStatus.FORBIDDEN, "GET", f"/b/{elsewhere}/o?", times=SEVERAL)
    assert deployment.faults(Identity.DISPATCHER, adapters=(uri,)) == {f"adapters.list:{uri}": "permission_denied"}
    deployment.storage.heal()
    nowhere = f"gs://bucket-{secrets.token_hex(6)}/x"
    found = deployment.findings(Identity.DISPATCHER, adapters=(uri, f"{uri}/", nowhere))
    assert faults_in(found) == {f"adapters.list:{nowhere}": "resource_missing"}
    assert {f"adapters.{verb}:{place}" for verb in ("list", "get") for place in (uri, nowhere)} <= found.keys()


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ({"age": 30}, "lifecycle_matches"),
        ({"age": 30, "matchesPrefix": ["merged_models/"]}, "lifecycle_matches"),
        ({"age": 30, "matchesPrefix": ["base_models/", "gguf_models/job-"]}, "lifecycle_matches"),
        ({"age": 30, "matchesPrefix": ["m"]}, "lifecycle_matches"),
        ({"age": 30, "matchesPrefix": ["adapters/", "base_models/"]}, "ok"),
        ({"daysSinceNoncurrentTime": 7}, "ok"),
        ({"age": 1, "isLive": False}, "ok"),
    ],
)
def test_a_rule_that_could_remove_what_was_published_is_wrong(
    deployment: Deployed, condition: dict[str, object], code: str
) -> None:
    """Collection is the sweep's work, which knows what is used."""
    bucket = bucket_named(deployment.bucket)
    bucket.lifecycle_rules = [{"action": {"type": "Delete"}, "condition": condition}]
    bucket.patch()
    assert deployment.findings(Identity.SWEEPER)["bucket.lifecycle"].verdict.code == code


def test_a_bucket_with_access_lists_is_wrong(deployment: Deployed) -> None:
    """And where the bucket itself may not be looked at, that is no fault of the deployment's."""
    bucket = bucket_named(deployment.bucket)
    bucket.iam_configuration.uniform_bucket_level_access_enabled = False
    bucket.patch()
    assert deployment.faults(Identity.SWEEPER) == {"bucket.access": "access_not_uniform"}
    deployment.storage.fail(HTTPStatus.FORBIDDEN, "GET", f"/b/{deployment.bucket}?", times=SEVERAL)
    findings = deployment.findings(Identity.SWEEPER)
    assert faults_in(findings) == {}
    assert unknown_in(findings) == {"bucket.access": "not_readable", "bucket.lifecycle": "not_readable"}
