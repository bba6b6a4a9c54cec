"""Doctor's question to IAM: whether download URLs can be signed as the deployment signs them."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import google.auth
from google.auth import exceptions as auth
from google.auth.credentials import Credentials
from google.auth.transport.requests import Request

from dispatcher.artifacts import ArtifactStore
from dispatcher.doctor_bucket import FOLDER
from dispatcher.doctor_findings import CALL_SECONDS, DENIED, FINE, Check, Group, Outcome, Verdict, Wanted, needing
from dispatcher.errors import Unavailable
from dispatcher.google_errors import translating
from dispatcher.permissions import Resource

URL_LIFE = timedelta(minutes=1)
_UNKNOWN_YET = "default"
"""How a machine's credentials call their account before they have asked for a token."""


def account_at_hand(credentials: Credentials | None = None, *, request: Request | None = None) -> str | None:
    """The email of the service account that asks; None where that is a person.

    Args:
        credentials: Whose; None is whoever this process runs as.
        request: Sends what is asked of Google; None is over the network.

    Raises:
        Misconfigured: There are no credentials at all.
        Unavailable: They cannot be refreshed.
    """
    with translating("the account that asks"):
        if credentials is None:
            credentials, _ = google.auth.default()
        email: str | None = getattr(credentials, "service_account_email", None)
        if email == _UNKNOWN_YET:
            credentials.refresh(partial(request or Request(), timeout=CALL_SECONDS))
            email = getattr(credentials, "service_account_email", None)
    return email


def signing_group(
    store: Callable[[], ArtifactStore],
    account: str | None,
    wanted: Wanted,
    *,
    asking: Callable[[], str | None] = account_at_hand,
) -> Group:
    """The check of who signs.

    Args:
        store: Opens what signs.
        account: The service account that does; None is the one that this process runs as.
        wanted: Whose needs are asked about.
        asking: The account that asks for signatures.
    """
    on = f"the service account {account}" if account else "the service account itself"
    check = Check("signing", f"sign a download URL as {on}", lambda: _signed(store(), account, asking))
    return Group(needing(check, wanted.grant(Resource.ITSELF, "iam.serviceAccounts.signBlob", on)))


def _signed(store: ArtifactStore, account: str | None, asking: Callable[[], str | None]) -> Verdict:
    try:
        url = store.download_url(store.uri(f"{FOLDER}/any"), URL_LIFE)
    except Unavailable as error:
        # So it says what IAM refuses, as it says that IAM does not answer.
        if isinstance(error.__cause__, auth.TransportError) and "PERMISSION_DENIED" in str(error.__cause__):
            return _refused(error.message, account, asking)
        raise
    if url is None:
        message = "a person's login signs nothing: impersonate the service account, or set SIGNING_ACCOUNT"
        return Verdict(Outcome.UNKNOWN, "signs_nothing", message)
    if "X-Goog-Signature=" not in url:
        return Verdict(Outcome.UNKNOWN, "emulated", "this is an emulator, for which nothing is signed")
    return FINE


def _refused(said: str, account: str | None, asking: Callable[[], str | None]) -> Verdict:
    """Whoever may sign as itself refuses everybody else, even an owner of the project, and is sound."""
    if account is None or (found := asking()) == account:
        return Verdict(Outcome.MISSING, DENIED, said)
    message = f"asked by {found or 'a person'}, who need not be allowed to sign as {account}: {said}"
    remedy = f"ask as itself: gcloud auth application-default login --impersonate-service-account={account}"
    return Verdict(Outcome.UNKNOWN, "other_account", message, remedy)
