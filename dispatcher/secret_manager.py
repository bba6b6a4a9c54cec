"""Tokens in Secret Manager: one secret per export, and a version of it for every token put."""

import hashlib
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import google_crc32c
from google.api_core import exceptions as api
from google.api_core.retry import Retry, if_exception_type
from google.cloud import secretmanager

from dispatcher.emulated import connected
from dispatcher.errors import ExportError, Unavailable
from dispatcher.google_errors import translating
from dispatcher.tokens import KEPT_TOKENS, token_expired

logger = logging.getLogger(__name__)

CALL_SECONDS = 10.0
_PAUSES = (0.1, 0.3, 0.9)
"""Seconds between tries, while Secret Manager does not agree with itself whether a secret is there."""
_PASSING = if_exception_type(api.TooManyRequests, api.ServerError, api.Aborted)

Answer = TypeVar("Answer")


class SecretManagerTokens:
    """Tokens of one Google Cloud project, reachable from the first of them on.

    A reference is the resource name of a version, with its number: only access by number is strongly consistent
    right after the version was added, `latest` may be old for minutes
    (https://cloud.google.com/secret-manager/docs/reference/consistency).

    Versions are destroyed, and the empty secret is left to its time to live. Deleted, it would take a version along
    that is just being added, which no precondition prevents: adding one does not change the secret's etag
    (https://cloud.google.com/secret-manager/docs/etags). And the next secret of that name would count from 1 again,
    so that an old reference could delete a new token.

    Args:
        project: The Google Cloud project's id or number.
        ttl_seconds: When Secret Manager deletes a secret, counted from the last `put`.
        emulator: `host:port` of a local server, spoken to without TLS and without credentials.
        timeout: Seconds for which one call is waited for and, after passing faults, repeated.

    Raises:
        Misconfigured: There are no credentials.
    """

    def __init__(
        self, project: str, *, ttl_seconds: int, emulator: str | None = None, timeout: float = CALL_SECONDS
    ) -> None:
        self._project = f"projects/{project}"
        self._what = f"Secret Manager of project {project}"
        self._ref = re.compile(
            rf"(?P<secret>{re.escape(self._project)}/secrets/gemma-export-[0-9a-f]{{64}})/versions/(?P<number>[1-9][0-9]{{0,8}})"
        )
        self._ttl = {"seconds": ttl_seconds}
        self._timeout = timeout
        with translating(self._what):
            self._client = connected(secretmanager.SecretManagerServiceClient, emulator)

    def put(self, export_id: str, token: str) -> str:
        secret_id = f"gemma-export-{hashlib.sha256(export_id.encode()).hexdigest()}"
        secret = f"{self._project}/secrets/{secret_id}"
        with translating(self._what):
            number = self._added(secret_id, secret, token.encode())
        if number > KEPT_TOKENS:
            try:
                self._destroy(secret, number - KEPT_TOKENS)
            except ExportError as error:
                # The new token is stored, which is what was asked for.
                logger.warning("an old version stays for now: %s", error)
        # Not the answer's own name: that has the project's number where ours may have its id.
        return f"{secret}/versions/{number}"

    def get(self, ref: str) -> str:
        if not self._ref.fullmatch(ref):  # it comes from a record, and must lead to no other secret
            raise token_expired()
        with translating(self._what):
            try:
                found = self._called(self._client.access_secret_version, name=ref)
            except (api.NotFound, api.FailedPrecondition) as error:  # the latter: destroyed or disabled
                raise token_expired() from error
        if google_crc32c.value(found.payload.data) != found.payload.data_crc32c:
            raise Unavailable(f"{self._what}: the token came damaged, its checksum is another: ask again")
        return found.payload.data.decode()

    def delete(self, ref: str) -> None:
        match = self._ref.fullmatch(ref)
        if match is None:
            return
        last = int(match["number"])
        # The referred one first, should it be the only one that can be destroyed; what came before all of these
        # was destroyed by `put`.
        for number in range(last, max(0, last - KEPT_TOKENS), -1):
            self._destroy(match["secret"], number)

    def _added(self, secret_id: str, secret: str, data: bytes) -> int:
        """The number of a new version, of a secret that is made where it is missing and else kept for longer."""
        payload = {"data": data, "data_crc32c": google_crc32c.value(data)}
        missing: api.NotFound | None = None
        for pause in (*_PAUSES, 0):
            created = self._created(secret_id)
            try:
                if not created:
                    renewed = {"name": secret, "ttl": self._ttl}
                    self._called(self._client.update_secret, secret=renewed, update_mask={"paths": ["ttl"]})
                # Repeated like any other call: when an answer was lost, a version too many does no harm.
                added = self._called(self._client.add_secret_version, parent=secret, payload=payload)
            except api.NotFound as error:
                # Its time ended a moment ago, or an operator deleted it: some of the servers have not heard.
                missing = error
                time.sleep(pause)
            else:
                return int(added.name.rpartition("/")[2])
        raise Unavailable(f"{self._what}: a secret of this export is just being deleted: ask again") from missing

    def _created(self, secret_id: str) -> bool:
        secret = {"replication": {"automatic": {}}, "ttl": self._ttl}
        try:
            self._called(self._client.create_secret, parent=self._project, secret_id=secret_id, secret=secret)
        except api.AlreadyExists:
            return False
        return True

    def _destroy(self, secret: str, number: int) -> None:
        with translating(self._what), suppress(api.NotFound, api.FailedPrecondition):  # gone, or destroyed before
            self._called(self._client.destroy_secret_version, name=f"{secret}/versions/{number}")

    def _called(self, method: Callable[..., Answer], **request: object) -> Answer:
        retry = Retry(predicate=_PASSING, initial=0.1, maximum=2.0, timeout=self._timeout)
        return method(request=request, retry=retry, timeout=self._timeout)
