"""The recipe of a merged model: which engine makes it of what, or that a whole model is passed on."""

import logging
from functools import partial

from dispatcher.artifacts import ArtifactStore
from dispatcher.contract import ExportRecord, TrainingJob
from dispatcher.errors import SourceError, Unsupported
from exporter import passthrough
from exporter.architecture import fitted
from exporter.artifact import Recipe, Result, Work
from exporter.attempt import Attempt
from exporter.base_cache import cached, opener_for
from exporter.bases import adapter_config, base_for
from exporter.engines import Engine, engine_of, reference_for
from exporter.full_model import base_of_full_model, files_from_base, is_full_model, read_full_model
from exporter.gemma import family_of
from exporter.lease import Hold
from exporter.local_copies import adapter_here
from exporter.making import Checks, Made
from exporter.manifest import History, Identity
from exporter.model_card import CardFacts, model_card
from exporter.passthrough import pass_through
from exporter.sources import Base, TokenSource
from exporter.tasks import Tasks

log = logging.getLogger(__name__)
UNREAD = "not read"
"""The revision of a base that an export did without."""


def export_merged(
    store: ArtifactStore,
    job: TrainingJob,
    record: ExportRecord,
    *,
    engine: str,
    token: TokenSource,
    hold: Hold,
    checks: Checks,
    tasks: Tasks,
    base_cache: bool,
) -> Result | None:
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
        tasks: Which part of it is this task's.
        base_cache: Whether a base of the hub is kept in the bucket.

    Returns:
        None where this task's part is done, and others are still at theirs.

    Raises:
        ExportError: Bad input, a failed check, or a passing fault; what this attempt published is removed, unless
            another attempt may be using it.
    """
    hold.report("planning", 0.0)
    if job.adapter_path is None:
        raise SourceError(f"training job {job.job_id} names no adapter.", code="adapter_missing")
    wished = engine_of("streaming" if engine == "auto" else engine)
    adapter_files = store.list(job.adapter_path)
    work = Work(store, job, job.adapter_path, adapter_files, record, hold)
    if is_full_model([file.name for file in adapter_files]):
        return _passed_through(work, token, tasks)
    base = base_for(job, adapter_config(store, job.adapter_path, adapter_files), token, opener=opener_for(store, hold))
    family_of(base.config)
    base = cached(base, store if base_cache else None)
    try:
        return _merged_with(work, wished, base, checks, tasks)
    except Unsupported as error:
        if engine != "auto":
            raise
        reference = reference_for(error, job.provider, base, adapter_files)
        log.warning("%s The %s engine makes it instead.", error.message, reference.name)
        return _merged_with(work, reference, base, checks, tasks)


def _merged_with(work: Work, engine: Engine, base: Base, checks: Checks, tasks: Tasks) -> Result | None:
    """The artifact that an engine makes of base and adapter, found or made now."""

    def make(attempt: Attempt) -> Made | None:
        with adapter_here(work.store, work.adapter_uri, work.adapter_files) as adapter_dir:
            return engine.make(attempt, fitted(base), adapter_dir, work.hold.report, checks, tasks)

    history = History(
        of_base={"requested": base.requested} if base.requested else {},
        of_adapter={"trained_on": base.trained_on} if base.trained_on else {},
    )
    identity = work.identity(base.model_id, base.revision, engine.name, engine.version())
    return work.found_or_made(identity, Recipe(make, partial(_card, identity), base, history), tasks)


def _passed_through(work: Work, token: TokenSource, tasks: Tasks) -> Result | None:
    """The artifact that is the whole model in the adapter's place, whatever engine was asked for."""
    model = read_full_model(work.store, work.adapter_uri, work.adapter_files)
    base = base_of_full_model(model, work.job, token)

    def make(attempt: Attempt) -> Made | None:
        return None if tasks.index > 0 else pass_through(attempt, model, base, work.hold.report)

    history = History(of_base={"files": files_from_base(model, base)}, of_adapter={"kind": "full_model"})
    revision = UNREAD if base is None else base.revision
    identity = work.identity(work.job.base_model_id, revision, passthrough.NAME, passthrough.VERSION)
    return work.found_or_made(identity, Recipe(make, partial(_card, identity), base, history), tasks)


def _card(identity: Identity, made: Made) -> str:
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
    return model_card(facts)
