"""`gemma-export doctor`: whether everything that a deployment needs is there and allowed, asked without a trace.

What is needed says `permissions.NEEDS`. Each port's checks are a file of their own, `doctor_*.py`.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from urllib.parse import urlsplit

from dispatcher.artifacts import ArtifactStore, open_artifacts
from dispatcher.doctor_findings import (
    AWAY,
    DENIED,
    MISSING,
    NO_CREDENTIALS,
    Check,
    Finding,
    Group,
    Outcome,
    Verdict,
    Wanted,
    summary,
    verdict_of,
)
from dispatcher.errors import ExportError
from dispatcher.permissions import Identity
from dispatcher.settings import Settings

RUN_SECONDS = 60.0
"""A run takes no longer, whatever hangs. Each probe has a shorter limit of its own."""
_ENDING = (AWAY, MISSING, NO_CREDENTIALS)
"""After one of these the rest of a group would say the same again, and take its time."""


def told(
    settings: Settings,
    identities: Sequence[str],
    adapters: Sequence[str],
    *,
    hub_url: str | None,
    as_json: bool,
    say: Callable[[str], object],
) -> int:
    """Ask everything and say what was found, as it comes.

    Args:
        settings: The deployment's.
        identities: Names of `permissions.Identity`; none is all.
        adapters: As `groups`.
        hub_url: As `groups`.
        as_json: One JSON object a check, instead of text.
        say: Given each line, or several.

    Returns:
        The command's exit code: 1 where something is missing or wrong.
    """
    wanted = Wanted(tuple(map(Identity, identities)) or tuple(Identity))
    found = []
    for finding in examined(groups(settings, wanted, hub_url=hub_url, adapters=adapters)):
        found.append(finding)
        say(json.dumps(finding.document()) if as_json else finding.told())
    if not as_json:
        say(summary(found))
    return int(any(finding.is_fault for finding in found))


def groups(
    settings: Settings, wanted: Wanted, *, hub_url: str | None = None, adapters: Sequence[str] = ()
) -> list[Group]:
    """All checks of a deployment, in the order in which they are told.

    Args:
        settings: The deployment's.
        wanted: Whose needs are asked about.
        hub_url: Where the exporter finds the hub; None is the Hugging Face hub.
        adapters: `gs://` URIs under which training jobs keep their adapters.
    """
    # Here, since each brings in a client of Google's, and a laptop needs none of them.
    found: list[Group] = []
    if settings.records_url.startswith("firestore:"):
        from dispatcher.doctor_records import records_group

        found.append(records_group(settings.records_url, wanted))
    if settings.artifacts_url.startswith("gs:"):
        from dispatcher.doctor_adapters import adapter_groups
        from dispatcher.doctor_bucket import bucket_group

        found.append(bucket_group(urlsplit(settings.artifacts_url).netloc, wanted))
        found += adapter_groups(adapters, settings.artifacts_url, wanted)
    if settings.queue_url.startswith("pubsub:"):
        from dispatcher.doctor_topic import topic_group

        found.append(topic_group(settings.queue_url, wanted))
    if settings.runner_url.startswith("run:"):
        from dispatcher.doctor_job import job_group

        found.append(job_group(settings, wanted))
    if settings.tokens_url.startswith("secretmanager:"):
        from dispatcher.doctor_tokens import tokens_group

        found.append(tokens_group(settings.tokens_url, wanted))
    if settings.artifacts_url.startswith("gs:"):
        from dispatcher.doctor_signing import signing_group

        found.append(signing_group(_signer(settings), settings.signing_account, wanted))
    if settings.embedded:
        from dispatcher.doctor_laptop import laptop_group

        found.append(laptop_group(settings))
    if Identity.EXPORTER in wanted.identities:
        from dispatcher.doctor_web import hub_group

        found.append(hub_group(hub_url, settings.hf_token))
    if settings.jwt and Identity.DISPATCHER in wanted.identities:
        from dispatcher.doctor_web import keys_group

        found.append(keys_group(settings.jwt))
    return [group for group in found if group.checks]


def _signer(settings: Settings) -> Callable[[], ArtifactStore]:
    return cache(lambda: open_artifacts(settings.artifacts_url, signing_account=settings.signing_account))


def examined(found: Sequence[Group], *, limit: float = RUN_SECONDS) -> Iterator[Finding]:
    """Asks all checks, each group in a thread of its own; what each found, in the order of the checks.

    Args:
        found: The checks.
        limit: Seconds after which what has not answered is said not to.
    """
    deadline = time.monotonic() + limit
    answers = [_started(group) for group in found]
    for group, answered in zip(found, answers, strict=True):
        late = False
        for check in group.checks:
            try:
                if late:
                    raise queue.Empty
                yield Finding(check, answered.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                yield Finding(check, _skipped("an earlier one did not end") if late else _late(limit))
                late = True


def _started(group: Group) -> "queue.Queue[Verdict]":
    """The verdicts of a group's checks, as they come."""
    answers: queue.Queue[Verdict] = queue.Queue()

    def ask() -> None:
        unheld, ended = set[str](), ""
        try:
            for check in group.checks:
                lacking = next((name for name in check.requires if name in unheld), ended)
                verdict = _skipped(f"{lacking} failed") if lacking and not check.even_so() else _verdict(check)
                if verdict.code == DENIED and check.after and unheld.issuperset(check.after):
                    verdict = _hidden(check.after)
                if verdict.outcome is not Outcome.OK:
                    unheld.add(check.name)
                if verdict.code in _ENDING:
                    ended = ended or check.name
                answers.put(verdict)
        finally:
            group.close()

    # A daemon: what hangs for good must not keep the command from its end.
    threading.Thread(target=ask, name="doctor", daemon=True).start()
    return answers


def _verdict(check: Check) -> Verdict:
    try:
        return check.probe()
    except ExportError as error:
        return verdict_of(error)
    except Exception as error:  # noqa: BLE001  # the entry point of a thread: the other checks are still to be asked
        return Verdict(Outcome.WRONG, "check_failed", f"a fault of doctor's own: {type(error).__name__}: {error}")


def _skipped(why: str) -> Verdict:
    return Verdict(Outcome.UNKNOWN, "not_asked", f"not asked, since {why}")


def _hidden(names: Sequence[str]) -> Verdict:
    return Verdict(Outcome.UNKNOWN, "needs_another", f"asking needs what is missing for {', '.join(names)}")


def _late(limit: float) -> Verdict:
    return Verdict(Outcome.MISSING, "timed_out", f"no answer within {limit:.0f} s")
