"""What Google's clients raise, said in this system's own errors: one table for all five ports."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

import requests
from google.api_core import exceptions as api
from google.auth import exceptions as auth

from dispatcher.errors import ExportError, Misconfigured, Unavailable

FAULTS = (api.GoogleAPIError, auth.GoogleAuthError, requests.RequestException)
"""Everything that a client of Google's raises by design."""
_PASSING = (
    *(api.TooManyRequests, api.ServerError, api.Aborted, api.Cancelled, api.RetryError),
    *(auth.TransportError, auth.RefreshError, requests.RequestException),
)
_LONGEST = 300


def translated(error: Exception, what: str) -> ExportError:
    """One of `FAULTS` as an error of ours, to be raised `from` it.

    Args:
        error: What the client raised.
        what: What failed, as the beginning of a sentence ("Firestore, project p").

    Returns:
        Unavailable when the same call may succeed later: no answer, a limit, a fault of theirs. Misconfigured when
        an operator has to mend something first: not allowed, no such resource, no credentials.
    """
    said = str(error)[:_LONGEST]
    if isinstance(error, _PASSING):
        return Unavailable(f"{what} does not answer: {said}")
    if isinstance(error, auth.DefaultCredentialsError):
        return Misconfigured(f"{what} cannot be used without credentials: {said}", code="no_credentials")
    status = error.code if isinstance(error, api.GoogleAPICallError) else None
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Misconfigured(f"{what} refuses this service account: {said}", code="permission_denied")
    if status == HTTPStatus.NOT_FOUND:
        return Misconfigured(f"{what} does not exist: {said}", code="resource_missing")
    if isinstance(error, api.GoogleAPICallError):
        return Misconfigured(f"{what} refuses the call: {said}", code="call_refused")
    return Unavailable(f"{what} failed: {said}")


@contextmanager
def translating(what: str) -> Iterator[None]:
    """Raises what Google's clients raise inside as an error of ours; see `translated`."""
    try:
        yield
    except FAULTS as error:
        raise translated(error, what) from error
