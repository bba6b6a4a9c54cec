"""How the writing of a GGUF is divided, between tasks and attempts: in parts, put together when all are finished.

Into a bucket it is written in parts even by one task, so that one that is killed loses little. Elsewhere one task
writes the file at once: to put it together would be to copy it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from dispatcher.artifacts import ArtifactWriter, StoredFile, is_bucket
from exporter.attempt import Attempt
from exporter.gguf_file import GgufFile, GgufPart
from exporter.lease import Report
from exporter.lora import Delta
from exporter.merge import OnBytes, note
from exporter.merged_tensors import MergedTensors
from exporter.parts import Parts
from exporter.shared_pass import Share
from exporter.side_by_side import Progress
from exporter.tasks import Tasks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Division:
    """Who writes what of a file."""

    share: Share
    """The export's part in the passes over the base, which other quantizations may share"""
    tasks: Tasks
    """Which of the parts are this task's"""
    part_weights: int
    """How many weights a part has; the same for every task"""


@dataclass(frozen=True)
class Written:
    """A file that is complete, by whomever."""

    stored: StoredFile
    deltas: dict[str, Delta]
    """Of every changed tensor that it was made of, how far it went from the base's"""


def write_gguf(
    attempt: Attempt, file: GgufFile, merged: MergedTensors, report: Report, division: Division
) -> Written | None:
    """Write this task's parts of a file, those that are not finished yet; and the file, if none is missing then.

    Args:
        attempt: Where to.
        file: What to write.
        merged: What of.
        report: Told of stage and fraction; what it raises stops the work.
        division: Who writes what.

    Returns:
        None where other tasks are still at their parts.

    Raises:
        ExportError: As `Share.write`, `Attempt.publish` and `Attempt.compose`.
    """
    tasks = division.tasks
    in_parts = tasks.count > 1 or is_bucket(attempt.store)
    planned = file.parts(division.part_weights) if in_parts else [file.whole]
    sizes = {part.name: part.size for part in planned}
    parts = Parts(attempt, attempt.directory if planned[0].is_whole else attempt.parts_directory)
    found = parts.finished(sizes)
    if found:
        log.info("going on from %d of %d parts that are finished", len(found), len(sizes))
    progress = Progress(report, "quantizing", file.size, sum(sizes[name] for name in found))
    for part in tasks.deal(planned, [part.weights for part in planned]):
        if part.name not in found:
            fill = partial(_filled, part, merged, progress.add, division.share)
            found[part.name] = parts.write(part.name, fill, part.size)
    division.share.leave()  # nobody is to wait until this export is checked
    if tasks.count > 1:
        found |= parts.finished(sizes)
    if len(found) < len(sizes):
        return None
    deltas: dict[str, Delta] = {}
    for name in sizes:
        for tensor, delta in found[name].deltas.items():
            note(deltas, tensor, delta)
    stored = found[file.name].file if planned[0].is_whole else attempt.compose(file.name, [*sizes])
    return Written(stored, deltas)


def _filled(
    part: GgufPart, merged: MergedTensors, on_bytes: OnBytes, share: Share, writer: ArtifactWriter
) -> Mapping[str, Delta]:
    return share.write(part, writer, merged, on_bytes)
