"""Who is calling: what the API Gateway vouches for, or the local user of a loopback server."""

import base64
import binascii
import json
from typing import Protocol

from dispatcher.errors import Unauthenticated
from dispatcher.settings import JwtCheck

USERINFO_HEADER = "X-Apigateway-Api-Userinfo"
_LONGEST = 256


class Headers(Protocol):
    """A request's headers, looked up whatever their case."""

    def get(self, name: str, /) -> str | None: ...


def caller(headers: Headers, local_user: str | None, check: JwtCheck | None = None) -> str:
    """The caller's user id: `sub` of the gateway's base64url JSON (padding may be missing).

    Args:
        headers: The request's headers.
        local_user: Who a caller without that header is; None everywhere but on a loopback server.
        check: What the caller's own JWT must say as well; with it, there is no local user.

    Raises:
        Unauthenticated: Nobody vouches for the caller, or the caller's own JWT does not bear it out. A header that
            is there but garbled never falls back to the local user: it was meant to say something else.
        Unavailable: The keys that the JWT is checked with cannot be fetched.
    """
    if check is None:
        return _vouched(headers, local_user)
    # Here, since most deployments leave the check to the gateway and need not wait for its imports.
    from dispatcher.bearer import bearer_check

    subject = _vouched(headers, None)
    if bearer_check(check).subject(headers) != subject:
        raise refused(f"the bearer token is of another caller than the {USERINFO_HEADER} header")
    return subject


def _vouched(headers: Headers, local_user: str | None) -> str:
    header = headers.get(USERINFO_HEADER)
    if header is None:
        if local_user:
            return local_user
        raise refused(f"no {USERINFO_HEADER} header: call through the API gateway")
    try:
        text = header.strip().rstrip("=").replace("-", "+").replace("_", "/")
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        claims = json.loads(data)
    except (binascii.Error, ValueError, RecursionError) as error:
        raise refused(f"the {USERINFO_HEADER} header is no base64url JSON") from error
    subject = claims.get("sub") if isinstance(claims, dict) else None
    if not isinstance(subject, str) or not 0 < len(subject) <= _LONGEST or not subject.isprintable():
        raise refused(f"the {USERINFO_HEADER} header names no caller: expected a text `sub`")
    return subject


def refused(message: str) -> Unauthenticated:
    """The error of a caller nobody vouches for, with the challenge that RFC 9110 wants in a 401."""
    return Unauthenticated(message, headers={"WWW-Authenticate": "Bearer"})
