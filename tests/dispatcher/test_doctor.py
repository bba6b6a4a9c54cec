"""What `gemma-export doctor` finds: in a sound deployment nothing, and of what is denied that and no more."""

import re
import secrets
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from google.auth import compute_engine

from dispatcher.doctor import examined
from dispatcher.doctor_bucket import FOLDER
from dispatcher.doctor_findings import Finding, Wanted
from dispatcher.doctor_signing import signing_group
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.gcs_signing import UrlSigner
from dispatcher.permissions import NEEDS, Identity
from dispatcher.published import BASES_ROOT, ROOTS
from infra.local.hub_state import TOKEN
from infra.local.storage import StorageProxy
from tests.buckets import bucket_named, new_bucket
from tests.dispatcher.deployed import ALL, Deployed, deployed, faults_in, unknown_in
from tests.dispatcher.issuer import Issuer, published
from tests.ports.iam import Iam, Routed, iam

SEVERAL = 50
"""More often than anything is asked."""
ROOT = "merged_models"


@pytest.fixture
def deployment(
    tmp_path: Path, firestore_server: str, pubsub_server: str, storage_proxy: StorageProxy
) -> Iterator[Deployed]:
    with deployed(tmp_path, firestore_server, pubsub_server, storage_proxy) as found:
        yield found


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with published() as found:
        yield found


@pytest.fixture
def signing_service() -> Iterator[Iam]:
    with iam() as server:
        yield server


def test_a_sound_deployment_lacks_nothing_and_nothing_is_left_in_it(deployment: Deployed, issuer: Issuer) -> None:
    """No document, no object, no execution, no payload; and what an emulator cannot tell is no fault."""
    adapters = (f"gs://{deployment.bucket}/adapters",)
    findings = deployment.findings(adapters=adapters, environment={"HF_TOKEN": TOKEN, **issuer.environment()})
    assert faults_in(findings) == {}
    assert unknown_in(findings) == {"signing": "emulated"}
    assert {"hub.token", "jwt.keys", "tokens.flow", "job.settings", "adapters.get"} <= findings.keys()
    assert deployment.documents() == []
    assert deployment.objects() == []
    assert deployment.secrets.payloads() == []
    assert deployment.run.executions == []


@pytest.mark.parametrize("identity", ALL)
def test_every_permission_in_the_table_is_asked_about(deployment: Deployed, identity: Identity) -> None:
    """Of whoever needs it, by a check that names it; and no other's."""
    findings = deployment.findings(identity, adapters=(f"gs://{deployment.bucket}",))
    grants = [finding.check.grant for finding in findings.values() if finding.check.grant]
    asked = {(grant.resource, grant.permission) for grant in grants}
    assert asked == {(need.resource, name) for need in NEEDS[identity] for name in need.permissions}
    assert {grant.identities for grant in grants} == {(identity,)}
    assert faults_in(findings) == {}


@pytest.mark.parametrize("permission", ["run.jobs.run", "run.jobs.runWithOverrides", "run.executions.cancel"])
def test_what_cloud_run_denies_is_said_and_nothing_else(deployment: Deployed, permission: str) -> None:
    """With the permission, the job, who needs it and why."""
    deployment.run.denied = {permission}
    findings = deployment.findings()
    (fault,) = [finding for finding in findings.values() if finding.is_fault]
    document = fault.document()
    assert (document["outcome"], document["code"], document["permission"]) == (
        "missing",
        "permission_denied",
        permission,
    )
    assert document["resource"] == deployment.run.job
    assert document["identities"] == (["dispatcher"] if permission == "run.executions.cancel" else ["trigger"])
    assert permission in document["remedy"]
    assert unknown_in(findings) == {"signing": "emulated", "adapters": "not_asked"}


@pytest.mark.parametrize("check", ["access", "update", "add", "destroy", "create"])
def test_what_secret_manager_denies_is_said_and_nothing_else(deployment: Deployed, check: str) -> None:
    """No token is put that might not be destroyed."""
    kind = "secrets" if check in ("update", "create") else "versions"
    deployment.secrets.denied = {f"secretmanager.{kind}.{check}"}
    findings = deployment.findings(Identity.DISPATCHER, Identity.EXPORTER)
    assert faults_in(findings) == {f"tokens.{check}": "permission_denied"}
    assert findings["tokens.flow"].verdict.code == "not_asked"
    assert deployment.secrets.payloads() == []


@pytest.mark.parametrize(
    ("verb", "hidden"),
    [
        ("get", {"records.list"}),
        ("list", {f"records.index.{name}" for name in ("user_id.job_id", "user_id.state", "job_id.state")}),
        ("update", {"records.create"}),
        ("create", set()),
    ],
)
def test_what_firestore_denies_is_said_and_what_that_hides(deployment: Deployed, verb: str, hidden: set[str]) -> None:
    """A question that needs two permissions tells nothing of the second without the first."""
    deployment.records.denied = {f"datastore.entities.{verb}"}
    findings = deployment.findings(Identity.DISPATCHER)
    assert faults_in(findings) == {f"records.{verb}": "permission_denied"}
    assert hidden <= unknown_in(findings).keys()
    assert deployment.documents() == []


@pytest.mark.parametrize("fields", ["user_id.job_id", "user_id.state", "job_id.state", "state.uncollected_since"])
def test_an_index_that_is_not_there_is_named(deployment: Deployed, fields: str) -> None:
    """As Firestore names it, by refusing a query that needs it."""
    deployment.records.unindexed = {tuple(fields.split("."))}
    findings = deployment.findings()
    assert faults_in(findings) == {f"records.index.{fields}": "index_missing"}
    assert "firestore.indexes.json" in findings[f"records.index.{fields}"].document()["remedy"]


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
    assert f"gs://{deployment.bucket}/{left} stays" in findings[f"{ROOT}.delete"].document()["message"]
    assert left.startswith(f"{ROOT}/{FOLDER}/")


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
    assert deployment.faults(Identity.EXPORTER, adapters=(uri,)) == {"adapters.get": "permission_denied"}
    deployment.storage.heal()
    deployment.storage.fail(HTTPStatus.FORBIDDEN, "GET", f"/b/{elsewhere}/o?", times=SEVERAL)
    assert deployment.faults(Identity.DISPATCHER, adapters=(uri,)) == {"adapters.list": "permission_denied"}
    deployment.storage.heal()
    nowhere = f"gs://bucket-{secrets.token_hex(6)}/x"
    assert deployment.faults(Identity.DISPATCHER, adapters=(nowhere,)) == {"adapters.list": "resource_missing"}


def test_a_topic_that_may_not_be_published_to_is_said(deployment: Deployed) -> None:
    """Whether or not it may be looked at."""
    deployment.messages.denied = {"pubsub.topics.publish"}
    assert deployment.faults() == {"topic.publish": "permission_denied"}
    deployment.messages.denied |= {"pubsub.topics.get"}
    assert deployment.faults() == {"topic.publish": "permission_denied"}


def test_on_an_emulator_that_checks_no_permission_the_topic_has_to_be_there(deployment: Deployed) -> None:
    """Which is all that can be told there."""
    deployment.messages.checks = False
    assert unknown_in(deployment.findings(Identity.TRIGGER)) == {"topic.publish": "emulated"}
    assert deployment.faults(Identity.TRIGGER, environment={"EXPORT_TOPIC": "another"}) == {
        "topic.publish": "resource_missing"
    }


def test_what_does_not_exist_is_said_once(deployment: Deployed) -> None:
    """Neither bucket nor topic nor job: one fault each, however many checks there are of it."""
    deployment.messages.denied = {"pubsub.topics.publish"}  # as IAM says of a topic that is not there
    there_is_none = {
        "GCS_EXPORT_BUCKET_NAME": f"bucket-{secrets.token_hex(6)}",
        "EXPORT_TOPIC": "another",
        "RUNNER_URL": deployment.environment["RUNNER_URL"].replace("/exporter?", "/another?"),
    }
    assert deployment.faults(environment=there_is_none) == {
        "bucket.list": "resource_missing",
        "topic.publish": "resource_missing",
        "job.run": "resource_missing",
    }


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


def test_a_job_that_is_set_up_for_another_deployment_is_wrong(deployment: Deployed) -> None:
    """It would write elsewhere, or be tried more often than the records allow; who may not look cannot tell."""
    differing = deployment.findings(Identity.TRIGGER, environment={"MAX_ATTEMPTS": "2"})["job.settings"]
    assert (differing.verdict.code, differing.is_fault) == ("job_differs", True)
    assert "its maximum of retries is 3" in differing.verdict.message
    elsewhere = deployment.findings(
        Identity.TRIGGER, environment={"RECORDS_URL": "firestore://project-of-others/(default)"}
    )
    assert "records_url" in elsewhere["job.settings"].verdict.message
    deployment.run.denied = {"run.jobs.get"}
    findings = deployment.findings(Identity.TRIGGER)
    assert faults_in(findings) == {}
    assert unknown_in(findings) == {"job.settings": "not_readable"}


def test_a_token_that_the_hub_refuses_is_said_and_not_shown(deployment: Deployed) -> None:
    """Nor is a good one, nor the hub asked with one of a deployment that has none."""
    bad = "hf_badTokenOfNobody"
    findings = deployment.findings(environment={"HF_TOKEN": bad})
    assert faults_in(findings) == {"hub.token": "hub_token_refused"}
    told = "".join(finding.told() + str(finding.document()) for finding in findings.values())
    assert bad not in told
    assert TOKEN not in "".join(
        finding.told() for finding in deployment.findings(environment={"HF_TOKEN": TOKEN}).values()
    )
    assert "hub.token" not in deployment.findings()
    deployment.hub.broken = True
    assert deployment.faults(Identity.EXPORTER) == {"hub": "unavailable"}
    assert deployment.faults(Identity.DISPATCHER) == {}


def test_an_issuer_that_publishes_no_keys_is_said(deployment: Deployed, issuer: Issuer) -> None:
    """Or does not answer: no caller could be checked."""
    environment = issuer.environment()
    assert deployment.faults(Identity.DISPATCHER, environment=environment) == {}
    issuer.publish()
    assert deployment.faults(Identity.DISPATCHER, environment=environment) == {"jwt.keys": "jwt_keys_unusable"}
    environment["JWT_JWKS_URL"] = "http://127.0.0.1:1/jwks.json"
    assert deployment.faults(Identity.DISPATCHER, environment=environment) == {"jwt.keys": "unavailable"}
    assert "jwt.keys" not in deployment.findings(Identity.EXPORTER, environment=environment)


def test_an_account_that_may_not_sign_is_said(storage_server: str, signing_service: Iam) -> None:
    """IAM's signBlob, spoken to for real; the signed URL, which opens a file, is not shown."""
    bucket = new_bucket()
    credentials = compute_engine.Credentials(universe_domain="googleapis.com")
    signer = UrlSigner(credentials=credentials, request=Routed(signing_service.url))

    def asked() -> Finding:
        group = signing_group(lambda: GcsArtifacts(bucket, signer=signer), None, Wanted((Identity.DISPATCHER,)))
        (finding,) = examined([group])
        return finding

    assert asked().verdict.code == "ok"
    assert not re.search("Signature", asked().told())
    signing_service.refusing = True
    finding = asked()
    assert (finding.verdict.code, finding.is_fault) == ("permission_denied", True)
    assert "iam.serviceAccounts.signBlob" in finding.told()
