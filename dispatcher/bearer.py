"""The caller's own JWT, checked besides what the gateway says of it: a forged header alone must open nothing."""

from functools import cache
from urllib.parse import urlsplit

import jwt

from dispatcher.errors import Misconfigured, Unauthenticated, Unavailable
from dispatcher.identity import Headers, refused
from dispatcher.settings import JwtCheck

FORWARDED_HEADER = "X-Forwarded-Authorization"
"""Where API Gateway puts the caller's own token: Authorization holds the gateway's, meant for this function."""
ALGORITHMS = ("RS256", "ES256")
"""Never one with a shared secret: whoever has the public key could sign with it."""
LEEWAY_SECONDS = 30
FETCH_SECONDS = 5.0
KEYS_SECONDS = 300
"""How long fetched keys are used; then a key that was withdrawn is good no longer."""
REFETCH_SECONDS = 30.0
"""A token signed with an unknown key fetches the keys anew, but not more often: anyone can send such a token."""
_LOCAL = ("127.0.0.1", "localhost", "::1")
_REASONS: dict[type[jwt.PyJWTError], str] = {
    jwt.ExpiredSignatureError: "has expired",
    jwt.ImmatureSignatureError: "is not good yet",
    jwt.InvalidIssuerError: "is from another issuer",
    jwt.InvalidAudienceError: "is meant for another audience",
    jwt.MissingRequiredClaimError: "lacks a claim: expected exp, iss, aud and sub",
    jwt.InvalidSignatureError: "has a wrong signature",
    jwt.InvalidAlgorithmError: "is not signed as its key is meant to",
}


class BearerCheck:
    """Says whose a bearer token is.

    Args:
        check: What the token must say, and where its issuer publishes the keys.
        refetch_seconds: Least time between two fetches for the sake of unknown keys.

    Raises:
        Misconfigured: The keys would not come over https, nor from this machine.
    """

    def __init__(self, check: JwtCheck, *, refetch_seconds: float = REFETCH_SECONDS) -> None:
        parts = urlsplit(check.jwks_url)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL):
            raise Misconfigured(f"the keys' address is {check.jwks_url!r}: expected an https URL")
        self._check = check
        self._keys = jwt.PyJWKClient(
            check.jwks_url, lifespan=KEYS_SECONDS, timeout=FETCH_SECONDS, cooldown_duration=refetch_seconds
        )

    def subject(self, headers: Headers) -> str:
        """The `sub` of the token in a request's headers.

        Raises:
            Unauthenticated: There is no token, or it is not good; the reason repeats nothing of it.
            Unavailable: The issuer's keys cannot be fetched.
        """
        token = _bearer(headers)
        key = self._key(token)
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                issuer=self._check.issuer,
                audience=self._check.audience,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            reasons = (reason for kind, reason in _REASONS.items() if isinstance(error, kind))
            raise _bad(next(reasons, "is malformed")) from error
        return str(claims["sub"])

    def _key(self, token: str) -> jwt.PyJWK:
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise _bad("is malformed") from error
        # Before anything is fetched for its sake.
        if header.get("alg") not in ALGORITHMS:
            raise _bad(f"has another algorithm than {' or '.join(ALGORITHMS)}")
        if not header.get("kid"):
            raise _bad("does not say which key signed it")
        try:
            self._keys.get_signing_keys()
        except (jwt.PyJWTError, ValueError, OSError) as error:
            raise self._unavailable() from error
        try:
            return self._keys.get_signing_key(header["kid"])
        except (jwt.PyJWKClientConnectionError, jwt.PyJWKSetError, ValueError, OSError) as error:
            raise self._unavailable() from error
        except jwt.PyJWKClientError as error:
            raise _bad("is signed with a key that its issuer does not publish") from error

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"the keys at {self._check.jwks_url} cannot be read, so no caller can be checked: ask again")


@cache
def bearer_check(check: JwtCheck) -> BearerCheck:
    """The check of this process: one per setting, since it keeps the keys that it has fetched."""
    return BearerCheck(check)


def _bearer(headers: Headers) -> str:
    name = FORWARDED_HEADER
    value = headers.get(name)
    if value is None:
        name = "Authorization"
        value = headers.get(name)
    if value is None:
        raise refused(f"no {FORWARDED_HEADER} or Authorization header: expected one with a bearer token")
    scheme, _, token = value.strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise refused(f"the {name} header holds no bearer token")
    return token.strip()


def _bad(reason: str) -> Unauthenticated:
    return refused(f"the bearer token {reason}")
