"""A whole model that lies where a training job has its adapter: what belongs to it, and whether it can be used.

The platform's training service stores a full fine-tune where it stores adapters, in a directory or in Cloud Storage.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dispatcher.artifacts import ArtifactReader, ArtifactStore, StoredFile, file_uri
from dispatcher.contract import TrainingJob
from dispatcher.errors import ExportError, NotFound, SourceError
from exporter.byte_source import ByteSource, changed
from exporter.checkpoint import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    SINGLE_NAME,
    Tensor,
    bad_index,
    parse_header,
    refuse_astray,
    refuse_too_many,
    weight_map_of,
)
from exporter.documents import parse_json_object
from exporter.gemma import PROCESSOR_FILES, TOKENIZER_FILES, family_of, is_side_file
from exporter.peft_config import CONFIG_NAME as ADAPTER_CONFIG_NAME
from exporter.quantized import is_stored_quantized, quantization_of
from exporter.sidefiles import origins, side_file_names
from exporter.sources import MAX_CONFIG_BYTES, Base, TokenSource, open_side_files
from exporter.stored_object import StoredObject

log = logging.getLogger(__name__)
CONFIG_NAME = "config.json"

Weights = Mapping[str, Sequence[Tensor]]
"""The tensors of each weight file, in the order of their bytes."""


@dataclass(frozen=True)
class FullModel:
    """A whole model that lies where a training job has its adapter."""

    store: ArtifactStore
    uri: str
    files: Mapping[str, StoredFile]
    """What is listed there, by name."""
    config: dict[str, Any]

    def open(self, name: str) -> ArtifactReader:
        """One of its files, of the size that was listed.

        Raises:
            Unavailable: It is not what was listed any more (`source_changed`).
        """
        try:
            reader = self.store.open(file_uri(self.uri, name))
        except NotFound as error:
            raise changed(name) from error
        if reader.size != self.files[name].size:
            with reader:
                raise changed(name)
        return reader

    @property
    def side_files(self) -> list[str]:
        """What it has beside the weights, by name."""
        return [name for name in self.files if is_side_file(name)]


def is_full_model(names: Collection[str]) -> bool:
    """Whether files of these names are a whole model; with an `adapter_config.json` they are an adapter.

    A config beside adapter weights, as some trainers leave it, is that of the base.
    """
    return (
        CONFIG_NAME in names
        and ADAPTER_CONFIG_NAME not in names
        and not any(name.startswith("adapter_model.") for name in names)
    )


def read_full_model(store: ArtifactStore, uri: str, files: Sequence[StoredFile]) -> FullModel:
    """Read the config of a whole model; no weights yet.

    Raises:
        SourceError: `model_config_invalid`, `model_not_gemma`.
        Unavailable: It is not what was listed any more (`source_changed`).
    """
    model = FullModel(store, uri, {file.name: file for file in files}, {})
    try:
        config = parse_json_object(_read(model, CONFIG_NAME, MAX_CONFIG_BYTES))
    except ValueError as error:
        raise SourceError(
            f"the model's config.json cannot be read: {str(error)[:200]}.", code="model_config_invalid"
        ) from error
    family_of(config, role="model")
    return FullModel(store, uri, model.files, config)


def base_of_full_model(model: FullModel, job: TrainingJob, token: TokenSource) -> Base | None:
    """The base, where the model lacks a side file that only the base can give; its weights are not fetched.

    None where nothing is lacking; and where just `tokenizer.model` is, which transformers does without, and the base
    cannot be had.

    Raises:
        ExportError: The model has no tokenizer, or no processor, and the base cannot be had: of the kind and with the
            code of `open_side_files`.
    """
    own = model.side_files
    multimodal = any(model.config.get(tower) is not None for tower in ("vision_config", "audio_config"))
    lacking = [] if any(name in own for name in TOKENIZER_FILES) else ["tokenizer"]
    lacking += ["processor"] if multimodal and not any(name in own for name in PROCESSOR_FILES) else []
    if not lacking and "tokenizer.model" in own:
        return None
    try:
        return open_side_files(job.base_model_id, job.base_model_revision, token)
    except ExportError as error:
        if not lacking:
            log.warning("the model goes without a tokenizer.model: %s", error.message)
            return None
        raise type(error)(
            f"the model was saved without its {' and '.join(lacking)}, and its base has to be asked for that: "
            f"{error.message}",
            code=error.error_code,
        ) from error


def files_from_base(model: FullModel, base: Base | None) -> list[str]:
    """The side files that are taken from the base."""
    theirs = side_file_names(base.directory) if base is not None else []
    return [name for name, own in origins(model.side_files, theirs).items() if not own]


def _read(model: FullModel, name: str, limit: int) -> bytes:
    with model.open(name) as reader:
        if reader.size > limit:
            raise ValueError(f"it is larger than {limit} bytes")
        return reader.read(0, reader.size)


def weights_of(model: FullModel) -> Weights:
    """The headers of the files that transformers would load, checked: the single one goes before an index.

    Raises:
        SourceError: `model_weights_missing`, `model_pickle_only`, `model_index_invalid`, or as `read_tensor_file`.
        Unavailable: It is not what was listed any more (`source_changed`).
    """
    if SINGLE_NAME in model.files:
        return {SINGLE_NAME: _header(model, SINGLE_NAME)}
    if INDEX_NAME not in model.files:
        pickled = any("/" not in name and name.endswith((".bin", ".pt", ".pth")) for name in model.files)
        raise SourceError(
            f"{model.uri} has no {ADAPTER_CONFIG_NAME}, and its config.json neither {SINGLE_NAME} nor {INDEX_NAME} "
            f"beside it: {'pickled weights are never loaded' if pickled else 'there are no weights'}. Save an adapter, "
            "or a whole model, as safetensors.",
            code="model_pickle_only" if pickled else "model_weights_missing",
        )
    try:
        weight_map = weight_map_of(parse_json_object(_read(model, INDEX_NAME, MAX_INDEX_BYTES)), "model")
    except ValueError as error:
        raise bad_index(str(error)[:200], "model") from error
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if name not in model.files]:
        raise SourceError(f"{missing[0][:200]!r} is missing, but {INDEX_NAME} names it.", code="model_weights_missing")
    weights: dict[str, tuple[Tensor, ...]] = {}
    for name in names:
        weights[name] = _header(model, name)
        refuse_too_many(sum(map(len, weights.values())), "model")
    refuse_astray(weight_map, weights, "model")
    return weights


def sources_of(model: FullModel, weights: Weights) -> dict[str, ByteSource] | None:
    """Where the weight files are read from, by name; None where they are in a directory of this machine.

    Raises:
        Unavailable: One is not what was listed any more (`source_changed`).
    """
    if not model.uri.startswith("gs://"):
        return None
    return {name: StoredObject(name, model.open(name)) for name in weights}


def _header(model: FullModel, name: str) -> tuple[Tensor, ...]:
    with model.open(name) as reader:
        return parse_header(reader.read, reader.size, name)[0]


def refuse_quantized(model: FullModel, weights: Weights) -> None:
    """Refuse a model whose weights are not of 16 or more bits.

    Raises:
        SourceError: `model_quantized`.
    """
    if is_stored_quantized({tensor.name: tensor.dtype for tensors in weights.values() for tensor in tensors}):
        raise SourceError(
            f"the model at {model.uri} is stored quantized ({quantization_of(model.config) or 'by its tensors'}), and "
            "an export is of 16 bits. Save it without quantization (save_pretrained after dequantize()).",
            code="model_quantized",
        )
