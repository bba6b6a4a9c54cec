"""One version of an artifact: found published, or made, proved and published now. What claims and records it is
`exporter.job`."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactStore, StoredFile, file_uri
from dispatcher.contract import Artifact, ExportRecord, ExportType, TrainingJob, fingerprint_of
from dispatcher.errors import ArtifactConflict, ExportError, VerificationFailed
from dispatcher.published import MANIFEST_NAME, ROOTS, is_being_collected, spoilt_marks
from exporter.attempt import Attempt
from exporter.byte_source import changed
from exporter.lease import Hold
from exporter.making import Made
from exporter.manifest import (
    History,
    Identity,
    manifest_of,
    publish_manifest,
    read_manifest,
    still_holds,
)
from exporter.model_card import CARD_NAME
from exporter.sources import Base, is_current
from exporter.tasks import Tasks
from exporter.verify import vanished

log = logging.getLogger(__name__)
PROJECTOR_PREFIX = "mmproj-"
"""How llama.cpp's tools know a projector's file."""


@dataclass(frozen=True)
class Result:
    """What the record learns from a finished export."""

    artifact: Artifact
    adapter_fingerprint: str
    summary: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How an artifact is made, and what of."""

    make: Callable[[Attempt], Made | None]
    """None where the other tasks of the execution have the rest to make"""
    card: Callable[[Made], str]
    """The text of its model card"""
    base: Base | None
    """None where no base is read"""
    history: History


@dataclass(frozen=True)
class Work:
    """One export, however it is made."""

    store: ArtifactStore
    job: TrainingJob
    adapter_uri: str
    adapter_files: list[StoredFile]
    record: ExportRecord
    hold: Hold
    started: float = field(default_factory=time.monotonic)

    @property
    def fingerprint(self) -> str:
        """Of the adapter as it was listed."""
        return fingerprint_of([(file.name, file.size, file.crc32c) for file in self.adapter_files])

    def identity(self, base_id: str, base_revision: str, engine: str, engine_version: str) -> Identity:
        """What decides the artifact's bytes."""
        return Identity(
            export_type=self.record.export_type,
            quantization=self.record.quantization,
            base_id=base_id,
            base_revision=base_revision,
            adapter_fingerprint=self.fingerprint,
            engine=engine,
            engine_version=engine_version,
            nonce=self.record.force_nonce,
        )

    def found_or_made(self, identity: Identity, recipe: Recipe, tasks: Tasks) -> Result | None:
        """The artifact of an identity; None where this task's part of it is done, and others are still at theirs.

        Raises:
            ExportError: Bad input, a failed check, or a passing fault; what this attempt published is removed, unless
                another attempt or task may be using it or go on from it.
        """
        try:
            return self._made(identity, recipe, tasks)
        except ArtifactConflict as error:
            # With what a killed attempt left, on a machine that rounds otherwise; or another attempt has published it.
            log.warning("what is there is recorded, or else made anew: %s", error.message)
            found, manifest = _settled(self.store, self.job.job_id, identity)
            # Several tasks have spoilt it, so that it was passed over; one alone has removed it, if that was its to do.
            in_the_way = tasks.count == 1 and self.store.children(_directory(self.job.job_id, found))
            return self._made(found.instead() if manifest is None and in_the_way else found, recipe, tasks)

    def _made(self, wanted: Identity, recipe: Recipe, tasks: Tasks) -> Result | None:
        """The first version of an identity that is not spoilt: found, or written now."""
        identity, manifest = _settled(self.store, self.job.job_id, wanted)
        directory = _directory(self.job.job_id, identity)
        attempt = Attempt(self.store, directory)
        if tasks.count == 1 and self.hold.is_ours():
            # Also beside a manifest: who published that may have been killed before it removed the file's other name.
            self.store.remove_unpublished(directory)
            self.store.remove_unpublished(attempt.parts_directory)
        if manifest is not None:
            log.info("found finished, only recording it: %s", directory)
            _drop_parts(attempt)
            return _result(self.store, directory, manifest, {}, identity)
        self.hold.agree(identity.version, instead_of=identity.nonce)
        self.hold.cleared_by(partial(_take_back, attempt, self.hold, goes_on=False))
        try:
            made = recipe.make(attempt)
            if made is None:
                return self._made_by_others(wanted)
            text = recipe.card(made).encode()
            card = attempt.publish(CARD_NAME, lambda writer: writer.write(text), size=len(text))
            manifest = manifest_of(
                identity,
                adapter_uri=self.adapter_uri,
                files=[*made.files, card],
                tensors=made.tensors,
                verified=made.verified,
                history=recipe.history,
            )
            self.hold.report("publishing", 0.99)
            _refuse_changed(recipe.base, identity, self.store, self.adapter_uri)
            if not still_holds(self.store, directory, manifest):
                raise vanished(f"a file of {directory}")
            run: dict[str, Any] = {
                "wall_seconds": round(time.monotonic() - self.started, 3),
                "peak_rss_bytes": peak_rss_bytes(),
            }
            if made.logits is not None:
                run["logits"] = made.logits
            publish_manifest(self.store, directory, manifest, run)
            self.hold.cleared_by(partial(attempt.withdraw, self.hold, is_published=True))
        except BaseException as error:
            _take_back(attempt, self.hold, goes_on=_goes_on(error) and not self.hold.is_cancelled())
            if tasks.count > 1 and isinstance(error, ArtifactConflict | VerificationFailed):
                attempt.spoil()  # no task can tell whether others still count on what is wrong there
            raise
        _drop_parts(attempt)
        return _result(self.store, directory, manifest, run, identity)

    def _made_by_others(self, wanted: Identity) -> Result | None:
        """What the other tasks have published meanwhile; None where they are still at it."""
        identity, manifest = _settled(self.store, self.job.job_id, wanted)
        if manifest is None:
            return None
        return _result(self.store, _directory(self.job.job_id, identity), manifest, {}, identity)


def _refuse_changed(base: Base | None, identity: Identity, store: ArtifactStore, adapter_uri: str) -> None:
    """The manifest names what was read; so base and adapter must still be what they were at the start."""
    if base is not None and not is_current(base):
        raise changed("the base model")
    if store.fingerprint(adapter_uri) != identity.adapter_fingerprint:
        raise changed("the adapter")


def _directory(job_id: str, identity: Identity) -> str:
    return f"{ROOTS[ExportType(identity.export_type)]}/{job_id}/{identity.version}"


def _settled(store: ArtifactStore, job_id: str, identity: Identity) -> tuple[Identity, dict[str, Any] | None]:
    """The version to make or to record: its identity, and its manifest if it is published.

    A version that was published and has lost files since is passed over: nothing published is overwritten, and
    nobody else can mend it.
    """
    while True:
        directory = _directory(job_id, identity)
        # The marks first: whoever marks it after this look sees our claim in the record, and leaves it as it is.
        marks = spoilt_marks(store, directory)
        published = store.exists(store.uri(f"{directory}/{MANIFEST_NAME}"))
        if not published and not marks:
            return identity, None
        if not published or is_being_collected(marks):
            log.warning("another version is made instead: what lies in %s is not what belongs there", directory)
            identity = identity.instead()
            continue
        try:
            manifest = read_manifest(store, directory)
        except VerificationFailed as error:
            log.warning("another version is made instead: %s", error.message)
        else:
            if still_holds(store, directory, manifest):
                return identity, manifest
            log.warning("another version is made instead: %s has not the files that its manifest lists", directory)
        identity = identity.instead()


def _goes_on(error: BaseException) -> bool:
    """Whether there will be another attempt at this very version."""
    return isinstance(error, ExportError) and error.retryable and error.error_code != "source_changed"


def _take_back(attempt: Attempt, hold: Hold, *, goes_on: bool) -> None:
    """Remove what a failed attempt published, unless it goes on; what failed it counts, and not that this fails too."""
    try:
        if attempt.store.exists(attempt.store.uri(f"{attempt.directory}/{MANIFEST_NAME}")):
            # By somebody else, while this one slept: it may have noted a part since that is nobody's to go on from.
            _drop_parts(attempt)
        elif not goes_on:
            attempt.withdraw(hold)
    except ExportError as error:
        log.warning("files stay in %s: %s", attempt.directory, error.message)


def _drop_parts(attempt: Attempt) -> None:
    """Remove what nobody goes on from any more; the artifact is published, and that is what counts."""
    try:
        attempt.drop_parts()
    except ExportError as error:
        log.warning("%s stays: %s", attempt.parts_directory, error.message)


def _result(
    store: ArtifactStore, directory: str, manifest: dict[str, Any], run: dict[str, Any], identity: Identity
) -> Result:
    kind, uri = ExportType(identity.export_type), store.uri(directory)
    file = next((file["name"] for file in manifest["files"] if is_model_file(file["name"])), None)
    artifact = Artifact(
        kind=kind,
        uri=uri,
        file=None if file is None else file_uri(uri, file),
        version=identity.version,
        bytes=sum(file["bytes"] for file in manifest["files"]),
        files=len(manifest["files"]),
        manifest=store.uri(f"{directory}/{MANIFEST_NAME}"),
    )
    summary = {
        "engine": manifest["engine"]["name"],
        **manifest["tensors"],
        "verified": manifest["verified"],
        **run,
    }
    return Result(artifact, identity.adapter_fingerprint, summary)


def is_model_file(name: str) -> bool:
    """Whether a file is a whole model by itself: a GGUF, other than a projector."""
    return name.endswith(".gguf") and not name.startswith(PROJECTOR_PREFIX)


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident, in bytes; 0 where the system does not say.

    Not `getrusage`: its figure survives `exec`, so a small child of a large parent reports the parent's.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024
