"""The recipe of a GGUF: from base and adapter, or from a whole model, to a quantized file in one pass."""

import errno
import logging
import math
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dispatcher.artifacts import StoredFile, is_bucket, path_of
from dispatcher.errors import StorageFull, Unsupported
from exporter import merge
from exporter.adapter import Adapter
from exporter.artifact import PROJECTOR_PREFIX
from exporter.attempt import Attempt
from exporter.converter import Converted, Stored, convert
from exporter.documents import read_json_object
from exporter.gemma import TEMPLATE_FILE, family_of
from exporter.gguf_feed import language_tensors, projector_tensors, refuse_inconvertible
from exporter.gguf_file import GgufFile, plan_as_converted, plan_quantized
from exporter.gguf_parts import Division, write_gguf
from exporter.gguf_tokenizer import CODE, describe_added_tokens, leave_out_code
from exporter.gguf_verify import verify_gguf
from exporter.gguf_write import GgufOverflow, write_parts
from exporter.lease import Report
from exporter.ledger import refuse_unchanged
from exporter.llama_check import Weights, check_gguf
from exporter.llama_cpp import installed_version
from exporter.making import WRITE_FROM, WRITE_TO, Checks, Made
from exporter.merged_tensors import MergedTensors
from exporter.modelfile import MODELFILE_NAME, modelfile
from exporter.plan import Plan
from exporter.quantized import config_bytes
from exporter.scratch import scratch_directory
from exporter.side_by_side import one_at_a_time
from exporter.sources import MAX_CONFIG_BYTES

log = logging.getLogger(__name__)
_RUNNING = threading.Lock()
"""Held by the one export whose file runs in llama.cpp: several at once would take as many memory budgets."""
VERSION = "1"
"""Part of every artifact's version: raise it when what is written of a given merge changes."""


@dataclass(frozen=True)
class Model:
    """A merged model that is still base and adapter; or a whole one."""

    name: str
    """What its files are called"""
    plan: Plan
    adapter: Adapter | None
    """None where nothing is merged"""
    config: dict[str, Any]
    """Its config.json"""
    side_files: Mapping[str, Path]
    """The files beside the weights, by name"""
    template: bytes | None
    """The chat template, where it is not among them"""
    origin: str
    """Which base at which revision, and which adapter: what a shared pass may write the files of"""


def version() -> str:
    """What decides the bytes of a GGUF, besides base and adapter."""
    return f"{VERSION}+{merge.VERSION}+torch-{torch.__version__}+llama-cpp-python-{installed_version()}"


def make_gguf(
    attempt: Attempt, model: Model, quantization: str, report: Report, checks: Checks, division: Division
) -> Made | None:
    """Write a model's GGUF, its projector where it has one, and what belongs beside them.

    Args:
        attempt: Where to.
        model: What is converted.
        quantization: One of `dispatcher.contract.QUANTIZATIONS`.
        report: Told of stage and fraction; what it raises stops the work.
        checks: How much is verified.
        division: Which part of the file is this task's.

    Returns:
        What was made, by whomever; None where other tasks are still at their parts of the file.

    Raises:
        ExportError: As `refuse_inconvertible`, `convert` and `plan_quantized`; a failed check; a passing fault.
    """
    torch.set_num_threads(1)  # the workers are the threads
    model_type = str(model.config["model_type"])
    refuse_inconvertible(model_type, model.config, model.side_files)
    family = family_of(model.config)
    outputs = {output.tensor.name: output.tensor for output in model.plan.outputs}
    fed = language_tensors(outputs, family, model_type, model.config)
    towers = projector_tensors(outputs, family, model_type)
    _refuse_left_out(model.plan, {stored.source for stored in (*fed.values(), *towers.values())})
    with _laid_out(model) as directory, MergedTensors(model.plan, model.adapter, model.origin) as merged:
        report("converting", WRITE_FROM / 2)
        converted = convert(directory, fed, merged.read)
        file = _quantized(converted, directory, model.name, quantization)
        written = write_gguf(attempt, file, merged, report, division)
        if written is None:
            return None
        files = [written.stored]
        own = {stored.source for stored in fed.values()}
        tensors = _facts(file) | {"merged": sum(name in own for name in written.deltas)}
        projector = _projector(attempt, model.name, directory, towers, merged) if towers else None
        if model.adapter is not None:
            refuse_unchanged(merged.take_deltas() | written.deltas)
        report("verifying", WRITE_TO)
        verified = verify_gguf(attempt.store, attempt.directory, file, files[0], merged)
        alone = one_at_a_time(_RUNNING, lambda: report("verifying", WRITE_TO))
        with alone, _as_local_file(attempt, file, directory.parent) as path:
            report("verifying", WRITE_TO)  # it may have waited for minutes
            checked = check_gguf(
                path,
                directory,
                model.config,
                quantization,
                weights=_weights(merged, checks),
                memory_budget=checks.memory_budget if path.parent != directory.parent else 0,
                while_waiting=lambda: report("verifying", WRITE_TO),
            )
        if projector is not None:
            files += projector.files
            tensors["mmproj"] = projector.facts
        generation = directory / "generation_config.json"
        text = modelfile(
            file.name,
            model_type,
            chat_template=converted.chat_template,
            mmproj_name=projector.files[0].name if projector and projector.files else None,
            generation=read_json_object(generation, limit=MAX_CONFIG_BYTES) if generation.is_file() else None,
        ).encode()
    files.append(attempt.publish(MODELFILE_NAME, lambda writer: writer.write(text), size=len(text)))
    verified |= {"llama_cpp": checked.verified}
    logits = checked.logits if checks.logits else {"compared": False, "why": "switched off (VERIFY_LOGITS)"}
    logits |= {"loaded": checked.loaded}
    return Made(files, tensors, verified, model.config, logits, has_template=converted.chat_template is not None)


@contextmanager
def _as_local_file(attempt: Attempt, file: GgufFile, scratch: Path) -> Iterator[Path]:
    """The written file; of one in a bucket, the metadata, with a hole where the weights would be."""
    if not is_bucket(attempt.store):
        yield path_of(attempt.store.uri(f"{attempt.directory}/{file.name}"))
        return
    path = scratch / file.name
    path.write_bytes(file.head)
    os.truncate(path, file.size)
    yield path


def _weights(merged: MergedTensors, checks: Checks) -> Weights | None:
    """All merged tensors, where they and a model of them in float32 fit the memory budget, and it is asked for."""
    elements = sum(math.prod(output.tensor.shape) for output in merged.outputs.values())
    if not checks.logits or 6 * elements > checks.memory_budget:
        return None
    return lambda: ((name, merged.read(name)) for name in merged.outputs)


def _facts(file: GgufFile) -> dict[str, Any]:
    """What the manifest says of a file: its size, its tensors by type, the bytes and the number of their weights."""
    import gguf

    kinds = Counter(gguf.GGMLQuantizationType(tensor.kind).name for tensor in file.tensors)
    return {
        "file": file.name,
        "bytes": file.size,
        "tensor_bytes": sum(tensor.nbytes for tensor in file.tensors),
        "weights": file.whole.weights,
        "types": dict(sorted(kinds.items())),
    }


def _refuse_left_out(plan: Plan, taken: Container[str | None]) -> None:
    """Refuse to leave out what the adapter changed.

    Raises:
        Unsupported: `gguf_change_left_out`.
    """
    left = [output.tensor.name for output in plan.outputs if output.change and output.tensor.name not in taken]
    if left:
        raise Unsupported(
            f"the adapter changed {len(left)} tensors that a GGUF of this model has no place for, such as {left[0]!r}. "
            "Export `merged` instead.",
            code="gguf_change_left_out",
        )


@contextmanager
def _laid_out(model: Model) -> Iterator[Path]:
    """A directory as the converter expects it, of everything but the weights; the model's name is its own.

    Raises:
        StorageFull: No room there, now or while it is used.
    """
    try:
        with scratch_directory() as scratch:
            directory = scratch / model.name
            directory.mkdir()
            config = {key: value for key, value in model.config.items() if key != CODE}
            (directory / "config.json").write_bytes(config_bytes(config))
            for name, source in model.side_files.items():
                (directory / name).parent.mkdir(exist_ok=True)
                (directory / name).symlink_to(source.resolve())
            if model.template is not None:
                (directory / TEMPLATE_FILE).unlink(missing_ok=True)  # a link would lead to somebody's own file
                (directory / TEMPLATE_FILE).write_bytes(model.template)
            leave_out_code(directory)
            describe_added_tokens(directory)
            yield directory
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageFull(
            f"no room in {tempfile.gettempdir()} for what the converter works with: a file of a few megabytes of "
            "metadata. Free some and ask again."
        ) from error


def _quantized(converted: Converted, directory: Path, name: str, quantization: str) -> GgufFile:
    template = directory.parent / "template.gguf"
    return plan_quantized(converted, template, f"{name}-{quantization.upper()}.gguf", quantization)


@dataclass(frozen=True)
class _Projector:
    files: list[StoredFile]
    """None where it could not be made"""
    facts: dict[str, Any]


def _projector(
    attempt: Attempt, name: str, directory: Path, towers: Mapping[str, Stored], merged: MergedTensors
) -> _Projector:
    """Write the multimodal projector, or say why there is none.

    Raises:
        VerificationFailed: It is not what was written.
        Exception: A passing fault.
    """
    template = directory.parent / "projector.gguf"
    try:
        converted = convert(directory, towers, merged.read, projector=True)
        file = plan_as_converted(converted, template, f"{PROJECTOR_PREFIX}{name}-F16.gguf")
        stored = attempt.publish(file.name, lambda writer: write_parts([file.whole], [writer], merged), size=file.size)
    except (Unsupported, GgufOverflow) as error:
        changed = sum(bool(merged.outputs[tower.source].change) for tower in towers.values() if tower.source)
        log.warning("the text model goes without a projector: %s", error.message)
        return _Projector([], {"status": "failed", "why": error.message, "merged_left_out": changed})
    verified = verify_gguf(attempt.store, attempt.directory, file, stored, merged)
    return _Projector([stored], {"status": "made", **_facts(file), "verified": verified})
