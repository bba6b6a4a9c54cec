"""Objects of a bucket put together into one, by the service itself: no byte of them passes through this process."""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from google.api_core import exceptions as api
from google.api_core.retry import Retry
from google.cloud.storage import Blob, Bucket

from dispatcher.artifacts import StoredFile
from dispatcher.crc32c import combined
from dispatcher.errors import ArtifactConflict, NotFound, Unavailable
from dispatcher.google_errors import FAULTS, translating

MAX_SOURCES = 32
"""Of one request (https://cloud.google.com/storage/docs/composite-objects)"""
_CONTENT_TYPE = "application/octet-stream"


@dataclass(frozen=True)
class _Object:
    """One generation of an object."""

    name: str
    generation: int
    size: int
    crc32c: str


class GcsComposer:
    """Puts objects together; a name that is taken is never overwritten.

    Args:
        bucket: Theirs.
        retry: How each request is tried again.
        timeout: Seconds that one request may take.
    """

    def __init__(self, bucket: Bucket, retry: Retry, timeout: float) -> None:
        self._bucket = bucket
        self._retry = retry
        self._timeout = timeout

    def compose(self, path: str, parts: Sequence[str], scratch: str) -> StoredFile:
        """See `ArtifactStore.compose`; more than 32 parts by way of objects under `scratch`."""
        level = [self._part(part) for part in parts]
        between: list[_Object] = []
        try:
            while len(level) > MAX_SOURCES:
                groups = [level[start : start + MAX_SOURCES] for start in range(0, len(level), MAX_SOURCES)]
                level = []
                for group in groups:
                    # A name of its own: who else composes the same deletes only what is theirs.
                    level.append(self._together(f"{scratch}/{secrets.token_hex(8)}.between", group))
                    between.append(level[-1])
            made = self._together(path, level)
        finally:
            for item in between:
                # What cannot be deleted lies beside the parts, and goes with them.
                with suppress(*FAULTS):
                    self._delete(item)
        return StoredFile(path.rpartition("/")[2], made.size, made.crc32c)

    def _part(self, name: str) -> _Object:
        found = self._found(name)
        if found is None:
            raise NotFound(f"there is no file {self._what(name)}", code="file_not_found")
        return found

    def _together(self, name: str, sources: Sequence[_Object]) -> _Object:
        """The object that is all of `sources`, made now or found."""
        expected = (
            sum(source.size for source in sources),
            combined((source.size, source.crc32c) for source in sources),
        )
        blob = self._bucket.blob(name)
        blob.content_type = _CONTENT_TYPE
        is_ours = True
        with translating(self._what(name)):
            try:
                # By generation alone: a precondition on a source would fail as one on the target does, with 412.
                blob.compose(
                    [self._bucket.blob(source.name, generation=source.generation) for source in sources],
                    if_generation_match=0,
                    retry=self._retry,
                    timeout=self._timeout,
                )
            except api.PreconditionFailed:
                is_ours = False  # or the answer to our own request was lost
            except api.NotFound as error:
                raise Unavailable(
                    f"a part of {self._what(name)} was deleted or replaced while they were put together: try again",
                    code="source_changed",
                ) from error
        if is_ours:
            made = _Object(name, int(blob.generation), int(blob.size), str(blob.crc32c))
        else:
            found = self._found(name)
            if found is None:
                raise Unavailable(
                    f"{self._what(name)} was deleted while it was published: try again", code="artifact_vanished"
                )
            made = found
        if (made.size, made.crc32c) == expected:
            return made
        if is_ours:
            with translating(self._what(made.name)):
                self._delete(made)
            raise Unavailable(
                f"{self._what(name)} is not what its parts are together, and was not kept: try again",
                code="upload_corrupted",
            )
        raise ArtifactConflict(
            f"{self._what(name)} is published already with other content: {made.size} bytes, crc32c {made.crc32c}; "
            f"the parts together have {expected[0]} bytes, crc32c {expected[1]}"
        )

    def _found(self, name: str) -> _Object | None:
        blob = self._bucket.blob(name)
        with translating(self._what(name)):
            try:
                blob.reload(retry=self._retry, timeout=self._timeout)
            except api.NotFound:
                return None
        return _Object(name, int(blob.generation), int(blob.size), str(blob.crc32c))

    def _delete(self, item: _Object) -> None:
        with suppress(api.NotFound, api.PreconditionFailed):
            blob: Blob = self._bucket.blob(item.name)
            blob.delete(if_generation_match=item.generation, retry=self._retry, timeout=self._timeout)

    def _what(self, name: str) -> str:
        return f"gs://{self._bucket.name}/{name}"
