"""The files beside the weights: config, tokenizer, chat template, processor, generation config."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactWriter, StoredFile
from dispatcher.errors import SourceError
from exporter.attempt import Attempt
from exporter.checkpoint import INDEX_NAME
from exporter.config import config_bytes
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
from exporter.plan import Plan
from exporter.sources import TEMPLATE_FOLDER

CONFIG_NAME = "config.json"
MAX_SIDE_FILE_BYTES = 200_000_000
BLOCK_BYTES = 1024 * 1024


def side_files(base: Path, adapter: Path) -> dict[str, Path | bytes]:
    """Each side file by its name: where it comes from, the adapter where it has one, else the base; or its content.

    A tokenizer's files belong together: where the adapter has a tokenizer, all of them come from the adapter. Only
    `tokenizer.model`, which transformers 5 does not save, comes from the base then. So do a chat template's, wherever
    it is kept; and one that is only inside `tokenizer_config.json` also gets a file of its own, because a processor
    looks nowhere else, and because that may be the file of the other of the two.

    Raises:
        SourceError: `side_file_invalid`: a tokenizer_config.json that is none.
    """
    has_tokenizer = any((adapter / name).is_file() for name in TOKENIZER_FILES)
    found: dict[str, Path | bytes] = {}
    for name in SIDE_FILES:
        whole = has_tokenizer and name in TOKENIZER_GROUP
        places = (adapter,) if whole else (adapter, base)
        source = next((directory / name for directory in places if (directory / name).is_file()), None)
        if source is not None and name not in TEMPLATE_FILES:
            found[name] = source
    for directory in (adapter, base):
        if templates := dict(_templates(directory)):
            return found | templates
    return found


def _templates(directory: Path) -> Iterator[tuple[str, Path | bytes]]:
    """Every file of the chat template that a directory has, in whichever form."""
    for name in (TEMPLATE_FILE, LEGACY_TEMPLATE_FILE):
        if (directory / name).is_file():
            yield name, directory / name
    if not (directory / TEMPLATE_FILE).is_file() and (template := _inner_template(directory)):
        yield TEMPLATE_FILE, template
    for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja")):
        yield f"{TEMPLATE_FOLDER}/{path.name}", path


def _inner_template(directory: Path) -> bytes | None:
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


def write_side_files(
    attempt: Attempt, base: Path, adapter: Path, plan: Plan | None, config: Mapping[str, Any]
) -> list[StoredFile]:
    """Write config, index and side files into an artifact's directory.

    Args:
        attempt: Where to.
        base: The base model's directory.
        adapter: The adapter's directory.
        plan: The streaming engine's plan, whose output needs a config and the base's index; None when an engine
            wrote its own.
        config: What config.json is to say; the base's file is copied as it is where it says just that.

    Raises:
        SourceError: `side_file_too_large`, or as `side_files`.
    """
    stored = []
    if plan is not None:
        stored.append(_publish_bytes(attempt, CONFIG_NAME, config_bytes((base / CONFIG_NAME).read_bytes(), config)))
        if plan.index is not None:
            stored.append(_publish_bytes(attempt, INDEX_NAME, plan.index))
    for name, source in side_files(base, adapter).items():
        if isinstance(source, bytes):
            stored.append(_publish_bytes(attempt, name, source))
            continue
        if source.stat().st_size > MAX_SIDE_FILE_BYTES:
            raise SourceError(f"{name} is larger than {MAX_SIDE_FILE_BYTES} bytes.", code="side_file_too_large")
        stored.append(publish_copy(attempt, name, source))
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
