"""Doctor's questions to Secret Manager, of secrets that are not there; where one may be made, a token goes through.

What stays of that is a secret without a payload, which expires soon.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from urllib.parse import urlsplit

from google.api_core import exceptions as api
from google.cloud import secretmanager

from dispatcher.doctor_findings import CALL_SECONDS, FINE, Check, Grant, Group, Verdict, Wanted, needing
from dispatcher.emulated import connected, emulator_of
from dispatcher.google_errors import translating
from dispatcher.permissions import Resource
from dispatcher.tokens import open_tokens

TTL_SECONDS = 300
"""Of the secret that stays; README and the command's help promise it."""
_CREATE, _ADD, _UPDATE, _DESTROY, _ACCESS = (
    "secretmanager.secrets.create",
    "secretmanager.versions.add",
    "secretmanager.secrets.update",
    "secretmanager.versions.destroy",
    "secretmanager.versions.access",
)
_ABSENT = (api.NotFound, api.FailedPrecondition)


def tokens_group(url: str, wanted: Wanted) -> Group:
    """The checks of a project's secrets, `secretmanager://project`."""
    parts = urlsplit(url)
    project = f"projects/{parts.netloc}"
    export_id = f"doctor.{secrets.token_hex(8)}"
    # As the deployment names an export's secret: a grant may be for such names alone.
    secret_id = f"gemma-export-{hashlib.sha256(export_id.encode()).hexdigest()}"
    secret, on = f"{project}/secrets/{secret_id}", f"{project}/secrets/gemma-export-*"

    @cache
    def client() -> secretmanager.SecretManagerServiceClient:
        with translating(project):
            return connected(secretmanager.SecretManagerServiceClient, emulator_of(url))

    def absent(method: str, request: Mapping[str, object]) -> Callable[[], Verdict]:
        """Asks for what is not there, which whoever may not is not told."""

        def probe() -> Verdict:
            with translating(on), suppress(*_ABSENT):
                getattr(client(), method)(request=request, timeout=CALL_SECONDS, retry=None)
            return FINE

        return probe

    def create() -> Verdict:
        made = {"replication": {"automatic": {}}, "ttl": {"seconds": TTL_SECONDS}}
        request = {"parent": project, "secret_id": secret_id, "secret": made}
        with translating(project):
            client().create_secret(request=request, timeout=CALL_SECONDS, retry=None)
        return FINE

    def grant(permission: str) -> Grant | None:
        is_new = permission == _CREATE
        return wanted.grant(Resource.PROJECT if is_new else Resource.TOKENS, permission, project if is_new else on)

    version = {"name": f"{secret}/versions/1"}
    renewed = {"secret": {"name": secret, "ttl": {"seconds": TTL_SECONDS}}, "update_mask": {"paths": ["ttl"]}}
    added = {"parent": secret, "payload": {"data": b"none"}}
    asked = (
        (_ACCESS, "access", "read a token that is not there", absent("access_secret_version", version)),
        (_UPDATE, "update", "renew a secret that is not there", absent("update_secret", renewed)),
        (_ADD, "add", "put a token into a secret that is not there", absent("add_secret_version", added)),
        (_DESTROY, "destroy", "destroy a token that is not there", absent("destroy_secret_version", version)),
        (_CREATE, "create", f"make a secret in {project}", create),
    )
    checks: list[Check] = []
    for permission, name, asks, probe in asked:
        checks += needing(Check(f"tokens.{name}", asks, probe), grant(permission))
    if grant(_CREATE):
        before = tuple(check.name for check in checks)
        through = Check("tokens.flow", "keep a made-up token, and destroy it", lambda: _flow(url, export_id))
        checks.append(replace(through, requires=before))

    def close() -> None:
        if client.cache_info().currsize:
            client().transport.close()

    return Group(checks, close)


def _flow(url: str, export_id: str) -> Verdict:
    """The deployment's own way, into the secret that was made just now."""
    store = open_tokens(url, ttl_seconds=TTL_SECONDS)
    store.delete(store.put(export_id, "made-up-by-doctor"))
    return FINE
