"""Doctor's questions to the artifact bucket: a small object is really written, read and removed under each root.

IAM's own answer, testIamPermissions of a bucket, does not count roles that are granted for a prefix alone.
"""

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache

from google.api_core import exceptions as api
from google.cloud.storage import Client

from dispatcher.artifacts import ArtifactStore, open_artifacts, publish
from dispatcher.doctor_bucket_facts import bucket_facts, lifecycle, uniform_access
from dispatcher.doctor_findings import (
    CALL_SECONDS,
    CONTENT,
    FINE,
    Check,
    Grant,
    Group,
    Outcome,
    Verdict,
    Wanted,
    needing,
)
from dispatcher.errors import ExportError, Misconfigured
from dispatcher.google_errors import translating
from dispatcher.permissions import Resource
from dispatcher.published import BASES_ROOT, ROOTS

FOLDER = "_gemma-export-doctor"
"""No job's id and no base's name begins so, so that nobody takes a probe for an artifact."""
_LIST = "storage.objects.list"
_ROOTS: Mapping[str, Resource] = {
    **dict.fromkeys(ROOTS.values(), Resource.ARTIFACTS),
    BASES_ROOT: Resource.BASES,
}


def bucket_group(bucket: str, wanted: Wanted, *, patience: float = CALL_SECONDS) -> Group:
    """The checks of a bucket.

    Args:
        bucket: Its name.
        wanted: Whose needs are asked about.
        patience: Seconds after which Cloud Storage counts as away.
    """
    on = f"gs://{bucket}"
    store = cache(lambda: open_artifacts(on, patience=patience))

    @cache
    def client() -> Client:
        with translating(on):
            return Client(project=None)

    probes = [_Probe(store, client, bucket, root) for root in _ROOTS]

    def listed() -> Verdict:
        store().children(FOLDER)
        return FINE

    checks = needing(Check("bucket.list", f"list objects in {on}", listed), wanted.grant(Resource.BUCKET, _LIST, on))
    for probe in probes:
        checks += probe.checks(wanted)
    if checks:
        facts = cache(lambda: bucket_facts(client(), bucket))
        checks.append(Check("bucket.access", f"see that {on} has uniform access", lambda: uniform_access(facts())))
        checks.append(
            Check("bucket.lifecycle", f"see that no rule of {on} removes artifacts", lambda: lifecycle(facts()))
        )

    def close() -> None:
        for probe in probes:
            probe.close()
        if client.cache_info().currsize:
            client().close()

    return Group(checks, close, lambda: [probe.uri for probe in probes if probe.may_be_there])


class _Probe:
    """An object under a root, which is there while it is looked at.

    Attributes:
        uri: Its own.
        may_be_there: Whether it was written, and not removed yet, as far as is known.
    """

    def __init__(
        self, store: Callable[[], ArtifactStore], client: Callable[[], Client], bucket: str, root: str
    ) -> None:
        self._store = store
        self._client = client
        self._bucket = bucket
        self._root = root
        self._path = f"{root}/{FOLDER}/{secrets.token_hex(8)}"
        self._on = f"gs://{bucket}/{root}/"
        self.uri = f"gs://{bucket}/{self._path}"
        self.may_be_there = False

    def checks(self, wanted: Wanted) -> list[Check]:
        """What is asked of this root, of which some need nothing, and some no more than to read."""

        def grant(verb: str) -> Grant | None:
            return wanted.grant(_ROOTS[self._root], f"storage.objects.{verb}", self._on)

        create = Check(f"{self._root}.create", f"write a small object under {self._on}", self._create)
        # Where nothing was written these ask for what is not there, of which who may not list is told 403 as well.
        after = (create.name, "bucket.list") if grant("create") else ("bucket.list",)
        get = Check(f"{self._root}.get", f"read an object under {self._on}", self._get, after=after)
        delete = Check(f"{self._root}.delete", f"remove an object under {self._on}", self._delete, after=after)
        delete = replace(delete, even_so=lambda: self.may_be_there)
        return [
            *needing(create, grant("create")),
            *needing(get, grant("get")),
            *needing(delete, grant("delete")),
        ]

    def close(self) -> None:
        """Remove what could not be removed at its time."""
        if self.may_be_there:
            with suppress(ExportError):  # then it is named among what is left
                self._delete()

    def _create(self) -> Verdict:
        self.may_be_there = True  # even if there is no answer
        try:
            publish(self._store(), self._path, lambda writer: writer.write(CONTENT), size=len(CONTENT))
        except Misconfigured:
            self.may_be_there = False
            raise
        return FINE

    def _get(self) -> Verdict:
        if not self.may_be_there:
            self._store().exists(self.uri)
        elif self._store().read(self.uri) != CONTENT:
            return Verdict(Outcome.WRONG, "content_changed", f"{self.uri} holds something else than was written")
        return FINE

    def _delete(self) -> Verdict:
        # Not the store's own way, which lists and reads first: it has to go even where these are refused.
        with translating(self.uri), suppress(api.NotFound):
            self._client().bucket(self._bucket).blob(self._path).delete(timeout=CALL_SECONDS, retry=None)
        self.may_be_there = False
        return FINE
