"""What `gemma-export doctor` finds: in a sound deployment nothing, and of what is denied that and no more."""

import re
import secrets
import time
from collections.abc import Iterator

import pytest
from google.auth import compute_engine
from google.auth.credentials import Credentials
from google.cloud import secretmanager
from google.oauth2 import credentials as persons

from dispatcher.doctor_findings import Check, Finding, Outcome, Verdict, Wanted
from dispatcher.doctor_signing import account_at_hand, signing_group
from dispatcher.emulated import connected, emulator_of
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.gcs_signing import UrlSigner
from dispatcher.permissions import NEEDS, Identity, Resource
from infra.local import hub_state
from tests.buckets import new_bucket
from tests.dispatcher.deployed import ALL, Deployed, examined, faults_in, unknown_in
from tests.dispatcher.issuer import Issuer, published
from tests.ports.iam import MACHINE_ACCOUNT, TOKEN, Iam, Routed, iam


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
    findings = deployment.findings(adapters=adapters, environment={"HF_TOKEN": hub_state.TOKEN, **issuer.environment()})
    assert faults_in(findings) == {}
    assert unknown_in(findings) == {"signing": "emulated"}
    assert {"hub.token", "jwt.keys", "tokens.flow", "job.settings", f"adapters.get:{adapters[0]}"} <= findings.keys()
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


@pytest.mark.parametrize("denied", [set(), {"secretmanager.versions.add"}])
def test_the_secret_that_stays_is_gone_in_five_minutes(deployment: Deployed, denied: set[str]) -> None:
    """As README and the command's help promise, whether or not a token could be put into it."""
    deployment.secrets.denied = denied
    deployment.findings(Identity.DISPATCHER)
    (secret_id,) = {
        each.secret_id for each in deployment.secrets.requests if isinstance(each, secretmanager.CreateSecretRequest)
    }
    client = connected(secretmanager.SecretManagerServiceClient, emulator_of(deployment.environment["TOKENS_URL"]))
    secret = client.get_secret(name=f"projects/{deployment.project}/secrets/{secret_id}")
    client.transport.close()
    assert 0 < secret.expire_time.timestamp() - time.time() <= 300


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


def test_a_database_that_takes_what_it_has_to_refuse_is_wrong(deployment: Deployed) -> None:
    """All compare-and-set stands on preconditions. Only then something is left, and is named."""
    deployment.records.lenient = True
    findings = deployment.findings(Identity.DISPATCHER)
    assert faults_in(findings) == {"records.update": "precondition_ignored"}
    (left,) = deployment.documents()
    assert f"exports/{left}" in findings["records.update"].told()


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("project_id", "project-of-others"),
        ("records_url", "firestore://project-of-others/(default)"),
        ("artifacts_url", "gs://bucket-of-others"),
        ("tokens_url", "secretmanager://project-of-others"),
        ("max_attempts", "2"),
        ("lease_seconds", "90"),
        ("clock_skew_seconds", "60"),
    ],
)
def test_each_setting_that_both_sides_go_by_has_to_be_the_same(deployment: Deployed, name: str, value: str) -> None:
    """How long a lease is good is reckoned with on both, for one."""
    found = deployment.findings(Identity.TRIGGER, environment={name.upper(): value})["job.settings"]
    assert found.verdict.code == "job_differs"
    assert re.search(rf"\b{name} is .*, and '?{re.escape(value)}'? here", found.verdict.message)


def test_settings_that_one_side_goes_by_may_differ(deployment: Deployed) -> None:
    """A token's life, as only who puts it there tells it, and what concerns callers."""
    own = {"TOKEN_TTL_SECONDS": "3600", "COLLECT_AFTER_SECONDS": "86400", "MAX_UNFINISHED_PER_USER": "5"}
    assert deployment.faults(Identity.TRIGGER, environment=own) == {}


def signing(credentials: Credentials, server: Iam, account: str | None = None) -> Finding:
    """IAM's signBlob, spoken to for real."""
    bucket, request = new_bucket(), Routed(server.url)
    signer = UrlSigner(account, credentials=credentials, request=request)
    group = signing_group(
        lambda: GcsArtifacts(bucket, signer=signer),
        account,
        Wanted((Identity.DISPATCHER,)),
        asking=lambda: account_at_hand(credentials, request=request),
    )
    (finding,) = examined([group])
    return finding


def machine() -> Credentials:
    return compute_engine.Credentials(universe_domain="googleapis.com")


@pytest.mark.parametrize("account", [None, MACHINE_ACCOUNT])
def test_an_account_that_may_not_sign_as_itself_is_said(
    storage_server: str, signing_service: Iam, account: str | None
) -> None:
    """The signed URL, which opens a file, is not shown."""
    finding = signing(machine(), signing_service, account)
    assert finding.verdict.code == "ok"
    assert "Signature" not in finding.told()
    signing_service.refusing = True
    finding = signing(machine(), signing_service, account)
    assert (finding.verdict.code, finding.is_fault) == ("permission_denied", True)
    assert "iam.serviceAccounts.signBlob" in finding.told()


@pytest.mark.parametrize("person", [True, False])
def test_whether_another_account_may_sign_cannot_be_told_by_who_may_not(
    storage_server: str, signing_service: Iam, person: bool
) -> None:
    """Nobody else needs to be allowed to, not even an owner."""
    signer = "signer@project.iam.gserviceaccount.com"
    credentials = persons.Credentials(token=TOKEN) if person else machine()
    assert signing(credentials, signing_service, signer).verdict.code == "ok"
    signing_service.refusing = True
    finding = signing(credentials, signing_service, signer)
    assert (finding.verdict.outcome, finding.verdict.code) == (Outcome.UNKNOWN, "other_account")
    assert f"asked by {'a person' if person else MACHINE_ACCOUNT}," in finding.verdict.message
    assert f"--impersonate-service-account={signer}" in finding.told()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("permission_denied", "terraform apply"),
        ("resource_missing", "terraform apply"),
        ("unavailable", "connections out"),
        ("timed_out", "connections out"),
        ("no_credentials", "gcloud auth application-default login"),
        ("check_failed", "report it"),
        ("content_changed", "report it"),
        ("precondition_ignored", "report it"),
        ("call_refused", "README"),
    ],
)
def test_each_fault_comes_with_what_to_do(code: str, remedy: str) -> None:
    """Where the probe itself does not say it."""
    check = Check("a", "ask", lambda: verdict, Wanted().grant(Resource.TOPIC, "pubsub.topics.publish", "a topic"))
    verdict = Verdict(Outcome.MISSING, code, "found")
    assert remedy in Finding(check, verdict).document()["remedy"]
    assert f"do: {Finding(check, verdict).document()['remedy']}" in Finding(check, verdict).told()
