"""Doctor's questions to what is no part of Google Cloud: the hub, and who publishes the keys of callers' JWTs."""

from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus

import httpx
import jwt

from dispatcher.bearer import BearerCheck
from dispatcher.doctor_findings import AWAY, CALL_SECONDS, FINE, Check, Group, Outcome, Verdict
from dispatcher.errors import Misconfigured
from dispatcher.settings import JwtCheck, Settings

HUB_URL = "https://huggingface.co"
_WHO_AM_I = "api/whoami-v2"
_OFFLINE = Verdict(Outcome.UNKNOWN, "not_asked", "not asked, since HF_HUB_OFFLINE is set: exports do not ask it either")
_MEND_KEYS = "mend JWT_JWKS_URL"
_NO_URL = "what is no URL"


def hub_group(settings: Settings) -> Group:
    """The checks of the hub that bases come from, asked as the exporter asks."""
    hub = (settings.hf_endpoint or HUB_URL).rstrip("/")
    asks = f"reach the hub at {shown(hub)}"
    if settings.hub_offline:
        return Group([Check("hub", asks, lambda: _OFFLINE)])
    checks = [Check("hub", asks, _unneeded(lambda: _reached(hub)) if settings.embedded else lambda: _reached(hub))]
    if token := settings.hf_token:
        known = Check("hub.token", "see that the hub knows HF_TOKEN", lambda: _token(hub, token), requires=("hub",))
        checks.append(known)
    return Group(checks)


def keys_group(check: JwtCheck) -> Group:
    """The check of where the keys are that callers' JWTs are signed with."""
    return Group([Check("jwt.keys", f"read the keys at {shown(check.jwks_url)}", lambda: _keys(check))])


def shown(url: str) -> str:
    """A URL without the user and password that may be in it."""
    try:
        found = httpx.URL(url)
    except httpx.InvalidURL:
        return _NO_URL
    is_web = found.scheme in ("http", "https") and found.host
    return str(found.copy_with(userinfo=b"")) if is_web else _NO_URL


def _unneeded(probe: Callable[[], Verdict]) -> Callable[[], Verdict]:
    """On a laptop, base and adapter may be directories."""

    def asked() -> Verdict:
        verdict = probe()
        if verdict.code != AWAY:
            return verdict
        message = f"{verdict.message}; exports of bases and adapters in directories do not need it"
        return replace(verdict, outcome=Outcome.UNKNOWN, message=message)

    return asked


def _reached(hub: str) -> Verdict:
    answer = _whoami(hub)
    if isinstance(answer, Verdict):
        return answer
    if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Verdict(Outcome.MISSING, AWAY, f"the hub answers {answer.status_code}")
    return FINE  # whoever shows no token is told 401


def _token(hub: str, token: str) -> Verdict:
    answer = _whoami(hub, {"Authorization": f"Bearer {token}"})
    if isinstance(answer, Verdict):
        return answer
    if answer.status_code == HTTPStatus.OK:
        return FINE
    if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        message = f"the hub refuses HF_TOKEN: {answer.status_code}"
        return Verdict(
            Outcome.WRONG, "hub_token_refused", message, "put a valid token into the job's HF_TOKEN, or none"
        )
    return Verdict(Outcome.UNKNOWN, "not_readable", f"the hub answers {answer.status_code}")


def _keys(check: JwtCheck) -> Verdict:
    where = shown(check.jwks_url)
    if where == _NO_URL or httpx.URL(check.jwks_url).userinfo:
        # Nothing is fetched from there, and what PyJWT says of it would repeat the password.
        message = f"JWT_JWKS_URL is {where}, or has a user in it: expected https://HOST/PATH"
        return Verdict(Outcome.WRONG, "jwt_keys_unusable", message, _MEND_KEYS)
    try:
        BearerCheck(check)  # which refuses some addresses
        keys = jwt.PyJWKClient(check.jwks_url, timeout=CALL_SECONDS).get_signing_keys()
    except jwt.PyJWKClientConnectionError as error:
        return Verdict(Outcome.MISSING, AWAY, f"the keys cannot be fetched: {error}")
    except (jwt.PyJWTError, ValueError, OSError) as error:
        return Verdict(Outcome.WRONG, "jwt_keys_unusable", f"no keys are there: {error}", _MEND_KEYS)
    return FINE if keys else Verdict(Outcome.WRONG, "jwt_keys_unusable", "no keys are there", _MEND_KEYS)


def _whoami(hub: str, headers: dict[str, str] | None = None) -> httpx.Response | Verdict:
    """What is answered to the question who one is, or why nothing is."""
    url = f"{hub}/{_WHO_AM_I}"
    if shown(hub) == _NO_URL:
        # What it is instead is not told: a part of it may be a password.
        raise Misconfigured("HF_ENDPOINT is no URL: expected https://HOST")
    try:
        return httpx.get(url, headers=headers, timeout=CALL_SECONDS)
    except httpx.HTTPError as error:
        return Verdict(Outcome.MISSING, AWAY, f"{shown(hub)} does not answer: {error}")
