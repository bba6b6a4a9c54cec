"""What `gemma-export doctor` asks and finds: a check, a verdict, and how both are told."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from dispatcher.errors import ExportError
from dispatcher.logs import clean
from dispatcher.permissions import NEEDS, Identity, Resource

CALL_SECONDS = 10.0
"""For one call of a probe."""
CONTENT = b"gemma-export doctor\n"
"""Of a probe that is a file."""
MAX_MESSAGE = 600
"""Characters."""
DENIED, MISSING, AWAY, NO_CREDENTIALS = "permission_denied", "resource_missing", "unavailable", "no_credentials"
_REFUSALS = (DENIED, "source_forbidden")


class Outcome(StrEnum):
    """What became of a check."""

    OK = "ok"
    MISSING = "missing"
    """A permission, a resource or a connection."""
    WRONG = "wrong"
    """All is there, and not as it has to be."""
    UNKNOWN = "unknown"
    """It cannot be told from here, which is no failure."""


_CONNECT = "see that connections out are allowed from here, and ask again"
_REMEDIES: Mapping[str, str] = {
    MISSING: "`terraform apply` in infra/ makes it; or the environment names another than the deployment's",
    AWAY: _CONNECT,
    "timed_out": _CONNECT,
    **dict.fromkeys(("check_failed", "content_changed", "precondition_ignored"), "please report it"),
    NO_CREDENTIALS: "gcloud auth application-default login",
}
"""What to do where a verdict does not say it itself."""
_WORDS: Mapping[Outcome, str] = {
    Outcome.OK: "ok",
    Outcome.MISSING: "MISSING",
    Outcome.WRONG: "WRONG",
    Outcome.UNKNOWN: "cannot tell",
}


@dataclass(frozen=True)
class Verdict:
    """What a probe found.

    Attributes:
        outcome: In one word.
        code: Stable, for programs.
        message: For people: what was found.
        remedy: For people: what to do about it; empty where that follows from the permission.
    """

    outcome: Outcome
    code: str = "ok"
    message: str = ""
    remedy: str = ""


FINE = Verdict(Outcome.OK)


@dataclass(frozen=True)
class Grant:
    """A permission that somebody needs."""

    resource: Resource
    permission: str
    on: str
    """The resource's own name."""
    identities: tuple[Identity, ...]
    why: str


@dataclass(frozen=True)
class Check:
    """One question.

    Attributes:
        name: Stable, and unlike any other's of its group.
        asks: What is asked, for people.
        probe: Asks. An ExportError is a verdict too, see `verdict_of`.
        grant: The permission that a refusal shows the want of.
        requires: Checks of the same group, without all of which this one is not asked: it would tell nothing new.
        after: Checks of the same group; where none of them held, this one's refusal may have been for want of theirs.
        even_so: Whether to ask even after a connection was lost, since it cleans up.
    """

    name: str
    asks: str
    probe: Callable[[], Verdict]
    grant: Grant | None = None
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    even_so: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Group:
    """The checks of one connection, one after the other; groups do not wait for each other.

    Attributes:
        checks: In the order in which they are asked and told.
        close: Called at the end, whatever happened.
        left: The names of what was made to ask, and may be there still.
    """

    checks: Sequence[Check]
    close: Callable[[], object] = lambda: None
    left: Callable[[], Sequence[str]] = lambda: ()


@dataclass(frozen=True)
class Finding:
    """A check, and what it found."""

    check: Check
    verdict: Verdict

    @property
    def is_fault(self) -> bool:
        """Whether the deployment cannot do without what is missing or wrong."""
        return self.verdict.outcome in (Outcome.MISSING, Outcome.WRONG)

    def document(self) -> dict[str, Any]:
        """For programs."""
        grant = self.check.grant
        return {
            "check": self.check.name,
            "outcome": self.verdict.outcome.value,
            "code": self.verdict.code,
            "asked": self.check.asks,
            "permission": grant and grant.permission,
            "resource": grant and grant.on,
            "identities": [identity.value for identity in grant.identities] if grant else [],
            "why": grant and grant.why,
            "message": clean(self.verdict.message, limit=MAX_MESSAGE),
            "remedy": self._remedy(),
        }

    def told(self) -> str:
        """For people: a line, and what else there is to say under it."""
        grant, verdict = self.check.grant, self.verdict
        lines = [f"{_WORDS[verdict.outcome]:<12} {self.check.name:<28} {self.check.asks}"]
        if verdict.outcome is not Outcome.OK and verdict.message:
            lines.append(f"found: {verdict.message} ({verdict.code})")
        if self.is_fault and grant:
            names = ", ".join(grant.identities)
            lines.append(f"needs: {grant.permission} on {grant.on}, for {names} {grant.why}")
        if remedy := self._remedy():
            lines.append(f"do: {remedy}")
        cleaned = [clean(line, limit=MAX_MESSAGE) for line in lines]
        return f"\n{'':13}".join(cleaned)

    def _remedy(self) -> str:
        grant, verdict = self.check.grant, self.verdict
        if verdict.remedy or not self.is_fault:
            return verdict.remedy
        if verdict.code == DENIED and grant:
            by_hand = f"a role with {grant.permission} on {grant.on} for {', '.join(grant.identities)}"
            return f"`terraform apply` in infra/ grants it; by hand: {by_hand}"
        return _REMEDIES.get(verdict.code, "see what README's troubleshooting and table of settings say of it")


@dataclass(frozen=True)
class Wanted:
    """The identities whose needs are asked about."""

    identities: tuple[Identity, ...] = tuple(Identity)

    def grant(self, resource: Resource, permission: str, on: str) -> Grant | None:
        """Who of them needs a permission, and why; None where nobody does.

        Args:
            resource: What it is needed on.
            permission: Its name.
            on: The resource's own name.
        """
        reasons = {
            identity: need.why
            for identity in self.identities
            for need in NEEDS[identity]
            if need.resource is resource and permission in need.permissions
        }
        if not reasons:
            return None
        why = "; ".join(dict.fromkeys(reasons.values()))
        return Grant(resource, permission, on, tuple(reasons), why)


def needing(check: Check, grant: Grant | None) -> list[Check]:
    """The check, if somebody needs what it is about."""
    return [replace(check, grant=grant)] if grant else []


def verdict_of(error: ExportError) -> Verdict:
    """What an error of a port's says of a deployment."""
    if error.error_code in _REFUSALS:
        return Verdict(Outcome.MISSING, DENIED, error.message)
    if error.error_code in (MISSING, NO_CREDENTIALS):
        return Verdict(Outcome.MISSING, error.error_code, error.message)
    if error.retryable:
        return Verdict(Outcome.MISSING, AWAY, error.message)
    return Verdict(Outcome.WRONG, error.error_code, error.message)


def summary(findings: Iterable[Finding]) -> str:
    """How many there were of each outcome."""
    counts = dict.fromkeys(_WORDS.values(), 0)
    for finding in findings:
        counts[_WORDS[finding.verdict.outcome]] += 1
    return ", ".join(f"{number} {word}" for word, number in counts.items())
