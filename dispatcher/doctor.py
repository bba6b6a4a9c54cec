"""`gemma-export doctor`: whether everything that a deployment needs is there and allowed, asked without a trace.

What is needed says `permissions.NEEDS`. Each port's checks are a file of their own, `doctor_*.py`; what asks them is
`doctor_examination`.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from urllib.parse import urlsplit

from dispatcher.artifacts import ArtifactStore, open_artifacts
from dispatcher.doctor_examination import Examination
from dispatcher.doctor_findings import Finding, Group, Wanted, summary
from dispatcher.permissions import Identity
from dispatcher.settings import Settings


def told(
    settings: Settings,
    identities: Sequence[str],
    adapters: Sequence[str],
    *,
    as_json: bool,
    say: Callable[[str], object],
) -> int:
    """Ask everything and say what was found, as it comes.

    Args:
        settings: The deployment's.
        identities: Names of `permissions.Identity`; none is all.
        adapters: As `groups`.
        as_json: One JSON object a check, instead of text.
        say: Given each line, or several.

    Returns:
        The command's exit code: 1 where something is missing or wrong.
    """
    wanted = Wanted(tuple(map(Identity, identities)) or tuple(Identity))
    found: list[Finding] = []

    def tell(finding: Finding) -> None:
        found.append(finding)
        say(json.dumps(finding.document()) if as_json else finding.told())

    examination = Examination(groups(settings, wanted, adapters=adapters))
    try:
        for finding in examination.findings():
            tell(finding)
    finally:
        # Also of who interrupts: what was written to ask is removed first, or named.
        for finding in examination.end():
            tell(finding)
    if not as_json:
        say(summary(found))
    return int(any(finding.is_fault for finding in found))


def groups(settings: Settings, wanted: Wanted, *, adapters: Sequence[str] = ()) -> list[Group]:
    """All checks of a deployment, in the order in which they are told.

    Args:
        settings: The deployment's.
        wanted: Whose needs are asked about.
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

        found.append(hub_group(settings))
    if settings.jwt and Identity.DISPATCHER in wanted.identities:
        from dispatcher.doctor_web import keys_group

        found.append(keys_group(settings.jwt))
    return [group for group in found if group.checks]


def _signer(settings: Settings) -> Callable[[], ArtifactStore]:
    return cache(lambda: open_artifacts(settings.artifacts_url, signing_account=settings.signing_account))
