"""Doctor's questions about where training jobs keep their adapters, which only an operator knows."""

import re
from collections.abc import Sequence
from functools import cache
from urllib.parse import urlsplit

from google.cloud.storage import Client

from dispatcher.artifacts import open_artifacts
from dispatcher.doctor_bucket import FOLDER
from dispatcher.doctor_findings import CALL_SECONDS, FINE, Check, Group, Outcome, Verdict, Wanted, needing
from dispatcher.errors import InvalidRequest
from dispatcher.google_errors import translating
from dispatcher.permissions import Resource

_LIST, _READ = "storage.objects.list", "storage.objects.get"


def adapter_groups(uris: Sequence[str], artifacts_url: str, wanted: Wanted) -> list[Group]:
    """The checks of each place; where none is given, one that says so.

    Args:
        uris: `gs://bucket` or `gs://bucket/prefix`.
        artifacts_url: The deployment's own store, which reads them all.
        wanted: Whose needs are asked about.

    Raises:
        InvalidRequest: One is no such URI (`uri_unsupported`).
    """
    for uri in uris:
        if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^\x00-\x1f]*)?", uri):
            raise InvalidRequest(f"--adapters {uri!r}: expected gs://bucket/prefix", code="uri_unsupported")
    if uris:
        return [_group(uri, artifacts_url, wanted) for uri in dict.fromkeys(uri.rstrip("/") for uri in uris)]
    message = "say where training jobs keep their adapters with --adapters gs://bucket/prefix"
    untold = Check("adapters", "read adapters", lambda: Verdict(Outcome.UNKNOWN, "not_asked", message))
    return [Group(needing(untold, wanted.grant(Resource.ADAPTERS, _READ, "wherever adapters lie")))]


def _group(uri: str, artifacts_url: str, wanted: Wanted) -> Group:
    parts = urlsplit(uri)
    bucket, prefix = parts.netloc, parts.path.lstrip("/")
    store = cache(lambda: open_artifacts(artifacts_url, patience=CALL_SECONDS))
    found: list[str] = []

    def listed() -> Verdict:
        # One of them: the store would list all that there is. And to that, a bucket that is gone is an empty one.
        with translating(f"bucket {bucket}"), Client(project=None) as client:
            page = client.list_blobs(
                bucket, prefix=f"{prefix}/" if prefix else None, max_results=1, timeout=CALL_SECONDS, retry=None
            )
            found.extend(blob.name for blob in page)
        if found:
            return FINE
        return Verdict(Outcome.OK, message=f"nothing lies under {uri}")

    def read() -> Verdict:
        name = found[0] if found else f"{prefix}/{FOLDER}".lstrip("/")
        store().exists(f"gs://{bucket}/{name}")
        return FINE

    # There may be several places, and each check is known by its name alone.
    listing = Check(f"adapters.list:{uri}", f"list adapters under {uri}", listed)
    reading = Check(f"adapters.get:{uri}", f"read what lies under {uri}", read, after=(listing.name,))
    return Group(
        [
            *needing(listing, wanted.grant(Resource.ADAPTERS, _LIST, f"gs://{bucket}")),
            *needing(reading, wanted.grant(Resource.ADAPTERS, _READ, uri)),
        ]
    )
