"""What the Hugging Face hub's refusals mean, each with its own code and what to do about it.

How a refusal is told apart follows `hf_raise_for_status`, which reads the status and the headers X-Error-Code and
X-Error-Message: https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/utils/_http.py
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus

from dispatcher.errors import ExportError, SourceError, Unavailable

_WHOSE = "the request's hf_token, or else the deployment's HF_TOKEN"


@contextmanager
def translating(where: str, *, has_token: bool) -> Iterator[None]:
    """Raise our own errors for those of huggingface_hub, without theirs: their texts hold URLs, signed ones too.

    Args:
        where: What was asked for, as messages begin.
        has_token: Whether a token was sent.

    Raises:
        SourceError: `base_gated`, `base_missing`, `base_revision_missing`, `base_changed_on_hub`, `base_disabled`,
            `hub_token_invalid`, `hub_token_forbidden`.
        Unavailable: `hub_unavailable`.
    """
    import httpx
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, HFValidationError, OSError) as error:
        raise _translated(error, where, has_token) from None


def refuse(status: int, headers: Mapping[str, str], url: str, where: str, *, has_token: bool) -> None:
    """Raise for an answer of the hub's own as huggingface_hub and `translating` would; not below 400."""
    import httpx
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # documented there

    with translating(where, has_token=has_token):
        hf_raise_for_status(httpx.Response(status, headers=dict(headers), request=httpx.Request("GET", url)))


def unneeded(where: str) -> SourceError:
    """For a token that the hub does not know, and a model for which it asks none."""
    return SourceError(
        f"the hub refused the token for {where}, which is public and needs none. Leave hf_token out, or remove or "
        f"renew the one that is invalid or expired: {_WHOSE}.",
        code="hub_token_unneeded",
    )


def _translated(error: Exception, where: str, has_token: bool) -> ExportError:
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    # A subclass of RepositoryNotFoundError, so it comes first.
    if isinstance(error, GatedRepoError):
        return _gated(where, has_token)
    # With a token, 401 is about the token alone: a missing or private repository is 404 then. The library takes all but
    # one text for a missing repository, that of an expired token too.
    if status == HTTPStatus.UNAUTHORIZED and has_token:
        return SourceError(
            f"the hub refused the token for {where}: it is invalid or expired ({_WHOSE}). POST again with a valid "
            "hf_token.",
            code="hub_token_invalid",
        )
    if isinstance(error, DisabledRepoError):
        return SourceError(f"{where} has been disabled on the hub: choose another base.", code="base_disabled")
    if isinstance(error, RevisionNotFoundError):
        return SourceError(
            f"{where} is not there: the model is on the hub, this revision is not. Give a branch, tag or commit that "
            "it has, or none for its main branch.",
            code="base_revision_missing",
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return changed_on_hub(where, "the file is not there any more")
    if isinstance(error, RepositoryNotFoundError | HFValidationError) or status == HTTPStatus.UNAUTHORIZED:
        seen = "the account of this token may see" if has_token else "anybody may see; a private one needs an hf_token"
        return SourceError(
            f"{where} is neither a directory here nor a model on the hub that {seen}. Check the id.",
            code="base_missing",
        )
    if status == HTTPStatus.FORBIDDEN:
        todo = (
            f"the token lacks the permission ({_WHOSE}). Let it read this model, and gated ones if it is gated, or "
            "POST again with an hf_token of the role `read`."
            if has_token
            else "POST again with an hf_token of an account that may read it."
        )
        return SourceError(f"the hub forbids to read {where}: {todo}", code="hub_token_forbidden")
    told = f" (status {status})" if status else f" ({type(error).__name__})"
    return Unavailable(f"the hub did not deliver {where}{told}: try again later.", code="hub_unavailable")


def changed_on_hub(where: str, found: str) -> SourceError:
    """For what is not as it was when the export was planned: a commit never changes, so never a mixture of two."""
    return SourceError(
        f"{where} is not what the plan was made from: {found}. A commit does not change, so its repository was "
        "replaced, or HF_ENDPOINT is no faithful mirror. Nothing was published; export again.",
        code="base_changed_on_hub",
    )


def _gated(where: str, has_token: bool) -> SourceError:
    todo = (
        f"and the account of this token has no access ({_WHOSE}). Accept its licence on the hub with that account, or "
        "POST again with the hf_token of one that has access."
        if has_token
        else "and no token was given. Accept its licence on the hub and POST again with the hf_token of that account."
    )
    return SourceError(f"{where} is gated, {todo}", code="base_gated")
