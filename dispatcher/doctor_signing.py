"""Doctor's question to IAM: whether download URLs can be signed as the deployment signs them."""

from collections.abc import Callable
from datetime import timedelta

from google.auth import exceptions as auth

from dispatcher.artifacts import ArtifactStore
from dispatcher.doctor_bucket import FOLDER
from dispatcher.doctor_findings import DENIED, FINE, Check, Group, Outcome, Verdict, Wanted, needing
from dispatcher.errors import Unavailable
from dispatcher.permissions import Resource

URL_LIFE = timedelta(minutes=1)


def signing_group(store: Callable[[], ArtifactStore], account: str | None, wanted: Wanted) -> Group:
    """The check of who signs.

    Args:
        store: Opens what signs.
        account: The service account that does; None is the one that this process runs as.
        wanted: Whose needs are asked about.
    """
    on = f"the service account {account}" if account else "the service account itself"
    check = Check("signing", f"sign a download URL as {on}", lambda: _signed(store()))
    return Group(needing(check, wanted.grant(Resource.ITSELF, "iam.serviceAccounts.signBlob", on)))


def _signed(store: ArtifactStore) -> Verdict:
    try:
        url = store.download_url(store.uri(f"{FOLDER}/any"), URL_LIFE)
    except Unavailable as error:
        # So it says what IAM refuses, as it says that IAM does not answer.
        if isinstance(error.__cause__, auth.TransportError) and "PERMISSION_DENIED" in str(error.__cause__):
            return Verdict(Outcome.MISSING, DENIED, error.message)
        raise
    if url is None:
        message = "a person's login signs nothing: impersonate the service account, or set SIGNING_ACCOUNT"
        return Verdict(Outcome.UNKNOWN, "signs_nothing", message)
    if "X-Goog-Signature=" not in url:
        return Verdict(Outcome.UNKNOWN, "emulated", "this is an emulator, for which nothing is signed")
    return FINE
