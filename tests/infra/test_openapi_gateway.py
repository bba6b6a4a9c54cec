"""The contract behind the gateway: what infra/openapi.yaml lets through, and for whom the dispatcher takes the caller.

The gateway is a stand-in that does what the rendered file says; behind it another does what Cloud Run does with whoever
invokes a service. Dispatcher and issuer of tokens are real servers.
"""

import base64
import copy
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from dispatcher.bearer import FORWARDED_HEADER
from dispatcher.identity import USERINFO_HEADER
from infra.local.gateway import gateway
from infra.local.servers import HOST
from infra.swagger import Document
from tests.dispatcher.issuer import AUDIENCE, EC_KEY, ISSUER, Issuer, published, signed
from tests.dispatcher.server import served
from tests.dispatcher.world import World
from tests.infra.invoking import service
from tests.infra.test_openapi import rendered

GOOGLES_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
"""What the tokens of service accounts are signed with."""
FORGED = base64.urlsafe_b64encode(json.dumps({"sub": "ann"}).encode()).decode()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """With one export, which is ann's."""
    world = World(tmp_path)
    world.job()
    world.submit()
    yield world
    world.close()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with published() as issuer:
        yield issuer


def filled_in(issuer: Issuer, backend_url: str) -> Document:
    """The file, for this backend and this issuer; tokens may be meant for somebody else besides."""
    audiences = f"other-app,{AUDIENCE}"
    values = {"jwt_issuer": ISSUER, "jwt_jwks_uri": issuer.url, "jwt_audiences": audiences}
    return rendered({"backend_url": backend_url, **values})


@pytest.fixture(params=["the gateway alone", "both"])
def http(request: pytest.FixtureRequest, world: World, issuer: Issuer) -> Iterator[httpx.Client]:
    """A client of the gateway; the dispatcher checks the callers' tokens itself as well, or does not."""
    with deployed(world, issuer, checks=request.param == "both") as backend_url:
        document = filled_in(issuer, backend_url)
        with gateway(document, GOOGLES_KEY) as url, httpx.Client(base_url=url, timeout=30) as client:
            yield client


@contextmanager
def deployed(world: World, issuer: Issuer, *, checks: bool) -> Iterator[str]:
    """The dispatcher as a service of Cloud Run's, which only a service account may invoke; yields its URL."""
    environment = {"GEMMA_EXPORT_HOME": str(world.home), **(issuer.environment() if checks else {})}
    with (
        served(world, user=None, environ=environment) as container,
        service(GOOGLES_KEY.public_key(), lambda: str(container.base_url)) as url,
    ):
        yield url


def bearer(user: str = "ann", **changes: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {signed(sub=user, **changes)}"}


def test_a_caller_is_who_the_token_says(http: httpx.Client) -> None:
    """On every route that asks for one."""
    assert http.get("/exports/job.merged", headers=bearer()).json()["export_id"] == "job.merged"
    assert [export["export_id"] for export in http.get("/exports", headers=bearer()).json()["exports"]] == [
        "job.merged"
    ]
    assert http.get("/exports", headers=bearer("bob")).json()["exports"] == []
    assert http.get("/exports/job.merged", headers=bearer("bob")).status_code == 403
    assert http.get("/exports/gone.merged", headers=bearer()).json()["code"] == "export_not_found"
    wanted = {"job_id": "job", "export_type": "gguf"}
    assert http.post("/export", json=wanted, headers=bearer("bob")).json()["code"] == "not_yours"
    submitted = http.post("/export", json=wanted, headers=bearer())
    assert (submitted.status_code, submitted.headers["Location"]) == (202, "/exports/job.gguf.q8_0")
    cancelled = http.post("/exports/job.gguf.q8_0/cancel", headers=bearer())
    assert cancelled.json()["state"] == "cancelled"
    assert http.get("/exports", params={"job_id": "other"}, headers=bearer()).json()["exports"] == []


def test_without_a_good_token_nothing_gets_to_the_dispatcher(http: httpx.Client) -> None:
    """The gateway itself says no, in its own form; what it would have set itself is no help."""
    good = bearer()["Authorization"]
    bad: list[dict[str, str]] = [
        {},
        {USERINFO_HEADER: FORGED},
        {USERINFO_HEADER: FORGED, FORWARDED_HEADER: good},
        {"Authorization": good.removeprefix("Bearer ")},
        {"Authorization": "Bearer nonsense"},
        bearer(exp=1),
        bearer(iss="https://someone.example.com"),
        bearer(aud="another-app"),
        bearer(key=EC_KEY, algorithm="ES256", kid="rsa"),
    ]
    for headers in bad:
        for method, path in (("GET", "/exports"), ("POST", "/export"), ("POST", "/exports/job.merged/cancel")):
            answer = http.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, 401), headers
    for name in ("Authorization", "authorization"):
        assert http.get("/exports", headers={name: good}).status_code == 200


def test_a_token_in_the_query_is_none(http: httpx.Client) -> None:
    """There it would be logged."""
    assert http.get("/exports", params={"access_token": signed()}).status_code == 401


def test_a_forged_header_changes_nothing(http: httpx.Client) -> None:
    """The token's owner is the caller, in whatever spelling the header comes, and with another's token beside it."""
    for name in (USERINFO_HEADER, USERINFO_HEADER.lower(), USERINFO_HEADER.replace("-", "_")):
        headers = {**bearer("bob"), name: FORGED, FORWARDED_HEADER: bearer("ann")["Authorization"]}
        assert http.get("/exports", headers=headers).json()["exports"] == [], name
        assert http.get("/exports/job.merged", headers=headers).status_code == 403, name


def test_health_is_open_and_believes_nobody(http: httpx.Client) -> None:
    """Without a token, with a bad one, and with a forged header, which the gateway leaves alone there."""
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {USERINFO_HEADER: FORGED}):
        answer = http.get("/health", headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"status": "healthy", "service": "export"})


def test_what_is_not_in_the_file_ends_at_the_gateway(http: httpx.Client) -> None:
    """HEAD and OPTIONS too, which the dispatcher itself would answer."""
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/Exports", 404),
        ("POST", "/sweep", 404),
        ("GET", "/exports/job.merged/files", 404),
        ("GET", "/exports/", 404),
        ("GET", "/export", 405),
        ("DELETE", "/exports/job.merged", 405),
        ("HEAD", "/health", 405),
        ("OPTIONS", "/exports", 405),
    ):
        answer = http.request(method, path, headers=bearer())
        assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/json"), (method, path)


def test_the_backend_lets_in_the_gateway_alone(world: World, issuer: Issuer) -> None:
    """By its own token, which is meant for the backend: not a caller's, and not one that is meant for another."""
    with deployed(world, issuer, checks=False) as backend_url:
        for headers in ({}, {USERINFO_HEADER: FORGED}, bearer()):
            assert httpx.get(f"{backend_url}/health", headers=headers).status_code == 401
        document = filled_in(issuer, backend_url)
        document["x-google-backend"]["jwt_audience"] = ISSUER
        with gateway(document, GOOGLES_KEY) as url:
            answer = httpx.get(f"{url}/exports", headers=bearer())
            assert (answer.status_code, answer.text) == (401, "Cloud Run: Audience doesn't match")


@pytest.mark.parametrize(
    ("extension", "path"),
    [({"x-google-allow": "all"}, "/sweep"), ({"path_translation": "CONSTANT_ADDRESS"}, "/health")],
)
def test_a_gateway_that_is_told_otherwise_does_otherwise(
    world: World, issuer: Issuer, extension: dict[str, str], path: str
) -> None:
    """So that the other tests can tell: any path gets to the dispatcher, or every path becomes another one."""
    with deployed(world, issuer, checks=False) as backend_url:
        document = filled_in(issuer, backend_url)
        (document if "x-google-allow" in extension else document["x-google-backend"]).update(extension)
        with gateway(document, GOOGLES_KEY) as url:
            answer = httpx.get(f"{url}{path}")
            assert (answer.status_code, answer.json()["code"]) == (404, "route_not_found")


def test_a_backend_that_is_too_slow_is_given_up(issuer: Issuer) -> None:
    """When the file's deadline is over, which here is a shorter one."""
    with socket.create_server((HOST, 0)) as silent:
        document = copy.deepcopy(filled_in(issuer, f"http://{HOST}:{silent.getsockname()[1]}"))
        assert document["x-google-backend"]["deadline"] == 60
        document["x-google-backend"]["deadline"] = 0.2
        with gateway(document, GOOGLES_KEY) as url:
            assert httpx.get(f"{url}/health", timeout=30).status_code == 504
