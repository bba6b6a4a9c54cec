"""Who is calling: what the API Gateway vouches for, or the local user of a loopback server."""

import base64
import binascii
import json
from typing import Protocol

from dispatcher.errors import Unauthenticated

USERINFO_HEADER = "X-Apigateway-Api-Userinfo"
_LONGEST = 256


class Headers(Protocol):
    """A request's headers, looked up whatever their case."""

    def get(self, name: str, /) -> str | None: ...


def caller(headers: Headers, local_user: str | None) -> str:
    """The caller's user id: `sub` of the gateway's base64url JSON (padding may be missing).

    Args:
        headers: The request's headers.
        local_user: Who a caller without that header is; None everywhere but on a loopback server.

    Raises:
        Unauthenticated: Nobody vouches for the caller. A header that is there but garbled never falls back to
            the local user: it was meant to say something else.
    """
    header = headers.get(USERINFO_HEADER)
    if header is None:
        if local_user:
            return local_user
        raise _refused(f"no {USERINFO_HEADER} header: call through the API gateway")
    try:
        text = header.strip().rstrip("=").replace("-", "+").replace("_", "/")
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        claims = json.loads(data)
    except (binascii.Error, ValueError, RecursionError) as error:
        raise _refused(f"the {USERINFO_HEADER} header is no base64url JSON") from error
    subject = claims.get("sub") if isinstance(claims, dict) else None
    if not isinstance(subject, str) or not 0 < len(subject) <= _LONGEST or not subject.isprintable():
        raise _refused(f"the {USERINFO_HEADER} header names no caller: expected a text `sub`")
    return subject


def _refused(message: str) -> Unauthenticated:
    return Unauthenticated(message, headers={"WWW-Authenticate": "Bearer"})
