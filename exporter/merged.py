"""The recipe of a merged model: plan, write, verify, prove. What claims and records it is `exporter.job`."""

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dispatcher.artifacts import ArtifactStore, ArtifactWriter, StoredFile
from dispatcher.contract import Artifact, ExportRecord, ExportType, TrainingJob, fingerprint_of
from dispatcher.errors import ArtifactConflict, ExportError, NotAvailable, SourceError, VerificationFailed
from exporter import engines, merge, passthrough
from exporter.adapter import Adapter, read_adapter, refuse_not_finite
from exporter.attempt import Attempt
from exporter.bases import adapter_config, base_for
from exporter.checkpoint import changed, open_checkpoint
from exporter.full_model import base_of_full_model, files_from_base, is_full_model, read_full_model
from exporter.gemma import family_of
from exporter.lease import Hold, Report
from exporter.manifest import (
    MANIFEST_NAME,
    Identity,
    manifest_of,
    publish_manifest,
    read_manifest,
    still_holds,
)
from exporter.passthrough import pass_through
from exporter.plan import OutputFile, Plan, plan_merge
from exporter.sidefiles import publish_copy, write_side_files
from exporter.sources import Base, TokenSource, adapter_here, is_current
from exporter.verify import vanished, verify_merged, verify_reference

log = logging.getLogger(__name__)
ROOT = "merged_models"
UNREAD = "not read"
"""The revision of a base that an export did without."""
_WRITE_FROM, _WRITE_TO = 0.05, 0.9
"""The part of the progress bar that writing weights takes."""


@dataclass(frozen=True)
class Result:
    """What the record learns from a finished export."""

    artifact: Artifact
    adapter_fingerprint: str
    summary: dict[str, Any]


@dataclass(frozen=True)
class _Written:
    files: list[StoredFile]
    tensors: dict[str, Any]
    verified: dict[str, Any]


def export_merged(
    store: ArtifactStore,
    job: TrainingJob,
    record: ExportRecord,
    *,
    engine: str,
    token: TokenSource,
    hold: Hold,
) -> Result:
    """Make the merged model of a training job, or find it made already.

    Args:
        store: Where artifacts lie.
        job: The training job; its adapter exists.
        record: The claimed export.
        engine: `auto`, `streaming` or `peft`.
        token: Gives a Hugging Face token for a gated base.
        hold: Told of stage and fraction; what it raises stops the work.

    Raises:
        ExportError: Bad input, a failed check, or a passing fault; what this attempt published is removed, unless
            another attempt may be using it.
    """
    started = time.monotonic()
    hold.report("planning", 0.0)
    if job.adapter_path is None:
        raise SourceError(f"training job {job.job_id} names no adapter.", code="adapter_missing")
    adapter_uri = job.adapter_path
    adapter_files = store.list(adapter_uri)
    prepare = _passing_through if is_full_model([file.name for file in adapter_files]) else _merging
    work = prepare(store, job, adapter_uri, adapter_files, engine, token, hold.report)
    identity = Identity(
        export_type=ExportType.MERGED,
        quantization=None,
        base_id=work.base_id,
        base_revision=work.base.revision if work.base else UNREAD,
        adapter_fingerprint=fingerprint_of([(file.name, file.size, file.crc32c) for file in adapter_files]),
        engine=work.engine,
        engine_version=work.engine_version,
        nonce=record.force_nonce,
    )

    def made(wanted: Identity) -> Result:
        """The first version of an identity that is not spoilt: found, or written now."""
        identity, manifest = _settled(store, job.job_id, wanted)
        directory = _directory(job.job_id, identity)
        if manifest is not None:
            log.info("found finished, only recording it: %s", directory)
            return _result(store, directory, manifest, {}, identity)
        if hold.is_ours():
            store.remove_unpublished(directory)
        attempt = Attempt(store, directory)
        try:
            written = work.write(attempt)
            manifest = manifest_of(
                identity,
                adapter_uri=adapter_uri,
                files=written.files,
                tensors=written.tensors,
                verified=written.verified,
                of_base=work.of_base,
                of_adapter=work.of_adapter,
            )
            hold.report("publishing", 0.99)
            _refuse_changed(work.base, identity, store, adapter_uri)
            if not still_holds(store, directory, manifest):
                raise vanished(f"a file of {directory}")
            run = {"wall_seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
            publish_manifest(store, directory, manifest, run)
        except BaseException:
            _take_back(attempt, hold)
            raise
        return _result(store, directory, manifest, run, identity)

    try:
        return made(identity)
    except ArtifactConflict as error:
        # With what a killed attempt left, on a machine that rounds otherwise; or another attempt has published it.
        log.warning("what is there is recorded, or else another version is made: %s", error.message)
        found, manifest = _settled(store, job.job_id, identity)
        return made(found if manifest is not None else found.instead())


@dataclass(frozen=True)
class _Work:
    """What is to be done for an export, decided before its version is known."""

    engine: str
    engine_version: str
    base_id: str
    base: Base | None
    """None where no base is read."""
    write: Callable[[Attempt], _Written]
    of_base: Mapping[str, Any]
    """What else the manifest says of the base, and of the adapter."""
    of_adapter: Mapping[str, Any]


def _merging(
    store: ArtifactStore,
    job: TrainingJob,
    uri: str,
    files: list[StoredFile],
    engine: str,
    token: TokenSource,
    report: Report,
) -> _Work:
    merge_into, name, version = _engine(engine)
    base = base_for(job, adapter_config(store, uri, files), token)
    family_of(base.config)

    def write(attempt: Attempt) -> _Written:
        with adapter_here(store, uri, files) as adapter_dir:
            return merge_into(attempt, base, adapter_dir, report)

    of_base = {"requested": base.requested} if base.requested else {}
    of_adapter = {"trained_on": base.trained_on} if base.trained_on else {}
    return _Work(name, version, base.model_id, base, write, of_base, of_adapter)


def _passing_through(
    store: ArtifactStore,
    job: TrainingJob,
    uri: str,
    files: list[StoredFile],
    engine: str,
    token: TokenSource,
    report: Report,
) -> _Work:
    """A whole model is published as it is, whatever engine was asked for."""
    _engine(engine)
    model = read_full_model(store, uri, files)
    base = base_of_full_model(model, job, token)

    def write(attempt: Attempt) -> _Written:
        return _Written(*pass_through(attempt, model, base, report))

    of_base = {"files": files_from_base(model, base)}
    return _Work("passthrough", passthrough.VERSION, job.base_model_id, base, write, of_base, {"kind": "full_model"})


def _refuse_changed(base: Base | None, identity: Identity, store: ArtifactStore, adapter_uri: str) -> None:
    """The manifest names what was read; so base and adapter must still be what they were at the start."""
    if base is not None and not is_current(base):
        raise changed("the base model")
    if store.fingerprint(adapter_uri) != identity.adapter_fingerprint:
        raise changed("the adapter")


_Engine = Callable[[Attempt, Base, Path, Report], _Written]


def _engine(name: str) -> tuple[_Engine, str, str]:
    if name in ("auto", "streaming"):
        return _stream, "streaming", f"{merge.VERSION}+torch-{torch.__version__}"
    if name == "peft":
        return _with_peft, "peft", engines.peft_version()
    raise NotAvailable(
        f"engine {name!r} is not in this build; auto, streaming and peft are.", code="engine_not_available"
    )


def _stream(attempt: Attempt, base: Base, adapter_dir: Path, report: Report) -> _Written:
    adapter = read_adapter(adapter_dir)
    plan = plan_merge(open_checkpoint(base.directory), adapter, family_of(base.config), base.config)
    refuse_not_finite(adapter.file)
    files = _write_shards(attempt, plan, adapter, report)
    files += write_side_files(attempt, base.directory, adapter_dir, plan)
    report("verifying", _WRITE_TO)
    verified = verify_merged(attempt.store, attempt.directory, plan, adapter)
    tensors: dict[str, Any] = {"merged": plan.merged, "copied": plan.copied, "bytes": plan.nbytes}
    if plan.replaced:
        tensors["replaced"] = plan.replaced
    if plan.tower:
        tensors["mapped_to_tower"] = plan.tower
    return _Written(files, tensors, verified)


def _write_shards(attempt: Attempt, plan: Plan, adapter: Adapter, report: Report) -> list[StoredFile]:
    torch.set_num_threads(1)  # the workers are the threads
    done, stored = 0, []

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        report("merging", _WRITE_FROM + (_WRITE_TO - _WRITE_FROM) * done / max(1, plan.nbytes))

    for planned in plan.files:

        def fill(writer: ArtifactWriter, planned: OutputFile = planned) -> None:
            merge.write_merged(planned, adapter, writer, on_bytes)

        stored.append(attempt.publish(planned.name, fill, size=planned.size))
    return stored


def _with_peft(attempt: Attempt, base: Base, adapter_dir: Path, report: Report) -> _Written:
    report("merging", _WRITE_FROM)
    with tempfile.TemporaryDirectory(prefix="gemma-export-") as scratch:
        output = Path(scratch)
        merged, copied = engines.merge_with_peft(base, adapter_dir, output)
        report("verifying", _WRITE_FROM)
        verified = verify_reference(output, open_checkpoint(base.directory), family_of(base.config))
        files = write_side_files(attempt, base.directory, adapter_dir, None)
        taken = {file.name for file in files}
        for path in sorted(output.iterdir()):
            if path.is_file() and path.name not in taken:
                report("publishing", _WRITE_TO)
                files.append(publish_copy(attempt, path.name, path))
    return _Written(files, {"merged": merged, "copied": copied}, verified)


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
