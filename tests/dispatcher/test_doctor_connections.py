"""What `gemma-export doctor` does when something does not answer: it says so, once and soon, and goes on."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dispatcher.doctor_examination import RUN_SECONDS
from dispatcher.doctor_findings import Check, Finding, Outcome, Verdict
from dispatcher.doctor_records import INDEXES
from dispatcher.permissions import Identity
from infra.local.servers import HOST
from tests.dispatcher.deployed import Deployed, faults_in

NOBODY = f"{HOST}:1"


@contextmanager
def silent() -> Iterator[str]:
    """A port that takes connections and says nothing."""
    with socket.create_server((HOST, 0), backlog=100) as server:
        yield f"{HOST}:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["away", "silent"])
def test_servers_that_do_not_answer_are_each_said_once_within_the_time(
    deployment: Deployed, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them at once: the rest of what would be asked of each is not."""
    with silent() as address:
        address = NOBODY if kind == "away" else address
        for name in ("FIRESTORE_EMULATOR_HOST", "PUBSUB_EMULATOR_HOST"):
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{address}")
        deployment.hub.url = f"http://{address}"
        urls = {name: deployment.environment[name] for name in ("RUNNER_URL", "TOKENS_URL")}
        environment = {name: f"{url.partition('=')[0]}={address}" for name, url in urls.items()}
        environment |= {"HF_TOKEN": "hf_token", "JWT_ISSUER": "https://issuer.example.com", "JWT_AUDIENCE": "us"}
        environment |= {"JWT_JWKS_URL": f"http://{address}/keys"}
        findings = deployment.findings(adapters=("gs://bucket-of-adapters",), environment=environment)
    adapters = "adapters.list:gs://bucket-of-adapters"
    firsts = ("records.get", "bucket.list", adapters, "topic.publish", "job.run", "tokens.access")
    assert faults_in(findings) == dict.fromkeys([*firsts, "hub", "jwt.keys"], "unavailable")
    others = {finding.verdict.code for finding in findings.values() if not finding.is_fault}
    assert others == {"not_asked", "emulated"}
    assert deployment.seconds < RUN_SECONDS / 2


def test_a_server_that_is_away_does_not_keep_the_others_from_being_asked(
    deployment: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a connection of its own."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", NOBODY)
    findings = deployment.findings(Identity.TRIGGER)
    assert faults_in(findings) == {"topic.publish": "unavailable"}
    assert findings["job.run"].verdict.outcome is Outcome.OK


def test_without_credentials_the_way_to_them_is_said(deployment: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Google's own clients, which look for them as soon as no emulator is named."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    environment = {name: deployment.environment[name].partition("?")[0] for name in ("RUNNER_URL", "TOKENS_URL")}
    findings = deployment.findings(Identity.DISPATCHER, environment=environment)
    assert faults_in(findings) == dict.fromkeys(("job.cancel", "tokens.update"), "no_credentials")
    assert "application-default login" in findings["tokens.update"].document()["remedy"]


def test_nothing_that_looks_like_a_secret_is_told() -> None:
    """Whatever a server has put into its message."""
    token, signature = "hf_" + "a" * 30, "X-Goog-Signature=" + "b" * 30
    verdict = Verdict(Outcome.MISSING, "unavailable", f"GET https://storage.example.com/x?{signature} with {token}")
    finding = Finding(Check("a", "ask", lambda: verdict), verdict)
    for told in (finding.told(), str(finding.document())):
        assert token not in told
        assert "b" * 30 not in told


def test_the_queries_that_need_an_index_are_those_of_the_indexes_file() -> None:
    """One that is in the file and never asked about could be missing unnoticed."""
    file = Path(__file__).parents[2] / "infra" / "firestore.indexes.json"
    indexes = json.loads(file.read_text())["indexes"]
    assert sorted(INDEXES) == sorted(tuple(each["fieldPath"] for each in index["fields"]) for index in indexes)
