"""The recipe of a merged model: plan, write, verify, prove. What claims and records it is `exporter.job`."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactStore, StoredFile
from dispatcher.contract import Artifact, ExportRecord, ExportType, TrainingJob, fingerprint_of
from dispatcher.errors import ArtifactConflict, ExportError, SourceError, Unsupported, VerificationFailed
from exporter import passthrough
from exporter.architecture import fitted
from exporter.attempt import Attempt
from exporter.bases import adapter_config, base_for
from exporter.checkpoint import changed
from exporter.engines import Engine, engine_of, reference_for
from exporter.full_model import base_of_full_model, files_from_base, is_full_model, read_full_model
from exporter.gemma import family_of
from exporter.lease import Hold
from exporter.making import Checks, Made
from exporter.manifest import (
    MANIFEST_NAME,
    History,
    Identity,
    manifest_of,
    publish_manifest,
    read_manifest,
    still_holds,
)
from exporter.model_card import CARD_NAME, CardFacts, model_card
from exporter.passthrough import pass_through
from exporter.sources import Base, TokenSource, adapter_here, is_current
from exporter.verify import vanished

log = logging.getLogger(__name__)
ROOT = "merged_models"
UNREAD = "not read"
"""The revision of a base that an export did without."""


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
    wished = engine_of("streaming" if engine == "auto" else engine)
    adapter_files = store.list(job.adapter_path)
    work = _Work(store, job, job.adapter_path, adapter_files, record, hold)
    if is_full_model([file.name for file in adapter_files]):
        return work.passed_through(token)
    base = base_for(job, adapter_config(store, job.adapter_path, adapter_files), token)
    family_of(base.config)
    try:
        return work.merged_with(wished, base, checks)
    except Unsupported as error:
        if engine != "auto":
            raise
        reference = reference_for(error, job.provider, base, adapter_files)
        log.warning("%s The %s engine makes it instead.", error.message, reference.name)
        return work.merged_with(reference, base, checks)


@dataclass(frozen=True)
class _Recipe:
    """How an artifact is made, and what of."""

    make: Callable[[Attempt], Made]
    base: Base | None
    """None where no base is read"""
    history: History


@dataclass(frozen=True)
class _Work:
    """One export, however it is made."""

    store: ArtifactStore
    job: TrainingJob
    adapter_uri: str
    adapter_files: list[StoredFile]
    record: ExportRecord
    hold: Hold
    started: float = field(default_factory=time.monotonic)

    def merged_with(self, engine: Engine, base: Base, checks: Checks) -> Result:
        """The artifact that an engine makes of base and adapter, found or made now."""

        def make(attempt: Attempt) -> Made:
            with adapter_here(self.store, self.adapter_uri, self.adapter_files) as adapter_dir:
                return engine.make(attempt, fitted(base), adapter_dir, self.hold.report, checks)

        history = History(
            of_base={"requested": base.requested} if base.requested else {},
            of_adapter={"trained_on": base.trained_on} if base.trained_on else {},
        )
        identity = self._identity(base.model_id, base.revision, engine.name, engine.version())
        return self._found_or_made(identity, _Recipe(make, base, history))

    def passed_through(self, token: TokenSource) -> Result:
        """The artifact that is the whole model in the adapter's place, whatever engine was asked for."""
        model = read_full_model(self.store, self.adapter_uri, self.adapter_files)
        base = base_of_full_model(model, self.job, token)

        def make(attempt: Attempt) -> Made:
            return pass_through(attempt, model, base, self.hold.report)

        history = History(of_base={"files": files_from_base(model, base)}, of_adapter={"kind": "full_model"})
        revision = UNREAD if base is None else base.revision
        identity = self._identity(self.job.base_model_id, revision, passthrough.NAME, passthrough.VERSION)
        return self._found_or_made(identity, _Recipe(make, base, history))

    def _identity(self, base_id: str, base_revision: str, engine: str, engine_version: str) -> Identity:
        facts = [(file.name, file.size, file.crc32c) for file in self.adapter_files]
        return Identity(
            export_type=ExportType.MERGED,
            quantization=None,
            base_id=base_id,
            base_revision=base_revision,
            adapter_fingerprint=fingerprint_of(facts),
            engine=engine,
            engine_version=engine_version,
            nonce=self.record.force_nonce,
        )

    def _found_or_made(self, identity: Identity, recipe: _Recipe) -> Result:
        try:
            return self._made(identity, recipe)
        except ArtifactConflict as error:
            # With what a killed attempt left, on a machine that rounds otherwise; or another attempt has published it.
            log.warning("what is there is recorded, or else another version is made: %s", error.message)
            found, manifest = _settled(self.store, self.job.job_id, identity)
            return self._made(found if manifest is not None else found.instead(), recipe)

    def _made(self, wanted: Identity, recipe: _Recipe) -> Result:
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
            made = recipe.make(attempt)
            card = _publish_card(attempt, identity, made)
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
        except BaseException:
            _take_back(attempt, self.hold)
            raise
        return _result(self.store, directory, manifest, run, identity)


def _refuse_changed(base: Base | None, identity: Identity, store: ArtifactStore, adapter_uri: str) -> None:
    """The manifest names what was read; so base and adapter must still be what they were at the start."""
    if base is not None and not is_current(base):
        raise changed("the base model")
    if store.fingerprint(adapter_uri) != identity.adapter_fingerprint:
        raise changed("the adapter")


def _publish_card(attempt: Attempt, identity: Identity, made: Made) -> StoredFile:
    facts = CardFacts(
        base_id=identity.base_id,
        base_revision=identity.base_revision,
        trained_fingerprint=identity.adapter_fingerprint,
        is_merged=identity.engine != passthrough.NAME,
        engine=identity.engine,
        engine_version=identity.engine_version,
        config=made.config,
        tensors=made.tensors,
        verified=made.verified,
        files=frozenset(file.name for file in made.files),
    )
    card = model_card(facts).encode()
    return attempt.publish(CARD_NAME, lambda writer: writer.write(card), size=len(card))


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
