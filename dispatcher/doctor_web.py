"""Doctor's questions to what is no part of Google Cloud: the hub, and who publishes the keys of callers' JWTs."""

from http import HTTPStatus

import httpx
import jwt

from dispatcher.bearer import BearerCheck
from dispatcher.doctor_findings import AWAY, FINE, Check, Group, Outcome, Verdict
from dispatcher.settings import JwtCheck

HUB_URL = "https://huggingface.co"
CALL_SECONDS = 10.0
_WHO_AM_I = "api/whoami-v2"


def hub_group(url: str | None, token: str | None) -> Group:
    """The checks of the hub that bases come from.

    Args:
        url: HF_ENDPOINT; None is the Hugging Face hub.
        token: HF_TOKEN, the exporter's own.
    """
    hub = (url or HUB_URL).rstrip("/")
    where = f"{hub}/{_WHO_AM_I}"
    checks = [Check("hub", f"reach the hub at {hub}", lambda: _reached(where))]
    if token:
        known = Check("hub.token", "see that the hub knows HF_TOKEN", lambda: _token(where, token), requires=("hub",))
        checks.append(known)
    return Group(checks)


def keys_group(check: JwtCheck) -> Group:
    """The check of where the keys are that callers' JWTs are signed with."""
    return Group([Check("jwt.keys", f"read the keys at {check.jwks_url}", lambda: _keys(check))])


def _reached(where: str) -> Verdict:
    answer = _answer(where)
    if isinstance(answer, Verdict):
        return answer
    if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Verdict(Outcome.MISSING, AWAY, f"the hub answers {answer.status_code}")
    return FINE  # whoever shows no token is told 401


def _token(where: str, token: str) -> Verdict:
    answer = _answer(where, {"Authorization": f"Bearer {token}"})
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
    try:
        BearerCheck(check)  # which refuses some addresses
        keys = jwt.PyJWKClient(check.jwks_url, timeout=CALL_SECONDS).get_signing_keys()
    except jwt.PyJWKClientConnectionError as error:
        return Verdict(Outcome.MISSING, AWAY, f"the keys cannot be fetched: {error}")
    except (jwt.PyJWTError, ValueError, OSError) as error:
        return Verdict(Outcome.WRONG, "jwt_keys_unusable", f"no keys are there: {error}", "mend JWT_JWKS_URL")
    return FINE if keys else Verdict(Outcome.WRONG, "jwt_keys_unusable", "no keys are there", "mend JWT_JWKS_URL")


def _answer(url: str, headers: dict[str, str] | None = None) -> httpx.Response | Verdict:
    """What is answered to a GET, or why nothing is."""
    try:
        return httpx.get(url, headers=headers, timeout=CALL_SECONDS)
    except httpx.HTTPError as error:
        return Verdict(Outcome.MISSING, AWAY, f"{url} does not answer: {error}")
