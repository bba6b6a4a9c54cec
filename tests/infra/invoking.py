"""A stand-in for what Cloud Run does before a request gets to a service that not everybody may invoke."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from infra.local.gateway import OWN_ISSUER
from infra.local.passing import Answer, Request, answering, passed_on, refusal

_SECONDS = 30.0


@contextmanager
def service(key: RSAPublicKey, container: Callable[[], str]) -> Iterator[str]:
    """A service; yields its URL, for which a caller's token has to be meant.

    Args:
        key: What Google's tokens are checked with.
        container: Says where the service's own server is, once there is a request.
    """

    def answer(request: Request) -> Answer:
        shown = {name.lower(): value for name, value in request.headers}.get("authorization", "")
        try:
            token = shown.removeprefix("Bearer ")
            jwt.decode(token, key, algorithms=["RS256"], issuer=OWN_ISSUER, audience=url)
        except jwt.PyJWTError as error:
            return refusal(HTTPStatus.UNAUTHORIZED, "text/html", f"Cloud Run: {error}".encode())
        # Whoever reads it there shall not be able to show it elsewhere.
        unsigned = f"Bearer {token.rpartition('.')[0]}.SIGNATURE_REMOVED_BY_GOOGLE"
        headers = [(name, unsigned if name.lower() == "authorization" else value) for name, value in request.headers]
        return passed_on(replace(request, headers=headers), container(), seconds=_SECONDS)

    with answering(answer) as url:
        yield url
