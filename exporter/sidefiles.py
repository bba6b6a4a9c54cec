"""The files beside the weights: config, tokenizer, chat template, processor, generation config."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dispatcher.artifacts import ArtifactWriter, StoredFile
from dispatcher.errors import SourceError
from exporter.attempt import Attempt
from exporter.byte_source import changed
from exporter.checkpoint import INDEX_NAME
from exporter.documents import read_json_object
from exporter.gemma import (
    SIDE_FILES,
    TEMPLATE_FILE,
    TEMPLATE_FILES,
    TEMPLATE_FOLDER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_GROUP,
)
from exporter.quantized import config_bytes
from exporter.sources import MAX_CONFIG_BYTES, Base

MAX_SIDE_FILE_BYTES = 200_000_000
BLOCK_BYTES = 1024 * 1024


def side_files(base: Path, adapter: Path) -> dict[str, Path]:
    """Where each side file comes from: the adapter's own where it has one, else the base's; see `origins`.

    Raises:
        SourceError: `side_file_too_large`; `side_file_invalid`: a tokenizer_config.json that is none.
    """
    names = origins(side_file_names(adapter), side_file_names(base), has_template=_has_template(adapter))
    found = {name: (adapter if own else base) / name for name, own in names.items()}
    for name, source in found.items():
        refuse_too_large(name, source.stat().st_size)
    return found


def refuse_too_large(name: str, size: int) -> None:
    """Refuse a side file that no model has, by its size in bytes.

    Raises:
        SourceError: `side_file_too_large`.
    """
    if size > MAX_SIDE_FILE_BYTES:
        raise SourceError(
            f"{name[:200]!r} has {size} bytes, {MAX_SIDE_FILE_BYTES} are the most.", code="side_file_too_large"
        )


def inner_template(base: Path, adapter: Path) -> bytes | None:
    """The chat template where it is only inside a `tokenizer_config.json`: it gets a file of its own.

    A processor looks nowhere else; and it may be the config of the other of the two that becomes the output's.

    Raises:
        SourceError: As `side_files`.
    """
    source = adapter if _has_template(adapter) else base
    return None if (source / TEMPLATE_FILE).is_file() else _inside_tokenizer_config(source)


def _has_template(directory: Path) -> bool:
    return (
        any((directory / name).is_file() for name in TEMPLATE_FILES) or _inside_tokenizer_config(directory) is not None
    )


def _is_template(name: str) -> bool:
    return name in TEMPLATE_FILES or name.startswith(f"{TEMPLATE_FOLDER}/")


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


def side_file_names(directory: Path) -> list[str]:
    """The side files that are there, by their path in the directory."""
    templates = (f"{TEMPLATE_FOLDER}/{path.name}" for path in (directory / TEMPLATE_FOLDER).glob("*.jinja"))
    return [name for name in (*SIDE_FILES, *sorted(templates)) if (directory / name).is_file()]


def origins(own: Collection[str], base: Collection[str], *, has_template: bool | None = None) -> dict[str, bool]:
    """Which side files an output has, and of each whether it is its own or the base's.

    A tokenizer's files belong together: where there is an own tokenizer, all of them are its own. Only
    `tokenizer.model`, which transformers 5 does not save, comes from the base then. A chat template's belong together
    as well, in whichever form there is an own one.

    Args:
        own: The side files of what was trained.
        base: Those of its base.
        has_template: Whether what was trained has a chat template, which may be inside its `tokenizer_config.json`;
            where that is not known, a tokenizer counts as one.
    """
    has_tokenizer = any(name in own for name in TOKENIZER_FILES)
    if has_template is None:
        has_template = has_tokenizer or any(name in own for name in TEMPLATE_FILES)
    found = dict.fromkeys(own, True)
    for name in base:
        whole = has_template if _is_template(name) else has_tokenizer and name in TOKENIZER_GROUP
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

    Raises:
        SourceError: As `side_files`.
    """
    stored = []
    for name, source in side_files(base, adapter).items():
        stored.append(publish_copy(attempt, name, source))
    if (template := inner_template(base, adapter)) is not None:
        stored.append(attempt.publish(TEMPLATE_FILE, lambda writer: writer.write(template), size=len(template)))
    return stored


def publish_copy(attempt: Attempt, name: str, source: Path) -> StoredFile:
    """Publish a copy of a local file, of any size, through one buffer."""
    block = bytearray(BLOCK_BYTES)

    def fill(writer: ArtifactWriter) -> None:
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                writer.write(memoryview(block)[:count])

    return attempt.publish(name, fill, size=source.stat().st_size)
