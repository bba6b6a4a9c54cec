"""The files beside the weights: config, tokenizer, chat template, processor, generation config."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactWriter, StoredFile
from dispatcher.errors import SourceError
from exporter.attempt import Attempt
from exporter.checkpoint import INDEX_NAME
from exporter.gemma import SIDE_FILES, TOKENIZER_FILES, TOKENIZER_GROUP
from exporter.sources import TEMPLATE_FOLDER, Base

MAX_SIDE_FILE_BYTES = 200_000_000
BLOCK_BYTES = 1024 * 1024


def side_files(base: Path, adapter: Path) -> dict[str, Path]:
    """Where each side file comes from: the adapter's own where it has one, else the base's.

    A tokenizer and its chat template belong together: where the adapter has a tokenizer, all of that comes from the
    adapter, so that a template inside its `tokenizer_config.json` is not overruled by a file of the base. Only
    `tokenizer.model`, which transformers 5 does not save, comes from the base then.
    """
    has_tokenizer = any((adapter / name).is_file() for name in TOKENIZER_FILES)
    names = (*SIDE_FILES, *_templates(base), *_templates(adapter))
    found = {}
    for name in names:
        whole = has_tokenizer and (name in TOKENIZER_GROUP or name.startswith(f"{TEMPLATE_FOLDER}/"))
        places = (adapter,) if whole else (adapter, base)
        source = next((directory / name for directory in places if (directory / name).is_file()), None)
        if source is not None:
            found[name] = source
    return found


def _templates(directory: Path) -> Iterator[str]:
    for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja")):
        yield f"{TEMPLATE_FOLDER}/{path.name}"


def write_model_files(attempt: Attempt, base: Base, config: dict[str, Any], index: bytes | None) -> list[StoredFile]:
    """Write config.json and the index of the weights.

    Args:
        attempt: Where to.
        base: The base model; its config.json is copied byte for byte if the output's is the same.
        config: The output's.
        index: The bytes of the index, if there are several files of weights.
    """
    if config == base.config:
        stored = [publish_copy(attempt, "config.json", base.directory / "config.json")]
    else:
        content = json.dumps(config, indent=2).encode() + b"\n"
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
