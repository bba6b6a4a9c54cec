"""The files beside the weights: config, tokenizer, chat template, processor, generation config."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactWriter, StoredFile
from dispatcher.errors import SourceError
from exporter.attempt import Attempt
from exporter.checkpoint import INDEX_NAME, changed
from exporter.documents import read_json_object
from exporter.gemma import SIDE_FILES, TEMPLATE_FOLDER, TOKENIZER_FILES, TOKENIZER_GROUP
from exporter.quantized import config_bytes
from exporter.sources import MAX_CONFIG_BYTES, Base

MAX_SIDE_FILE_BYTES = 200_000_000
BLOCK_BYTES = 1024 * 1024


def side_files(base: Path, adapter: Path) -> dict[str, Path]:
    """Where each side file comes from: the adapter's own where it has one, else the base's; see `origins`."""
    names = origins(side_file_names(adapter), side_file_names(base))
    return {name: (adapter if own else base) / name for name, own in names.items()}


def side_file_names(directory: Path) -> list[str]:
    """The side files that are there, by their path in the directory."""
    templates = (f"{TEMPLATE_FOLDER}/{path.name}" for path in (directory / TEMPLATE_FOLDER).glob("*.jinja"))
    return [name for name in (*SIDE_FILES, *sorted(templates)) if (directory / name).is_file()]


def origins(own: Collection[str], base: Collection[str]) -> dict[str, bool]:
    """Which side files an output has, and of each whether it is its own or the base's.

    A tokenizer and its chat template belong together: where there is an own tokenizer, all of that is its own, so that
    a template inside its `tokenizer_config.json` is not overruled by a file of the base. Only `tokenizer.model`, which
    transformers 5 does not save, comes from the base then.

    Args:
        own: The side files of what was trained.
        base: Those of its base.
    """
    has_tokenizer = any(name in own for name in TOKENIZER_FILES)
    found = dict.fromkeys(own, True)
    for name in base:
        whole = has_tokenizer and (name in TOKENIZER_GROUP or name.startswith(f"{TEMPLATE_FOLDER}/"))
        if name not in found and not whole:
            found[name] = False
    return found


def write_model_files(attempt: Attempt, base: Base, config: dict[str, Any], index: bytes | None) -> list[StoredFile]:
    """Write config.json and the index of the weights.

    Args:
        attempt: Where to.
        base: The base model; its config.json is copied byte for byte if the output's is the same, so not where it has
            leftovers of a quantization.
        config: The output's.
        index: The bytes of the index, if there are several files of weights.
    """
    source = base.directory / "config.json"
    try:
        is_same = read_json_object(source, limit=MAX_CONFIG_BYTES) == config
    except (ValueError, FileNotFoundError) as error:
        raise changed(source.name) from error  # it could be read when the base was opened
    if is_same:
        stored = [publish_copy(attempt, "config.json", source)]
    else:
        content = config_bytes(config)
        stored = [attempt.publish("config.json", lambda writer: writer.write(content))]
    if index is not None:
        stored.append(attempt.publish(INDEX_NAME, lambda writer: writer.write(index)))
    return stored


def write_side_files(attempt: Attempt, base: Path, adapter: Path) -> list[StoredFile]:
    """Write tokenizer, chat template, processor and generation config into an artifact's directory.

    Args:
        attempt: Where to.
        base: The base model's directory.
        adapter: The adapter's directory.
    """
    stored = []
    for name, source in side_files(base, adapter).items():
        if source.stat().st_size > MAX_SIDE_FILE_BYTES:
            raise SourceError(f"{name} is larger than {MAX_SIDE_FILE_BYTES} bytes.", code="side_file_too_large")
        stored.append(publish_copy(attempt, name, source))
    return stored


def publish_copy(attempt: Attempt, name: str, source: Path) -> StoredFile:
    """Publish a copy of a local file, of any size, through one buffer."""
    block = bytearray(BLOCK_BYTES)

    def fill(writer: ArtifactWriter) -> None:
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                writer.write(memoryview(block)[:count])

    return attempt.publish(name, fill, size=source.stat().st_size)
