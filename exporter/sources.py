"""Where a base model comes from: a directory, or a model id on the Hugging Face hub.

Either way the rest of the exporter sees an identity that changes when the bytes do, a local directory of what lies
beside the weights, and sources of the weights, which may be there too or be read from the hub as they are needed.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dispatcher.artifacts import path_of
from dispatcher.errors import SourceError
from exporter import hub
from exporter.byte_source import ByteSource
from exporter.checkpoint import INDEX_NAME, Checkpoint, open_checkpoint
from exporter.documents import read_json_object
from exporter.gemma import SIDE_FILES
from exporter.quantized import is_stored_quantized, quantization_of, without_quantization

MAX_CONFIG_BYTES = 10_000_000
HUB_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja")
"""What an export can use; never a pickle."""
SIDE_PATTERNS = ("config.json", INDEX_NAME, *SIDE_FILES, "*.jinja")
LOCAL = "directory:"
"""How the revision of a base in a directory begins."""

TokenSource = Callable[[], str | None]
Opener = Callable[[str, str | None, TokenSource], "Base"]
"""`open_base` and its like: takes an id, a revision and the source of a token."""


@dataclass(frozen=True)
class Base:
    """A base model: its parsed config.json, which revision it is, and where its files are."""

    model_id: str
    revision: str
    """The hub's commit, or `directory:` and a digest of file names, sizes and times of change."""
    directory: Path
    """What lies beside its weights, and they too if `weights` does not say otherwise"""
    config: dict[str, Any]
    """Without leftovers of a quantization that the weights do not have."""
    requested: str | None = None
    """What the training job names, where that is another model."""
    trained_on: dict[str, str] | None = None
    """The quantized model that the adapter was trained on, as far as is known: `id`, `revision`, `quantization`."""
    weights: Mapping[str, ByteSource] | None = None
    """Its weight files by name; None where they are in the directory"""
    fetch_weights: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    """Brings them there, if they are not"""
    _headers: list[Checkpoint] = field(default_factory=list, repr=False, compare=False)

    def checkpoint(self) -> Checkpoint:
        """The headers of its weights, read once.

        Raises:
            SourceError, Unavailable: As `open_checkpoint`.
        """
        if not self._headers:
            self._headers.append(open_checkpoint(self.directory, self.weights))
        return self._headers[0]

    def reading(self, weights: Mapping[str, ByteSource]) -> "Base":
        """This base with its weights read from elsewhere."""
        return replace(self, weights=weights, _headers=[])

    def here(self) -> "Base":
        """This base with its weights in the directory, for what can read nothing else.

        Raises:
            SourceError, Unavailable: As `open_base`.
        """
        if self.fetch_weights is None:
            return self
        self.fetch_weights()
        return replace(self, weights=None, fetch_weights=None, _headers=[])


class QuantizedBase(SourceError):
    """The weights of a base are stored quantized: nothing is merged into them, its 16-bit twin has to be found.

    Args:
        model_id: Which base.
        method: How it is quantized, in a word.
        config: Its config.json.
    """

    code = "base_quantized"

    def __init__(self, model_id: str, method: str, config: dict[str, Any]) -> None:
        super().__init__(
            f"the base {model_id} is stored quantized ({method}), into which nothing is merged: the 16-bit model that "
            "it was made from is wanted."
        )
        self.method = method
        self.config = config


def local_path(uri: str) -> Path | None:
    """The path that a plain path or `file://` URI names; None for any other scheme or for a hub id."""
    if "://" in uri and not uri.startswith("file://"):
        return None
    path = path_of(uri)
    return path if "://" in uri or Path(uri).is_absolute() or path.is_dir() else None


def open_base(
    model_id: str, revision: str | None, token: TokenSource, *, while_waiting: Callable[[], object] = lambda: None
) -> Base:
    """Find a base model, read its config.json, and have its weights in a directory.

    Args:
        model_id: A directory, a `file://` URI, or a hub id.
        revision: Branch, tag or commit on the hub; None is its main branch.
        token: Gives the caller's Hugging Face token; asked only where the hub is.
        while_waiting: Called where the hub has to be asked again, now and later; what it raises ends the wait.

    Raises:
        SourceError: `base_uri_unsupported`, `base_missing`, `base_pickle_only`, `base_config_invalid`, or as
            `hub.look_up`.
        QuantizedBase: Its weights are quantized; none of them was fetched. What its config says alone does not count:
            16-bit weights that were saved with such a leftover are used.
        Unavailable: The hub did not answer.
    """
    return open_streamed(model_id, revision, token, while_waiting=while_waiting).here()


def open_streamed(
    model_id: str, revision: str | None, token: TokenSource, *, while_waiting: Callable[[], object] = lambda: None
) -> Base:
    """As `open_base`, but from the hub no weights are fetched: they are read from there as they are needed.

    Raises:
        SourceError, Unavailable: As `open_base`.
    """
    return _open(model_id, revision, token, for_weights=True, while_waiting=while_waiting)


def open_side_files(model_id: str, revision: str | None, token: TokenSource) -> Base:
    """As `open_streamed`, but only for what lies beside the weights, however they are stored.

    Raises:
        SourceError, Unavailable: As `open_base`.
    """
    return _open(model_id, revision, token, for_weights=False)


def _open(
    model_id: str,
    revision: str | None,
    token: TokenSource,
    *,
    for_weights: bool,
    while_waiting: Callable[[], object] = lambda: None,
) -> Base:
    directory = local_path(model_id)
    if model_id.startswith("gs://"):
        raise SourceError(
            f"the base model {model_id} is in Cloud Storage, from where bases are not read: expected an id on the "
            "Hugging Face hub, or a directory.",
            code="base_uri_unsupported",
        )
    if directory is None:
        return _from_hub(model_id, revision, token(), for_weights=for_weights, while_waiting=while_waiting)
    if not directory.is_dir():
        raise SourceError(f"the base model's directory {directory} does not exist.", code="base_missing")
    revision = f"{LOCAL}{_directory_digest(directory)}"
    config = _read_config(directory)
    base = Base(model_id, revision, directory, without_quantization(config))
    if for_weights:
        _refuse_quantized(base, config)
    return base


def _refuse_quantized(base: Base, config: dict[str, Any]) -> None:
    method = quantization_of(config)
    if method is None:
        return
    if is_stored_quantized({name: tensor.dtype for name, (_, tensor) in base.checkpoint().tensors().items()}):
        raise QuantizedBase(base.model_id, method, config)


def is_current(base: Base) -> bool:
    """Whether a base in a directory is still what it was when it was opened; the hub's commits never change."""
    return not base.revision.startswith(LOCAL) or base.revision == f"{LOCAL}{_directory_digest(base.directory)}"


def _directory_digest(directory: Path) -> str:
    lines = []
    for path in sorted(directory.iterdir()):
        if path.is_file():
            facts = path.stat()
            lines.append(f"{path.name}\t{facts.st_size}\t{facts.st_mtime_ns}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:40]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise SourceError(f"{directory} has no config.json: it holds no model.", code="base_missing")
    try:
        return read_json_object(path, limit=MAX_CONFIG_BYTES)
    except ValueError as error:
        raise SourceError(
            f"the base's config.json cannot be read: {str(error)[:200]}.", code="base_config_invalid"
        ) from error


def _from_hub(
    model_id: str, revision: str | None, token: str | None, *, for_weights: bool, while_waiting: Callable[[], object]
) -> Base:
    repository = hub.look_up(model_id, revision, token, while_waiting=while_waiting)
    if for_weights and repository.is_gguf:
        raise QuantizedBase(model_id, "GGUF", {})
    config = _read_config(repository.directory)
    if for_weights and repository.files and not repository.weights:
        pickled = any(name.endswith(".bin") for name in repository.files)
        raise SourceError(
            f"base model {model_id!r} has no safetensors file on the hub"
            f"{', only pickled weights (*.bin), which are never loaded' if pickled else ''}: name one that has.",
            code="base_pickle_only" if pickled else "base_missing",
        )
    base = Base(
        model_id,
        repository.commit,
        repository.directory,
        without_quantization(config),
        weights=repository.weights or None,
        fetch_weights=partial(hub.fetch, repository, token, HUB_PATTERNS),
    )
    if for_weights and quantization_of(config) is not None:
        hub.fetch(repository, token, (INDEX_NAME,))
        _refuse_quantized(base, config)
    hub.fetch(repository, token, SIDE_PATTERNS)
    return base
