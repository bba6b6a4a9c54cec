"""What `gemma-export doctor` finds: in a sound deployment nothing, and of what is denied that and no more."""

import re
import secrets
from collections.abc import Iterator

import pytest
from google.auth import compute_engine

from dispatcher.doctor import examined
from dispatcher.doctor_findings import Finding, Wanted
from dispatcher.doctor_signing import signing_group
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.gcs_signing import UrlSigner
from dispatcher.permissions import NEEDS, Identity
from infra.local.hub_state import TOKEN
from tests.buckets import new_bucket
from tests.dispatcher.deployed import ALL, Deployed, faults_in, unknown_in
from tests.dispatcher.issuer import Issuer, published
from tests.ports.iam import Iam, Routed, iam


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
