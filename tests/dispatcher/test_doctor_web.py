"""What `gemma-export doctor` finds of the hub and of who signs callers' tokens; and that it gives no password away."""

from collections.abc import Iterator
from http import HTTPStatus

import pytest

from dispatcher.doctor_findings import Finding, Outcome
from dispatcher.doctor_web import hub_group
from dispatcher.permissions import Identity
from dispatcher.settings import Settings
from infra.local.hub_state import TOKEN
from tests.dispatcher.deployed import Deployed, examined, faults_in, unknown_in
from tests.dispatcher.issuer import Issuer, published

PASSWORD = "secretOfAnn"
NOBODY = "127.0.0.1:1"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with published() as found:
        yield found


def told(findings: dict[str, Finding]) -> str:
    return "".join(finding.told() + str(finding.document()) for finding in findings.values())


def of_a_laptop(**environment: str) -> dict[str, Finding]:
    return {finding.check.name: finding for finding in examined([hub_group(Settings.from_env(environment))])}


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


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (HTTPStatus.OK, "ok"),
        (HTTPStatus.UNAUTHORIZED, "hub_token_refused"),
        (HTTPStatus.FORBIDDEN, "hub_token_refused"),
        (HTTPStatus.NOT_FOUND, "not_readable"),
    ],
)
def test_what_a_hub_answers_to_a_token_is_understood(issuer: Issuer, status: HTTPStatus, code: str) -> None:
    """A mirror may not know the question, which is no refusal."""
    issuer.status = status
    found = of_a_laptop(HF_ENDPOINT=issuer.url, HF_TOKEN="hf_token")
    assert [finding.verdict.code for finding in found.values()] == ["ok", code]


def test_a_laptop_needs_no_hub(deployment: Deployed) -> None:
    """Base and adapter may be directories; a deployment's bases are on the hub."""
    found = of_a_laptop(HF_ENDPOINT=f"http://{NOBODY}", HF_TOKEN="hf_token")
    assert {name: finding.verdict.outcome for name, finding in found.items()} == dict.fromkeys(
        ("hub", "hub.token"), Outcome.UNKNOWN
    )
    assert found["hub"].verdict.code == "unavailable"
    assert "directories" in found["hub"].told()
    deployment.hub.url = f"http://{NOBODY}"
    assert deployment.faults(Identity.EXPORTER) == {"hub": "unavailable"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HUB_OFFLINE", "1"), ("HF_HUB_OFFLINE", "true"), ("HF_HUB_OFFLINE", "ON"), ("TRANSFORMERS_OFFLINE", "1")],
)
def test_a_hub_that_exports_do_not_ask_is_not_asked(deployment: Deployed, name: str, value: str) -> None:
    """As huggingface_hub understands these variables; nor is a token shown to it."""
    offline = {name: value, "HF_TOKEN": "hf_badTokenOfNobody"}
    findings = deployment.findings(Identity.EXPORTER, environment=offline)
    assert faults_in(findings) == {}
    assert unknown_in(findings)["hub"] == "not_asked"
    assert "hub.token" not in findings
    assert deployment.hub.authorizations == set()
    assert deployment.faults(Identity.EXPORTER, environment={**offline, "HF_HUB_OFFLINE": "0"}) == {
        "hub.token": "hub_token_refused"
    }


@pytest.mark.parametrize(
    "address",
    [
        f"http://ann:{PASSWORD}@{NOBODY}",
        f"http://ann:{PASSWORD}@x@{NOBODY}/hub",
        f"https://ann:{PASSWORD}@nobody.invalid",
        f"http://ann:{PASSWORD}/x@{NOBODY}",
        f"ann:{PASSWORD}@{NOBODY}",
        f"http://ann:{PASSWORD}@[",
    ],
)
def test_no_password_in_an_address_is_told(deployment: Deployed, address: str) -> None:
    """Of the hub, or of the issuer's keys: neither in a question nor in what became of it."""
    of_the_jwt = {"JWT_ISSUER": "https://issuer.example.com", "JWT_AUDIENCE": "us", "JWT_JWKS_URL": address}
    environment = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_token", **of_the_jwt}
    findings = deployment.findings(Identity.EXPORTER, Identity.DISPATCHER, environment=environment)
    found = faults_in(findings)
    assert found.pop("jwt.keys") == "jwt_keys_unusable"
    assert found in ({"hub": "unavailable"}, {"hub": "misconfigured"})
    assert PASSWORD not in told(findings)


def test_an_address_of_the_hub_is_told_without_its_password_alone(deployment: Deployed) -> None:
    """The rest says where a connection was tried."""
    address = deployment.hub.url.replace("//", f"//ann:{PASSWORD}@")
    findings = deployment.findings(Identity.EXPORTER, environment={"HF_ENDPOINT": f"{address}/"})
    assert f"reach the hub at {deployment.hub.url}" in findings["hub"].told()
    assert PASSWORD not in told(findings)
    assert PASSWORD not in repr(deployment.settings({"HF_ENDPOINT": address}))
