"""Removes what earlier versions and abandoned attempts left in the artifact store, a grace period after they ended.

No lock is held meanwhile: a collector that sleeps for a day between deciding and deleting must do no harm either. So a
version is first marked, then the records are read once more, and only then, if nothing has changed in them, is it
deleted, and the mark after it. An exporter that looked for marks too early to find this one had claimed its export
before, which the records show; every later one finds it and makes another version instead. Each collector has marks of
its own, since another may be asleep.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from dispatcher import lifecycle
from dispatcher.artifacts import ArtifactStore, publish
from dispatcher.contract import UNFINISHED, ExportRecord, State
from dispatcher.errors import ExportError, SourceError, SweepIncomplete
from dispatcher.logs import bound
from dispatcher.published import COLLECTED_PREFIX, MANIFEST_NAME, PARTS_SUFFIX, ROOTS, SPOILT_PREFIX
from dispatcher.records import RecordStore

logger = logging.getLogger(__name__)

CANCELLED_GRACE = timedelta(hours=1)
"""After a cancellation nobody waits for anything; its exporter, which removes most by itself, has long seen it."""
MAX_RECORDS = 1000
"""Of cancelled exports, and of the others, that one run looks at."""
PATIENCE_SECONDS = 60.0
"""After which a run begins with no further export; the next one goes on from there."""
_MAX_EXPORTS = 1000
"""Of one job; there are about twenty kinds."""
_VERSION = re.compile(rf"([0-9a-f]{{12}})(?:{re.escape(PARTS_SUFFIX)})?")


class Collector:
    """Collects for the exports of one record store, whose artifact store nobody else publishes versions in.

    What a record names is kept. So is every published version of an export that is not completed, since its training
    job's document may name that as the last good one; and everything whose name is not a version's.

    Args:
        records: Says what ended when, and which versions are in use.
        artifacts: Where the versions lie.
        after: How long what an ended export left is kept. An older version may still be fetched meanwhile, by whoever
            was told its path or has a download URL for it; an attempt after a passing failure goes on from the parts.
        clock: The time now, in UTC.
    """

    def __init__(
        self,
        records: RecordStore,
        artifacts: ArtifactStore,
        *,
        after: timedelta,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._records = records
        self._artifacts = artifacts
        self._after = after
        self._clock = clock

    def collect(self) -> dict[str, int]:
        """Collect for the exports whose grace is over, those that wait longest first.

        Returns:
            `collected`: how many versions were removed, published or not.

        Raises:
            SweepIncomplete: Some of it did not get through; the rest was collected.
            ExportError: The record store does not say what there is to collect.
        """
        began, now = time.monotonic(), self._clock()
        removed, missed = 0, list[str]()
        due = self._records.list_uncollected({State.CANCELLED}, until=now - CANCELLED_GRACE, limit=MAX_RECORDS)
        due += self._records.list_uncollected(
            {State.COMPLETED, State.FAILED}, until=now - self._after, limit=MAX_RECORDS
        )
        for record in due:
            if time.monotonic() > began + PATIENCE_SECONDS:
                logger.info("the rest is left to the next run of the collector")
                break
            with bound(job_id=record.job_id, export_id=record.export_id):
                try:
                    removed += self._collected(record, now)
                except ExportError as error:
                    logger.warning("what was left beside %s stays for now: %s", record.export_id, error.message)
                    missed.append(f"{record.export_id}: {error.message}")
        if missed:
            raise SweepIncomplete(missed, {"collected": removed})
        return {"collected": removed}

    def _collected(self, record: ExportRecord, now: datetime) -> int:
        """How many versions were removed where this export's lie, which are also those of its other quantizations."""
        exports = self._sharing(record)
        if record not in exports:
            return 0  # queued anew, or collected with another
        if not all(self._is_quiet(each, now) for each in exports):
            self._note_collected([record])  # the one of them that ends last collects for all
            return 0
        root = f"{ROOTS[record.export_type]}/{record.job_id}"
        used = {artifact.version for each in exports for artifact in each.artifacts}
        found = {match[1] for name in self._artifacts.children(root) if (match := _VERSION.fullmatch(name))}
        doomed = [version for version in sorted(found - used) if self._is_waste(root, version, exports)]
        if not self._deleted(root, doomed, lambda: self._sharing(record) == exports):
            logger.info("nothing is collected: it was asked for again just now")
            return 0
        for version in sorted(found & used):
            self._artifacts.remove_unpublished(f"{root}/{version}")
            self._remove_parts(f"{root}/{version}")
        self._note_collected(exports)
        return len(doomed)

    def _deleted(self, root: str, versions: Sequence[str], is_unchanged: Callable[[], bool]) -> bool:
        """Whether the versions were deleted, since nothing had changed after all bore our mark."""
        name = f"{COLLECTED_PREFIX}{secrets.token_hex(8)}"
        marks = [f"{root}/{version}{PARTS_SUFFIX}/{name}" for version in versions]
        try:
            for mark in marks:
                publish(self._artifacts, mark, lambda writer: writer.write(b"being collected\n"))
            if not is_unchanged():
                return False
            for version in versions:
                # The manifest first: whatever is there when we die on the way is no published version.
                self._artifacts.delete_prefix(f"{root}/{version}/{MANIFEST_NAME}")
                self._artifacts.delete_prefix(f"{root}/{version}")
                self._remove_parts(f"{root}/{version}")
                logger.info("collected %s/%s", root, version)
        finally:
            for mark in marks:
                self._artifacts.delete_prefix(mark)
        return True

    def _sharing(self, record: ExportRecord) -> list[ExportRecord]:
        """The exports whose versions lie together with this one's, itself among them.

        Raises:
            ExportError: One of the job's cannot be read: nobody knows what it uses (`record_invalid`).
        """
        exports = self._records.list_exports(job_id=record.job_id, limit=_MAX_EXPORTS, strict=True)
        return [each for each in exports if each.export_type is record.export_type]

    def _is_quiet(self, record: ExportRecord, now: datetime) -> bool:
        """Whether an export ended so long ago that what it left is of no use to anybody."""
        grace = CANCELLED_GRACE if record.state is State.CANCELLED else self._after
        # A request that was taken back changes `updated_at` of an export that had ended long before.
        ended = record.uncollected_since or record.updated_at
        return record.state not in UNFINISHED and ended + grace <= now

    def _is_waste(self, root: str, version: str, exports: Sequence[ExportRecord]) -> bool:
        """Whether a version that no export names was never published, or was published and has a successor."""
        if self._artifacts.exists(self._artifacts.uri(f"{root}/{version}/{MANIFEST_NAME}")):
            makers = self._makers(f"{root}/{version}/{MANIFEST_NAME}", exports)
            return bool(makers) and all(maker.state is State.COMPLETED for maker in makers)
        left = [*self._artifacts.children(f"{root}/{version}"), *self._parts(f"{root}/{version}")]
        return bool(left)  # else only the mark of somebody who was killed

    def _makers(self, manifest: str, exports: Sequence[ExportRecord]) -> list[ExportRecord]:
        """The exports that may have published the version with this manifest: all, if it does not say."""
        try:
            document = json.loads(self._artifacts.read(self._artifacts.uri(manifest)))
        except (SourceError, ValueError, RecursionError):
            return list(exports)
        if not isinstance(document, dict) or "quantization" not in document:
            return list(exports)
        return [each for each in exports if each.quantization == document["quantization"]]

    def _parts(self, version: str) -> list[str]:
        """The names beside a version, without the marks: each is removed by whoever put it there."""
        names = self._artifacts.children(f"{version}{PARTS_SUFFIX}")
        return [name for name in names if not name.startswith(SPOILT_PREFIX)]

    def _remove_parts(self, version: str) -> None:
        for name in self._parts(version):
            self._artifacts.delete_prefix(f"{version}{PARTS_SUFFIX}/{name}")

    def _note_collected(self, exports: Sequence[ExportRecord]) -> None:
        """Where one was queued anew meanwhile, it will end, and be collected, again."""
        for record in exports:
            if record.uncollected_since is not None:
                self._records.replace_export(record, lifecycle.collected(record))
