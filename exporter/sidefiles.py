"""The files beside the weights: config, tokenizer, chat template, processor, generation config."""

from collections.abc import Iterator
from pathlib import Path

from dispatcher.artifacts import ArtifactWriter, StoredFile
from dispatcher.errors import SourceError
from exporter.attempt import Attempt
from exporter.checkpoint import INDEX_NAME, changed
from exporter.documents import read_json_object
from exporter.gemma import SIDE_FILES, TOKENIZER_FILES, TOKENIZER_GROUP
from exporter.plan import Plan
from exporter.quantized import config_bytes, without_quantization
from exporter.sources import MAX_CONFIG_BYTES, TEMPLATE_FOLDER

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


def write_side_files(attempt: Attempt, base: Path, adapter: Path, plan: Plan | None) -> list[StoredFile]:
    """Write config, index and side files into an artifact's directory.

    Args:
        attempt: Where to.
        base: The base model's directory.
        adapter: The adapter's directory.
        plan: The streaming engine's plan, whose output needs the base's config and index; None when an engine
            wrote its own.
    """
    stored = []
    if plan is not None:
        stored.append(_publish_config(attempt, base / "config.json"))
        if plan.index is not None:
            index = plan.index
            stored.append(attempt.publish(INDEX_NAME, lambda writer: writer.write(index)))
    for name, source in side_files(base, adapter).items():
        if source.stat().st_size > MAX_SIDE_FILE_BYTES:
            raise SourceError(f"{name} is larger than {MAX_SIDE_FILE_BYTES} bytes.", code="side_file_too_large")
        stored.append(publish_copy(attempt, name, source))
    return stored


def _publish_config(attempt: Attempt, source: Path) -> StoredFile:
    """The base's config as it is, unless it speaks of a quantization."""
    try:
        config = read_json_object(source, limit=MAX_CONFIG_BYTES)
    except (ValueError, FileNotFoundError) as error:
        raise changed(source.name) from error  # it could be read when the base was opened
    if (cleaned := without_quantization(config)) == config:
        return publish_copy(attempt, source.name, source)
    content = config_bytes(cleaned)
    return attempt.publish(source.name, lambda writer: writer.write(content), size=len(content))


def publish_copy(attempt: Attempt, name: str, source: Path) -> StoredFile:
    """Publish a copy of a local file, of any size, through one buffer."""
    block = bytearray(BLOCK_BYTES)

    def fill(writer: ArtifactWriter) -> None:
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                writer.write(memoryview(block)[:count])

    return attempt.publish(name, fill, size=source.stat().st_size)
