"""Who signs download URLs: a service account, through IAM, so that no key lies anywhere.

Source: https://cloud.google.com/storage/docs/access-control/signed-urls
"""

import threading
from functools import partial

import google.auth
from google.auth import iam
from google.auth.credentials import Credentials, Signing
from google.auth.transport.requests import Request
from google.oauth2 import service_account

from dispatcher.google_errors import translating

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
"""Signing through IAM asks for it; the storage client's own scopes do not do."""
REQUEST_SECONDS = 4.0
"""The client's own two minutes are more than anyone waits for a status."""
_TOKEN_URI = "https://oauth2.googleapis.com/token"  # noqa: S105  # no secret; asked for, and never used here


class UrlSigner:
    """Signs as one service account; which one is found out at the first use.

    Args:
        account: Its email; None is the one that the credentials are of.
        credentials: Who asks IAM for a signature; None is whoever this process runs as.
        request: Sends what is asked of Google; None is over the network.
        timeout: Seconds for which one of its answers is waited for.
    """

    def __init__(
        self,
        account: str | None = None,
        *,
        credentials: Credentials | None = None,
        request: Request | None = None,
        timeout: float = REQUEST_SECONDS,
    ) -> None:
        self._account = account
        self._credentials = credentials
        self._request = partial(request or Request(), timeout=timeout)
        self._lock = threading.Lock()
        self._known: list[Signing | None] = []

    def credentials(self) -> Signing | None:
        """What signs; None where the credentials of this process are a person's, and no account is named.

        Raises:
            Misconfigured: There are no credentials at all.
            Unavailable: They cannot be refreshed.
        """
        with self._lock, translating("signing of download URLs"):
            if not self._known:
                self._known.append(self._found())
            return self._known[0]

    def _found(self) -> Signing | None:
        credentials, request = self._credentials, self._request
        if credentials is None:
            credentials, _ = google.auth.default(scopes=[_SCOPE])
        if self._account is None and isinstance(credentials, Signing):
            return credentials
        if self._account is None and not credentials.token:
            # Only after a refresh does a machine's own service account know its email.
            credentials.refresh(request)
        account = self._account or getattr(credentials, "service_account_email", None)
        if account is None:
            return None
        return service_account.Credentials(iam.Signer(request, credentials, account), account, _TOKEN_URI)
