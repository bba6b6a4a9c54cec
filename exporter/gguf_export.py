"""A GGUF export from end to end: which model it is of, found made already, or made."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dispatcher.artifacts import ArtifactStore
from dispatcher.contract import DEFAULT_QUANTIZATION, QUANTIZATIONS, ExportRecord, TrainingJob
from dispatcher.errors import NotAvailable, SourceError, Unsupported
from exporter import gguf
from exporter.adapter import refuse_not_finite
from exporter.architecture import fitted, fitting_config
from exporter.artifact import Recipe, Result, Work
from exporter.attempt import Attempt
from exporter.base_cache import filled, opener_for
from exporter.bases import adapter_config, base_for
from exporter.checkpoint import INDEX_NAME, open_checkpoint
from exporter.full_model import (
    CONFIG_NAME,
    base_of_full_model,
    files_from_base,
    is_full_model,
    read_full_model,
    refuse_quantized,
    sources_of,
    weights_of,
)
from exporter.gemma import family_of
from exporter.gguf import Model, make_gguf
from exporter.gguf_card import GgufEntry, GgufFacts, gguf_card
from exporter.gguf_file import PART_WEIGHTS
from exporter.gguf_parts import Division
from exporter.lease import Hold
from exporter.llama_cpp import installed_version
from exporter.making import Checks, Made
from exporter.manifest import History, Identity
from exporter.markdown import slug
from exporter.merged import UNREAD
from exporter.plan import plan_copy
from exporter.quantized import without_quantization
from exporter.quantizer import refuse_unusable
from exporter.shared_pass import Share
from exporter.sidefiles import inner_template, side_files
from exporter.sources import Base, TokenSource, adapter_here, files_here
from exporter.streaming import planned
from exporter.tasks import Tasks

ENGINE = "streaming"


def export_gguf(
    store: ArtifactStore,
    job: TrainingJob,
    record: ExportRecord,
    *,
    engine: str,
    token: TokenSource,
    hold: Hold,
    checks: Checks,
    share: Share,
    tasks: Tasks,
    base_cache: bool,
    part_weights: int = PART_WEIGHTS,
) -> Result | None:
    """Make a GGUF of a training job's model, or find it made already.

    Args:
        store: Where artifacts lie.
        job: The training job; its adapter, or its whole model, exists.
        record: The claimed export.
        engine: `auto` or `streaming`.
        token: Gives a Hugging Face token for a gated base.
        hold: Told of stage and fraction; what it raises stops the work.
        checks: How much is verified.
        share: Its part in the pass over the base, which other quantizations may share.
        tasks: Which part of it is this task's.
        base_cache: Whether a base of the hub is kept in the bucket.
        part_weights: How many weights a part of the file has, where it is written in parts.

    Returns:
        None where this task's part is done, and others are still at theirs.

    Raises:
        ExportError: Bad input, a failed check, or a passing fault; what this attempt published is removed, unless
            another attempt may be using it.
    """
    hold.report("planning", 0.0)
    if engine not in ("auto", ENGINE):
        raise NotAvailable(
            f"a GGUF is made by the {ENGINE} engine alone, not by {engine!r}.", code="engine_not_available"
        )
    if quantization(record) not in QUANTIZATIONS:
        # Without an importance matrix, ggml ends the process rather than make some of them.
        raise Unsupported(
            f"no GGUF is made in {quantization(record)[:40]!r}; ask for one of {', '.join(QUANTIZATIONS)}.",
            code="quantization_unknown",
        )
    refuse_unusable()
    if job.adapter_path is None:
        raise SourceError(f"training job {job.job_id} names no adapter.", code="adapter_missing")
    files = store.list(job.adapter_path)
    work = Work(store, job, job.adapter_path, files, record, hold)
    division = Division(share, tasks, part_weights)
    if is_full_model([file.name for file in files]):
        return _of_full_model(work, token, checks, division)
    base = base_for(job, adapter_config(store, job.adapter_path, files), token, opener=opener_for(store))
    family_of(base.config)
    return _of_adapter(work, base, checks, division, base_cache=base_cache)


def _of_adapter(work: Work, base: Base, checks: Checks, division: Division, *, base_cache: bool) -> Result | None:
    report, tasks = work.hold.report, division.tasks

    def make(attempt: Attempt) -> Made | None:
        with adapter_here(work.store, work.adapter_uri, work.adapter_files) as adapter_dir:
            own = fitted(filled(base, work.store, tasks, report) if base_cache else base)
            plan, adapter, _, config = planned(own, own.checkpoint(), adapter_dir)
            refuse_not_finite(adapter.file)
            beside = side_files(base.directory, adapter_dir)
            template = inner_template(base.directory, adapter_dir)
            origin = " ".join((base.model_id, base.revision, work.fingerprint))
            model = Model(slug(base.model_id), plan, adapter, config, beside, template, origin)
            return make_gguf(attempt, model, quantization(work.record), report, checks, division)

    history = History(
        of_base={"requested": base.requested} if base.requested else {},
        of_adapter={"trained_on": base.trained_on} if base.trained_on else {},
    )
    identity = work.identity(base.model_id, base.revision, ENGINE, gguf.version())
    return work.found_or_made(identity, Recipe(make, partial(_card, identity, "adapter"), base, history), tasks)


def _of_full_model(work: Work, token: TokenSource, checks: Checks, division: Division) -> Result | None:
    """From the whole model in the adapter's place."""
    found = read_full_model(work.store, work.adapter_uri, work.adapter_files)
    base = base_of_full_model(found, work.job, token)

    def make(attempt: Attempt) -> Made | None:
        weights = weights_of(found)
        refuse_quantized(found, weights)
        beside_weights = [INDEX_NAME, CONFIG_NAME, *found.side_files]
        listed = [found.files[name] for name in beside_weights if name in found.files]
        with files_here(work.store, work.adapter_uri, listed) as directory:
            checkpoint = open_checkpoint(directory, sources_of(found, weights))
            config = fitting_config(without_quantization(found.config), checkpoint.tensors())
            beside = {name: directory / name for name in found.side_files}
            if base is not None:
                beside |= {name: base.directory / name for name in files_from_base(found, base)}
            template = inner_template(base.directory if base else directory, directory)
            origin = work.fingerprint
            model = Model(slug(work.job.base_model_id), plan_copy(checkpoint), None, config, beside, template, origin)
            return make_gguf(attempt, model, quantization(work.record), work.hold.report, checks, division)

    history = History(of_base={"files": files_from_base(found, base)}, of_adapter={"kind": "full_model"})
    revision = UNREAD if base is None else base.revision
    identity = work.identity(work.job.base_model_id, revision, ENGINE, gguf.version())
    recipe = Recipe(make, partial(_card, identity, "full_model"), base, history)
    return work.found_or_made(identity, recipe, division.tasks)


def quantization(record: ExportRecord) -> str:
    """What a record asks for."""
    return record.quantization or DEFAULT_QUANTIZATION


def _card(identity: Identity, kind: str, made: Made) -> str:
    facts = GgufFacts(
        base_id=identity.base_id,
        base_revision=identity.base_revision,
        trained_fingerprint=identity.adapter_fingerprint,
        is_merged=kind == "adapter",
        engine=identity.engine,
        engine_version=identity.engine_version,
        config=made.config,
        tensors=made.tensors,
        verified=made.verified,
        files=frozenset(file.name for file in made.files),
        model=_entry(made.tensors, str(identity.quantization)),
        projector=_entry(made.tensors["mmproj"], "F16") if "file" in made.tensors.get("mmproj", {}) else None,
        has_template=made.has_template,
        converter=f"llama.cpp of llama-cpp-python {installed_version()}",
    )
    return gguf_card(facts)


def _entry(facts: Mapping[str, Any], kind: str) -> GgufEntry:
    return GgufEntry(facts["file"], kind.upper(), facts["bytes"], facts["tensor_bytes"], facts["weights"])
