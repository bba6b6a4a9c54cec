"""The recipe of a merged model: plan, write, verify, prove. What claims and records it is `exporter.job`."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactStore, StoredFile
from dispatcher.contract import Artifact, ExportRecord, ExportType, TrainingJob, fingerprint_of
from dispatcher.errors import ArtifactConflict, ExportError, SourceError, Unsupported, VerificationFailed
from exporter.attempt import Attempt
from exporter.checkpoint import changed
from exporter.engines import Engine, engine_of, reference_for
from exporter.gemma import family_of
from exporter.lease import Hold
from exporter.making import Checks
from exporter.manifest import (
    MANIFEST_NAME,
    Identity,
    manifest_of,
    publish_manifest,
    read_manifest,
    still_holds,
)
from exporter.sources import Base, TokenSource, adapter_here, is_current, open_base
from exporter.verify import vanished

log = logging.getLogger(__name__)
ROOT = "merged_models"


@dataclass(frozen=True)
class Result:
    """What the record learns from a finished export."""

    artifact: Artifact
    adapter_fingerprint: str
    summary: dict[str, Any]


def export_merged(
    store: ArtifactStore,
    job: TrainingJob,
    record: ExportRecord,
    *,
    engine: str,
    token: TokenSource,
    hold: Hold,
    checks: Checks,
) -> Result:
    """Make the merged model of a training job, or find it made already.

    Args:
        store: Where artifacts lie.
        job: The training job; its adapter exists.
        record: The claimed export.
        engine: `auto`, `streaming`, `peft` or `unsloth`. `auto` is streaming, and a reference engine only where
            that says `unsupported_…`.
        token: Gives a Hugging Face token for a gated base.
        hold: Told of stage and fraction; what it raises stops the work.
        checks: How much is verified.

    Raises:
        ExportError: Bad input, a failed check, or a passing fault; what this attempt published is removed, unless
            another attempt may be using it.
    """
    hold.report("planning", 0.0)
    if job.adapter_path is None:
        raise SourceError(f"training job {job.job_id} names no adapter.", code="adapter_missing")
    base = open_base(job.base_model_id, job.base_model_revision, token)
    family_of(base.config)
    adapter_files = store.list(job.adapter_path)
    work = _Work(store, job, job.adapter_path, adapter_files, record, base, hold, checks)
    if engine != "auto":
        return work.made_with(engine_of(engine))
    try:
        return work.made_with(engine_of("streaming"))
    except Unsupported as error:
        reference = reference_for(error, base, adapter_files)
        log.warning("%s The %s engine makes it instead.", error.message, reference.name)
        return work.made_with(reference)


@dataclass(frozen=True)
class _Work:
    """One export, whichever engine makes it."""

    store: ArtifactStore
    job: TrainingJob
    adapter_uri: str
    adapter_files: list[StoredFile]
    record: ExportRecord
    base: Base
    hold: Hold
    checks: Checks
    started: float = field(default_factory=time.monotonic)

    def made_with(self, engine: Engine) -> Result:
        """The artifact that an engine makes, found or made now."""
        facts = [(file.name, file.size, file.crc32c) for file in self.adapter_files]
        identity = Identity(
            export_type=ExportType.MERGED,
            quantization=None,
            base_id=self.job.base_model_id,
            base_revision=self.base.revision,
            adapter_fingerprint=fingerprint_of(facts),
            engine=engine.name,
            engine_version=engine.version(),
            nonce=self.record.force_nonce,
        )
        try:
            return self._made(identity, engine)
        except ArtifactConflict as error:
            # With what a killed attempt left, on a machine that rounds otherwise; or another attempt has published it.
            log.warning("what is there is recorded, or else another version is made: %s", error.message)
            found, manifest = _settled(self.store, self.job.job_id, identity)
            return self._made(found if manifest is not None else found.instead(), engine)

    def _made(self, wanted: Identity, engine: Engine) -> Result:
        """The first version of an identity that is not spoilt: found, or written now."""
        identity, manifest = _settled(self.store, self.job.job_id, wanted)
        directory = _directory(self.job.job_id, identity)
        if manifest is not None:
            log.info("found finished, only recording it: %s", directory)
            return _result(self.store, directory, manifest, {}, identity)
        if self.hold.is_ours():
            self.store.remove_unpublished(directory)
        attempt = Attempt(self.store, directory)
        try:
            with adapter_here(self.store, self.adapter_uri, self.adapter_files) as adapter_dir:
                made = engine.make(attempt, self.base, adapter_dir, self.hold.report, self.checks)
            manifest = manifest_of(
                identity,
                adapter_uri=self.adapter_uri,
                files=made.files,
                tensors=made.tensors,
                verified=made.verified,
            )
            self.hold.report("publishing", 0.99)
            _refuse_changed(self.base, identity, self.store, self.adapter_uri)
            if not still_holds(self.store, directory, manifest):
                raise vanished(f"a file of {directory}")
            run = {"wall_seconds": round(time.monotonic() - self.started, 3), "peak_rss_bytes": peak_rss_bytes()}
            publish_manifest(self.store, directory, manifest, run)
        except BaseException:
            _take_back(attempt, self.hold)
            raise
        return _result(self.store, directory, manifest, run, identity)


def _refuse_changed(base: Base, identity: Identity, store: ArtifactStore, adapter_uri: str) -> None:
    """The manifest names what was read; so base and adapter must still be what they were at the start."""
    if not is_current(base):
        raise changed("the base model")
    if store.fingerprint(adapter_uri) != identity.adapter_fingerprint:
        raise changed("the adapter")


def _directory(job_id: str, identity: Identity) -> str:
    return f"{ROOT}/{job_id}/{identity.version}"


def _settled(store: ArtifactStore, job_id: str, identity: Identity) -> tuple[Identity, dict[str, Any] | None]:
    """The version to make or to record: its identity, and its manifest if it is published.

    A version that was published and has lost files since is passed over: nothing published is overwritten, and
    nobody else can mend it.
    """
    while True:
        directory = _directory(job_id, identity)
        if not store.exists(store.uri(f"{directory}/{MANIFEST_NAME}")):
            return identity, None
        try:
            manifest = read_manifest(store, directory)
        except VerificationFailed as error:
            log.warning("another version is made instead: %s", error.message)
        else:
            if still_holds(store, directory, manifest):
                return identity, manifest
            log.warning("another version is made instead: %s has not the files that its manifest lists", directory)
        identity = identity.instead()


def _take_back(attempt: Attempt, hold: Hold) -> None:
    """Remove what a failed attempt published; what failed it counts, and not that this fails too."""
    try:
        if not attempt.store.exists(attempt.store.uri(f"{attempt.directory}/{MANIFEST_NAME}")):
            attempt.withdraw(hold)
    except ExportError as error:
        log.warning("files stay in %s: %s", attempt.directory, error.message)


def _result(
    store: ArtifactStore, directory: str, manifest: dict[str, Any], run: dict[str, Any], identity: Identity
) -> Result:
    artifact = Artifact(
        kind=ExportType.MERGED,
        uri=store.uri(directory),
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
