"""Every way this system says no: one base, one subclass per decision that a caller can take.

A `code` is stable and is what programs compare; the message is for people and says what was found, what was
expected and what to do. `retryable` says whether the very same request can succeed later without a change.
"""

from http import HTTPStatus
from typing import Any, ClassVar


class ExportError(Exception):
    """Base of all errors that reach a caller, a record or an exit code.

    Args:
        message: For people: what was found, what was expected, what to do.
        code: Stable and machine-readable; the class's own when not given.
        headers: HTTP headers that belong to the answer (`Allow`, `Retry-After`).
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.error_code = code or self.code
        self.headers = headers or {}

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 problem document of this error."""
        return {
            "type": "about:blank",
            "title": self.status.phrase,
            "status": self.status.value,
            "detail": self.message,
            "code": self.error_code,
        }


class InvalidRequest(ExportError):
    """The request itself is wrong; sending it again unchanged will not help."""

    code = "invalid_request"
    status = HTTPStatus.BAD_REQUEST


class JobNotCompleted(InvalidRequest):
    """The training job is still running, or it failed: there is nothing to export yet."""

    code = "job_not_completed"


class BodyTooLarge(ExportError):
    """The body is over the limit."""

    code = "body_too_large"
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class Unauthenticated(ExportError):
    """Nobody vouches for the caller."""

    code = "unauthenticated"
    status = HTTPStatus.UNAUTHORIZED


class Forbidden(ExportError):
    """The job or export belongs to someone else."""

    code = "not_yours"
    status = HTTPStatus.FORBIDDEN


class NotFound(ExportError):
    """No such thing: route, training job, export or adapter; the code says which."""

    code = "not_found"
    status = HTTPStatus.NOT_FOUND


class MethodNotAllowed(ExportError):
    """The route exists, the method does not; `Allow` lists the ones that do."""

    code = "method_not_allowed"
    status = HTTPStatus.METHOD_NOT_ALLOWED


class Conflict(ExportError):
    """The export's state does not allow this."""

    code = "conflict"
    status = HTTPStatus.CONFLICT


class IllegalTransition(Conflict):
    """A move that the table of states does not have, or that someone else's live lease forbids."""

    code = "illegal_transition"


class LeaseHeld(IllegalTransition):
    """Someone else is at work on this export: step back."""

    code = "lease_held"


class LeaseLost(IllegalTransition):
    """The lease is no longer ours (cancelled, expired and taken over): stop before the next write."""

    code = "lease_lost"


class TooManyExports(ExportError):
    """The caller has too many unfinished exports; `Retry-After` says when to ask again."""

    code = "too_many_exports"
    status = HTTPStatus.TOO_MANY_REQUESTS
    retryable = True


class NotAvailable(ExportError):
    """The contract has it, this deployment does not."""

    code = "not_available"
    status = HTTPStatus.NOT_IMPLEMENTED


class Unavailable(ExportError):
    """A record store, queue, bucket or runner did not answer. Nothing was lost: ask again."""

    code = "unavailable"
    status = HTTPStatus.SERVICE_UNAVAILABLE
    retryable = True


class SweepIncomplete(Unavailable):
    """A sweep tended all that it could, and something did not get through: the next sweep tries that again.

    Args:
        missed: What did not get through, and why; the first few are enough.
        done: How often the sweep did what, that apart.
    """

    code = "sweep_incomplete"

    def __init__(self, missed: list[str], done: dict[str, int]) -> None:
        shown = "; ".join(missed[:3]) + ("; …" if len(missed) > 3 else "")
        counts = ", ".join(f"{number} {what}" for what, number in done.items() if number) or "nothing done"
        super().__init__(f"{counts}; {len(missed)} left to the next sweep: {shown}")
        self.missed = missed
        self.done = done


class LaunchInDoubt(Unavailable):
    """The runner was asked to start an execution and nobody knows whether it did.

    The export's lease must stay, so that no second execution is started beside that one before it runs out.
    """

    code = "launch_in_doubt"


class TokenExpired(ExportError):
    """The stored Hugging Face token is gone; POST again with `hf_token`."""

    code = "token_expired"
    status = HTTPStatus.BAD_REQUEST


class Misconfigured(ExportError):
    """A setting is missing or wrong; nothing works until the operator mends it."""

    code = "misconfigured"


class SourceError(ExportError):
    """The base model or the adapter cannot be used as it is: missing, damaged, or not a Gemma."""

    code = "source_unusable"
    status = HTTPStatus.BAD_REQUEST


class AdapterMismatch(ExportError):
    """Adapter and base do not fit each other. No other engine is tried: they get this silently wrong."""

    code = "adapter_mismatch"
    status = HTTPStatus.BAD_REQUEST


class Unsupported(ExportError):
    """The streaming engine does not do this kind of adapter; a reference engine may."""

    code = "unsupported_adapter"
    status = HTTPStatus.BAD_REQUEST


class VerificationFailed(ExportError):
    """What was written is not what was planned; nothing is published."""

    code = "verification_failed"


class ArtifactConflict(ExportError):
    """A published file of that name has other content. Nothing published is ever overwritten."""

    code = "artifact_conflict"
    status = HTTPStatus.CONFLICT


class StorageFull(ExportError):
    """No room for the artifact; the attempt's files were removed. Somebody must free some before asking again."""

    code = "storage_full"
    status = HTTPStatus.INSUFFICIENT_STORAGE
