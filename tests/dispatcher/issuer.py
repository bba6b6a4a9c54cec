"""An issuer of JWTs: keys made on the spot, published over real HTTP, and tokens signed with them."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from infra.local.servers import HOST, in_thread

ISSUER, AUDIENCE = "https://issuer.example.com", "gemma-export"
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_JWK = {**RSAAlgorithm.to_jwk(RSA_KEY.public_key(), as_dict=True), "kid": "rsa", "alg": "RS256", "use": "sig"}
EC_JWK = {**ECAlgorithm.to_jwk(EC_KEY.public_key(), as_dict=True), "kid": "ec", "alg": "ES256", "use": "sig"}


class Issuer:
    """Publishes keys over HTTP, or whatever else a test has it answer."""

    def __init__(self) -> None:
        self.answer = json.dumps({"keys": [RSA_JWK, EC_JWK]})
        self.status = HTTPStatus.OK
        self.fetches = 0
        self.url = ""

    def publish(self, *keys: dict[str, Any]) -> None:
        self.answer = json.dumps({"keys": keys})

    def environment(self) -> dict[str, str]:
        """The settings of a dispatcher that checks its tokens."""
        return {"JWT_ISSUER": ISSUER, "JWT_AUDIENCE": AUDIENCE, "JWT_JWKS_URL": self.url}


@contextmanager
def published() -> Iterator[Issuer]:
    """A JWKS endpoint on a port of its own, so that no key outlives its test in a cache."""
    issuer = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.fetches += 1
            self.send_response(issuer.status)
            self.end_headers()
            self.wfile.write(issuer.answer.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server, in_thread(server):
        issuer.url = f"http://{HOST}:{server.server_port}/jwks.json"
        yield issuer


def claims(**changes: Any) -> dict[str, Any]:
    """What a good token says; None leaves a claim out."""
    now = int(time.time())
    every = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "iat": now, "exp": now + 600, **changes}
    return {name: value for name, value in every.items() if value is not None}


def signed(key: Any = RSA_KEY, algorithm: str = "RS256", kid: str | None = "rsa", **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers={"kid": kid} if kid else None)
