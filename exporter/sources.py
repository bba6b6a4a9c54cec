"""Where base model and adapter come from: a directory, or a model id on the Hugging Face hub.

Either way the rest of the exporter sees a local directory and an identity that changes when the bytes do; of an
adapter in Cloud Storage, a copy of the files that an export can use.
"""

import errno
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactStore, StoredFile, file_uri, path_of
from dispatcher.crc32c import Crc32c
from dispatcher.errors import NotFound, SourceError, StorageFull, Unavailable
from exporter import hub
from exporter.adapter import WEIGHTS_NAME, refuse_without_weights
from exporter.byte_source import changed
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.documents import read_json_object
from exporter.gemma import SIDE_FILES, is_side_file
from exporter.peft_config import CONFIG_NAME
from exporter.quantized import is_stored_quantized, quantization_of, without_quantization

log = logging.getLogger(__name__)
MAX_CONFIG_BYTES = 10_000_000
HUB_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja")
"""What an export can use; never a pickle."""
SIDE_PATTERNS = ("config.json", *SIDE_FILES, "*.jinja")
BLOCK_BYTES = 8 << 20
LOCAL = "directory:"
"""How the revision of a base in a directory begins."""

TokenSource = Callable[[], str | None]
Opener = Callable[[str, str | None, TokenSource], "Base"]
"""`open_base` and its like: takes an id, a revision and the source of a token."""


@dataclass(frozen=True)
class Base:
    """A base model that is here: its directory, its parsed config.json, and which revision it is."""

    model_id: str
    revision: str
    """The hub's commit, or `directory:` and a digest of file names, sizes and times of change."""
    directory: Path
    config: dict[str, Any]
    """Without leftovers of a quantization that the weights do not have."""
    requested: str | None = None
    """What the training job names, where that is another model."""
    trained_on: dict[str, str] | None = None
    """The quantized model that the adapter was trained on, as far as is known: `id`, `revision`, `quantization`."""


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


def open_base(model_id: str, revision: str | None, token: TokenSource) -> Base:
    """Find a base model and read its config.json.

    Args:
        model_id: A directory, a `file://` URI, or a hub id.
        revision: Branch, tag or commit on the hub; None is its main branch.
        token: Gives the caller's Hugging Face token; asked only where the hub is.

    Raises:
        SourceError: `base_uri_unsupported`, `base_missing`, `base_config_invalid`, or one of the hub's answers
            (`base_gated`, `hub_token_invalid`).
        QuantizedBase: Its weights are quantized; none of them was fetched. What its config says alone does not count:
            16-bit weights that were saved with such a leftover are used.
        Unavailable: The hub did not answer.
    """
    return _open(model_id, revision, token, HUB_PATTERNS)


def open_without_weights(model_id: str, revision: str | None, token: TokenSource) -> Base:
    """As `open_base`, but from the hub no weights are fetched; see `headers_of`.

    Raises:
        SourceError, Unavailable: As `open_base`.
    """
    return _open(model_id, revision, token, SIDE_PATTERNS)


def headers_of(base: Base, token: TokenSource) -> Checkpoint:
    """The headers of a base's weights, from the hub if they were not fetched.

    Raises:
        SourceError, Unavailable: As `open_checkpoint` and `open_base`.
    """
    if base.revision.startswith(LOCAL):
        return open_checkpoint(base.directory)
    return hub.checkpoint(base.model_id, base.revision, token())


def open_side_files(model_id: str, revision: str | None, token: TokenSource) -> Base:
    """As `open_base`, but from the hub only config, tokenizer and what else lies beside the weights, however stored.

    Raises:
        SourceError, Unavailable: As `open_base`.
    """
    return _open(model_id, revision, token, SIDE_PATTERNS, quantized=True)


def _open(
    model_id: str, revision: str | None, token: TokenSource, patterns: Sequence[str], *, quantized: bool = False
) -> Base:
    directory = local_path(model_id)
    if model_id.startswith("gs://"):
        raise SourceError(
            f"the base model {model_id} is in Cloud Storage, from where bases are not read: expected an id on the "
            "Hugging Face hub, or a directory.",
            code="base_uri_unsupported",
        )
    if directory is None:
        return _from_hub(model_id, revision, token(), patterns, quantized=quantized)
    if not directory.is_dir():
        raise SourceError(f"the base model's directory {directory} does not exist.", code="base_missing")
    revision = f"{LOCAL}{_directory_digest(directory)}"
    config = _read_config(directory)
    method = quantization_of(config)
    if method is not None and not quantized:
        tensors = open_checkpoint(directory).tensors()
        if is_stored_quantized({name: tensor.dtype for name, (_, tensor) in tensors.items()}):
            raise QuantizedBase(model_id, method, config)
    return Base(model_id, revision, directory, without_quantization(config))


def is_current(base: Base) -> bool:
    """Whether a base in a directory is still what it was when it was opened; the hub's commits never change."""
    return not base.revision.startswith(LOCAL) or base.revision == f"{LOCAL}{_directory_digest(base.directory)}"


@contextmanager
def adapter_here(store: ArtifactStore, uri: str, files: list[StoredFile]) -> Iterator[Path]:
    """An adapter as a local directory: its own, or a copy that lasts as long as the `with` statement.

    Args:
        store: What reads the URI.
        uri: Where the adapter lies.
        files: What is listed there, with checksums; a copy holds these very bytes.

    Raises:
        SourceError: `adapter_missing`, `source_encoded`, and those of `refuse_without_weights`.
        Unavailable: A file is not what was listed any more (`source_changed`), or cannot be read.
        StorageFull: No room for the copy.
    """
    if not uri.startswith("gs://"):
        yield path_of(uri)
        return
    if not files:
        raise SourceError(f"there is no adapter at {uri}.", code="adapter_missing")
    names = [file.name for file in files]
    if CONFIG_NAME in names:
        refuse_without_weights([name for name in names if "/" not in name], uri)
    wanted = [file for file in files if file.name in (CONFIG_NAME, WEIGHTS_NAME) or is_side_file(file.name)]
    with files_here(store, uri, wanted) as directory:
        yield directory


@contextmanager
def files_here(store: ArtifactStore, uri: str, files: Sequence[StoredFile]) -> Iterator[Path]:
    """A directory of a store as a local one: itself, or a copy of some files that lasts as long as the `with`.

    Raises:
        SourceError: `source_encoded`.
        Unavailable: A file is not what was listed any more (`source_changed`), or cannot be read.
        StorageFull: No room for the copy.
    """
    if not uri.startswith("gs://"):
        yield path_of(uri)
        return
    with tempfile.TemporaryDirectory(prefix="gemma-export-") as scratch:
        log.info("fetching %d files, %d bytes, from %s", len(files), sum(file.size for file in files), uri)
        for file in files:
            _fetch(store, file_uri(uri, file.name), file, Path(scratch) / file.name)
        yield Path(scratch)


def _fetch(store: ArtifactStore, uri: str, listed: StoredFile, target: Path) -> None:
    crc = Crc32c()
    try:
        target.parent.mkdir(exist_ok=True)
        with store.open(uri) as reader, target.open("xb") as file:
            for offset in range(0, reader.size, BLOCK_BYTES):
                block = reader.read(offset, BLOCK_BYTES)
                crc.update(block)
                file.write(block)
            size = reader.size
    except NotFound as error:
        raise changed(uri) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageFull(f"no room on this machine for a copy of {uri}: {listed.size} bytes.") from error
        raise Unavailable(f"{uri} cannot be copied: {error.strerror}.") from error
    if (size, crc.text) != (listed.size, listed.crc32c):
        raise changed(uri)


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
    model_id: str, revision: str | None, token: str | None, patterns: Sequence[str], *, quantized: bool
) -> Base:
    repository = hub.look_up(model_id, revision, token)
    config = _read_config(repository.directory) if quantized or not repository.is_gguf else {}
    if not quantized:
        method = "GGUF" if repository.is_gguf else quantization_of(config)
        if repository.is_gguf or (method is not None and is_stored_quantized(hub.stored_dtypes(repository, token))):
            raise QuantizedBase(model_id, method or "GGUF", config)
    hub.fetch(repository, token, patterns)
    return Base(model_id, repository.commit, repository.directory, without_quantization(config))
