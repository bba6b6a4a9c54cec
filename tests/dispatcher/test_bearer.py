"""With the JWT check on, the gateway's header is not enough: the caller's own token must bear it out."""

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dispatcher.bearer import FORWARDED_HEADER, BearerCheck
from dispatcher.errors import Misconfigured, Unauthenticated, Unavailable
from dispatcher.identity import USERINFO_HEADER
from dispatcher.settings import JwtCheck
from tests.dispatcher.issuer import (
    AUDIENCE,
    EC_JWK,
    EC_KEY,
    ISSUER,
    RSA_JWK,
    RSA_KEY,
    Issuer,
    claims,
    published,
    signed,
)
from tests.dispatcher.server import served
from tests.dispatcher.world import World

STRANGERS_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with published() as issuer:
        yield issuer


@pytest.fixture
def http(world: World, issuer: Issuer) -> Iterator[httpx.Client]:
    """The real HTTP API with the check on, and a local user who must not count."""
    environ = {"GEMMA_EXPORT_HOME": str(world.home), **issuer.environment()}
    with served(world, environ=environ) as client:
        yield client


def vouched(user: str = "ann") -> dict[str, str]:
    """The gateway's header."""
    return {USERINFO_HEADER: base64.urlsafe_b64encode(json.dumps({"sub": user}).encode()).decode()}


def asked(http: httpx.Client, token: str, **headers: str) -> httpx.Response:
    return http.get("/exports", headers={**vouched(), FORWARDED_HEADER: f"Bearer {token}", **headers})


def forged_with_public_key() -> str:
    """HS256, with the published RSA key for the shared secret; PyJWT itself refuses to sign so."""

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    public = RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    header = {"alg": "HS256", "typ": "JWT", "kid": "rsa"}
    text = f"{part(json.dumps(header).encode())}.{part(json.dumps(claims()).encode())}"
    return f"{text}.{part(hmac.digest(public, text.encode(), hashlib.sha256))}"


def tampered() -> str:
    """Another's payload under a good signature."""
    header, _, signature = signed().split(".")
    return f"{header}.{signed(sub='bob').split('.')[1]}.{signature}"


@pytest.mark.parametrize(
    "token",
    [
        lambda: signed(),
        lambda: signed(EC_KEY, "ES256", "ec"),
        lambda: signed(aud=["other", AUDIENCE]),
        lambda: signed(exp=int(time.time()) - 5),
    ],
    ids=["rsa", "ec", "one-of-its-audiences", "expired-within-the-leeway"],
)
def test_a_good_token_opens_the_api(http: httpx.Client, token: Callable[[], str]) -> None:
    """Signed by the issuer, for us, and of the very caller whom the gateway names."""
    assert asked(http, token()).status_code == HTTPStatus.OK


BAD: dict[str, tuple[Callable[[], str], str]] = {
    "alg-none": (lambda: jwt.encode(claims(), "", algorithm="none", headers={"kid": "rsa"}), "algorithm"),
    "public-key-as-secret": (forged_with_public_key, "algorithm"),
    "ec-token-under-rsa-kid": (lambda: signed(EC_KEY, "ES256", "rsa"), "not signed as its key is meant to"),
    "strangers-key": (lambda: signed(STRANGERS_KEY), "wrong signature"),
    "tampered": (tampered, "wrong signature"),
    "unknown-kid": (lambda: signed(STRANGERS_KEY, kid="stranger"), "does not publish"),
    "no-kid": (lambda: signed(kid=None), "which key"),
    "expired": (lambda: signed(exp=int(time.time()) - 60), "expired"),
    "not-yet": (lambda: signed(nbf=int(time.time()) + 600), "not good yet"),
    "other-audience": (lambda: signed(aud="other"), "audience"),
    "other-issuer": (lambda: signed(iss="https://other.example.com"), "issuer"),
    "other-sub": (lambda: signed(sub="bob"), "another caller"),
    "no-exp": (lambda: signed(exp=None), "lacks a claim"),
    "no-iss": (lambda: signed(iss=None), "lacks a claim"),
    "no-aud": (lambda: signed(aud=None), "lacks a claim"),
    "no-sub": (lambda: signed(sub=None), "lacks a claim"),
    "no-jwt": (lambda: "nonsense", "malformed"),
    "two-in-one": (lambda: f"{signed()}, Bearer {signed()}", "malformed"),
}


@pytest.mark.parametrize(("token", "reason"), BAD.values(), ids=BAD)
def test_a_bad_token_is_refused_with_a_plain_reason(
    http: httpx.Client, caplog: pytest.LogCaptureFixture, token: Callable[[], str], reason: str
) -> None:
    """Neither the answer nor a log line repeats any part of it."""
    text = token()
    response = asked(http, text)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (HTTPStatus.UNAUTHORIZED, "unauthenticated")
    assert reason in problem["detail"]
    assert response.headers["WWW-Authenticate"] == "Bearer"
    for part in filter(None, text.split(".")):
        assert part not in response.text
        assert part not in caplog.text


def test_without_a_token_nobody_is_someone(http: httpx.Client) -> None:
    """Neither the gateway's header alone, nor a token alone, nor the local user, nor another scheme."""
    bearer = {FORWARDED_HEADER: f"Bearer {signed()}"}
    for headers in ({}, vouched(), bearer, {**vouched(), FORWARDED_HEADER: f"Basic {signed()}"}):
        assert http.get("/exports", headers=headers).status_code == HTTPStatus.UNAUTHORIZED


def test_the_forwarded_header_goes_before_the_gateways_own_token(http: httpx.Client) -> None:
    """Where nothing was forwarded, Authorization is the caller's own."""
    own, gateways = f"Bearer {signed()}", f"Bearer {signed(sub='gateway')}"
    assert asked(http, signed(), Authorization=gateways).status_code == HTTPStatus.OK
    assert asked(http, signed(sub="bob"), Authorization=own).status_code == HTTPStatus.UNAUTHORIZED
    assert http.get("/exports", headers={**vouched(), "Authorization": own}).status_code == HTTPStatus.OK


def test_keys_are_fetched_once_for_many_requests(http: httpx.Client, issuer: Issuer) -> None:
    """Also for bad ones: whoever sends unknown keys must not have us hammer the issuer."""
    for _ in range(5):
        assert asked(http, signed()).status_code == HTTPStatus.OK
        assert asked(http, signed(STRANGERS_KEY, kid="stranger")).status_code == HTTPStatus.UNAUTHORIZED
    assert issuer.fetches == 1


@pytest.mark.parametrize(
    ("status", "answer"),
    [(503, ""), (200, "nonsense"), (200, "[]"), (200, '{"keys": []}'), (302, "")],
)
def test_keys_that_cannot_be_read_are_a_passing_fault(
    http: httpx.Client, issuer: Issuer, status: int, answer: str
) -> None:
    """503 and not 401: the token may be good; and once the keys are there, it is."""
    good = issuer.answer
    issuer.status, issuer.answer = HTTPStatus(status), answer
    response = asked(http, signed())
    assert (response.status_code, response.json()["code"]) == (HTTPStatus.SERVICE_UNAVAILABLE, "unavailable")
    issuer.status, issuer.answer = HTTPStatus.OK, good
    assert asked(http, signed()).status_code == HTTPStatus.OK


def test_an_issuer_that_nobody_listens_for_is_unavailable() -> None:
    """Nothing answers on that port."""
    check = BearerCheck(JwtCheck(ISSUER, AUDIENCE, "http://127.0.0.1:1/jwks.json"))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        check.subject({"Authorization": f"Bearer {signed()}"})


def test_a_rotated_key_is_found_and_the_old_one_is_gone(issuer: Issuer) -> None:
    """The first token of the new key has the keys fetched anew."""
    check = BearerCheck(JwtCheck(ISSUER, AUDIENCE, issuer.url), refetch_seconds=0)
    issuer.publish(RSA_JWK)
    assert check.subject({"Authorization": f"Bearer {signed()}"}) == "ann"
    issuer.publish(EC_JWK)
    assert check.subject({"Authorization": f"Bearer {signed(EC_KEY, 'ES256', 'ec')}"}) == "ann"
    with pytest.raises(Unauthenticated, match="does not publish"):
        check.subject({"Authorization": f"Bearer {signed()}"})


@pytest.mark.parametrize("url", ["http://issuer.example.com/jwks.json", "file:///etc/jwks.json", "jwks.json"])
def test_keys_come_over_https_or_from_this_machine(url: str) -> None:
    """Whoever can change them on their way can be anyone."""
    with pytest.raises(Misconfigured, match="expected an https URL"):
        BearerCheck(JwtCheck(ISSUER, AUDIENCE, url))


def test_only_a_check_imports_jwt() -> None:
    """In a fresh interpreter: a deployment without the check must not wait for that import."""
    program = "import sys, dispatcher.main; print(sorted({'jwt', 'cryptography'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
