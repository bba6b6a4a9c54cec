"""The files beside the weights: config, tokenizer, chat template, processor, generation config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactWriter, StoredFile
from dispatcher.errors import SourceError
from exporter.attempt import Attempt
from exporter.checkpoint import INDEX_NAME
from exporter.documents import read_json_object
from exporter.gemma import (
    LEGACY_TEMPLATE_FILE,
    SIDE_FILES,
    TEMPLATE_FILE,
    TEMPLATE_FILES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_GROUP,
)
from exporter.model_config import config_bytes
from exporter.sources import TEMPLATE_FOLDER, Base

CONFIG_NAME = "config.json"
MAX_SIDE_FILE_BYTES = 200_000_000
BLOCK_BYTES = 1024 * 1024


def side_files(base: Path, adapter: Path) -> dict[str, Path]:
    """Where each side file comes from: the adapter's own where it has one, else the base's.

    A tokenizer's files belong together: where the adapter has a tokenizer, all of them come from the adapter. Only
    `tokenizer.model`, which transformers 5 does not save, comes from the base then. A chat template's belong together
    as well, in whichever form the adapter has one.

    Raises:
        SourceError: `side_file_invalid`: a tokenizer_config.json that is none.
    """
    has_tokenizer = any((adapter / name).is_file() for name in TOKENIZER_FILES)
    found = {}
    for name in SIDE_FILES:
        whole = has_tokenizer and name in TOKENIZER_GROUP
        places = (adapter,) if whole else (adapter, base)
        source = next((directory / name for directory in places if (directory / name).is_file()), None)
        if source is not None and name not in TEMPLATE_FILES:
            found[name] = source
    source = _source_of_template(base, adapter)
    return found if source is None else found | _template_files(source)


def inner_template(base: Path, adapter: Path) -> bytes | None:
    """The chat template where it is only inside a `tokenizer_config.json`: it gets a file of its own.

    A processor looks nowhere else; and it may be the config of the other of the two that becomes the output's.

    Raises:
        SourceError: As `side_files`.
    """
    source = _source_of_template(base, adapter)
    return None if source is None or (source / TEMPLATE_FILE).is_file() else _inside_tokenizer_config(source)


def _source_of_template(base: Path, adapter: Path) -> Path | None:
    return next((place for place in (adapter, base) if _template_files(place) or _inside_tokenizer_config(place)), None)


def _template_files(directory: Path) -> dict[str, Path]:
    files = {name: directory / name for name in (TEMPLATE_FILE, LEGACY_TEMPLATE_FILE) if (directory / name).is_file()}
    further = sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))
    return files | {f"{TEMPLATE_FOLDER}/{path.name}": path for path in further}


def _inside_tokenizer_config(directory: Path) -> bytes | None:
    """The template that transformers 4 keeps in the tokenizer's config; of several, the default one."""
    path = directory / TOKENIZER_CONFIG
    if not path.is_file():
        return None
    try:
        template = read_json_object(path, limit=MAX_SIDE_FILE_BYTES).get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        return template.encode() if isinstance(template, str) else None
    except ValueError as error:
        raise SourceError(
            f"{TOKENIZER_CONFIG} cannot be read: {str(error)[:200]}. Save the tokenizer again.",
            code="side_file_invalid",
        ) from error


def write_model_files(attempt: Attempt, base: Base, config: Mapping[str, Any], index: bytes | None) -> list[StoredFile]:
    """Write config.json and the index of the weights.

    Args:
        attempt: Where to.
        base: The base model; its config.json is copied byte for byte if it says what the output's is to say.
        config: The output's.
        index: The bytes of the index, if there are several files of weights.
    """
    original = (base.directory / CONFIG_NAME).read_bytes()
    stored = [_publish_bytes(attempt, CONFIG_NAME, config_bytes(original, config))]
    if index is not None:
        stored.append(_publish_bytes(attempt, INDEX_NAME, index))
    return stored


def write_side_files(attempt: Attempt, base: Path, adapter: Path) -> list[StoredFile]:
    """Write tokenizer, chat template, processor and generation config into an artifact's directory.

    Args:
        attempt: Where to.
        base: The base model's directory.
        adapter: The adapter's directory.

    Raises:
        SourceError: `side_file_too_large`, or as `side_files`.
    """
    stored = []
    for name, source in side_files(base, adapter).items():
        if source.stat().st_size > MAX_SIDE_FILE_BYTES:
            raise SourceError(f"{name} is larger than {MAX_SIDE_FILE_BYTES} bytes.", code="side_file_too_large")
        stored.append(publish_copy(attempt, name, source))
    if (template := inner_template(base, adapter)) is not None:
        stored.append(_publish_bytes(attempt, TEMPLATE_FILE, template))
    return stored


def _publish_bytes(attempt: Attempt, name: str, content: bytes) -> StoredFile:
    return attempt.publish(name, lambda writer: writer.write(content), size=len(content))


def publish_copy(attempt: Attempt, name: str, source: Path) -> StoredFile:
    """Publish a copy of a local file, of any size, through one buffer."""
    block = bytearray(BLOCK_BYTES)

    def fill(writer: ArtifactWriter) -> None:
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                writer.write(memoryview(block)[:count])

    return attempt.publish(name, fill, size=source.stat().st_size)
