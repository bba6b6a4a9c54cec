"""A stand-in for API Gateway: routes, checks tokens and forwards as a rendered infra/openapi.yaml tells it to.

What it does with headers and how it refuses is what ESPv2 does, the proxy that API Gateway is made of:
https://github.com/GoogleCloudPlatform/esp-v2. Where that is stricter (it sends back header names with an underscore),
this is not, so that nothing relies on it. It has no retries and no quota.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from urllib.parse import urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from dispatcher.bearer import ALGORITHMS, FORWARDED_HEADER
from dispatcher.identity import USERINFO_HEADER
from infra.local.passing import Answer, Headers, Request, answering, passed_on, refusal
from infra.swagger import Document

OWN_ISSUER = "https://accounts.google.com"
_OWN_SECONDS = 3600
_VARIABLE = re.compile(r"\\\{(\w+)\\\}")


@dataclass(frozen=True)
class Route:
    """What the document says of a request's path and method."""

    operation: Document
    parameters: Mapping[str, str]
    """What is in the place of each variable of the path."""


UNDEFINED = Route({"security": []}, {})
"""A path that the document has not, where it lets such through: whoever asks."""


class Refused(Exception):
    """The gateway says no by itself: in its own form, which is no problem document."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status

    def answer(self) -> Answer:
        body = json.dumps({"code": self.status, "message": str(self)}).encode()
        return refusal(self.status, "application/json", body)


class Gateway:
    """One API.

    Args:
        document: infra/openapi.yaml with its variables filled in; the backend's address is http://host:port.
        key: What the tokens of the gateway's own service account are signed with; elsewhere it is Google's.
    """

    def __init__(self, document: Document, key: RSAPrivateKey) -> None:
        self._document, self._key = document, key
        self._backend = document["x-google-backend"]
        [self._issuer] = document["securityDefinitions"].values()
        self._keys = jwt.PyJWKClient(self._issuer["x-google-jwks_uri"])

    def answer(self, request: Request) -> Answer:
        """Forward one request, or refuse it."""
        try:
            route = self._route(request.method, urlsplit(request.target).path)
            required = route.operation.get("security", self._document["security"])
            token = self._checked({name.lower(): value for name, value in request.headers}) if required else None
            target, headers = self._translated(request.target, route), self._headers(request.headers, token)
            seconds = self._backend["deadline"]
            return passed_on(
                replace(request, target=target, headers=headers), self._backend["address"], seconds=seconds
            )
        except TimeoutError:
            return Refused(HTTPStatus.GATEWAY_TIMEOUT, "upstream request timeout").answer()
        except Refused as refused:
            return refused.answer()

    def _route(self, method: str, path: str) -> Route:
        try:
            return self._defined(method, path)
        except Refused:
            if self._document["x-google-allow"] == "all":
                return UNDEFINED
            raise

    def _defined(self, method: str, path: str) -> Route:
        for template, operations in self._document["paths"].items():
            found = re.fullmatch(_VARIABLE.sub(r"(?P<\1>[^/]+)", re.escape(template)), path)
            if found:
                operation: Document | None = operations.get(method.lower())
                if operation is None:
                    raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{template} is defined, but not with this method")
                return Route(operation, found.groupdict())
        raise Refused(HTTPStatus.NOT_FOUND, "the current request is not defined by this API")

    def _translated(self, target: str, route: Route) -> str:
        """Where the backend is asked: https://cloud.google.com/api-gateway/docs/oasv2-extensions#path_translation."""
        path: str = urlsplit(self._backend["address"]).path.rstrip("/")
        match self._backend["path_translation"]:
            case "APPEND_PATH_TO_ADDRESS":
                return path + target
            case "CONSTANT_ADDRESS":
                query = [part for part in (urlsplit(target).query, urlencode(route.parameters)) if part]
                return "?".join([path or "/", *(["&".join(query)] if query else [])])
            case other:
                raise ValueError(f"path_translation is {other!r}: expected APPEND_PATH_TO_ADDRESS or CONSTANT_ADDRESS")

    def _checked(self, headers: dict[str, str]) -> str:
        [place] = self._issuer["x-google-jwt-locations"]
        value, prefix = headers.get(place["header"].lower(), ""), place["value_prefix"]
        if not value.startswith(prefix):
            raise Refused(HTTPStatus.UNAUTHORIZED, "Jwt is missing")
        token = value.removeprefix(prefix)
        try:
            jwt.decode(
                token,
                self._keys.get_signing_key_from_jwt(token),
                algorithms=ALGORITHMS,
                issuer=self._issuer["x-google-issuer"],
                audience=[audience.strip() for audience in self._issuer["x-google-audiences"].split(",")],
                options={"require": ["iss", "sub", "aud", "iat", "exp"]},
            )
        except jwt.PyJWTError as error:
            raise Refused(HTTPStatus.UNAUTHORIZED, f"Jwt is not good: {error}") from error
        return token

    def _headers(self, headers: Headers, token: str | None) -> Headers:
        own = {"authorization": f"Bearer {self._own_token()}"}
        for name, value in headers:
            if name.lower() == "authorization":
                own[FORWARDED_HEADER.lower()] = value
        if token is not None:
            # As it stands in the token, without padding. Where none is asked for, a caller's header is left alone.
            own[USERINFO_HEADER.lower()] = token.split(".")[1]
        kept = [(name, value) for name, value in headers if name.lower() not in own]
        return kept + list(own.items())

    def _own_token(self) -> str:
        """What the backend knows the gateway by."""
        now = int(time.time())
        claims = {"iss": OWN_ISSUER, "aud": self._backend["jwt_audience"], "iat": now, "exp": now + _OWN_SECONDS}
        return jwt.encode(claims, self._key, algorithm="RS256")


@contextmanager
def gateway(document: Document, key: RSAPrivateKey) -> Iterator[str]:
    """A gateway on a free port; yields its URL."""
    with answering(Gateway(document, key).answer) as url:
        yield url
