"""What llama.cpp's converter asks of a tokenizer's files that transformers 5 no longer writes.

Where it reads a vocabulary from `tokenizer.model`, it learns which tokens are special, or stand for themselves, from
the `added_tokens_decoder` of `tokenizer_config.json` alone (`_create_vocab_sentencepiece` in
https://github.com/ggml-org/llama.cpp/blob/master/conversion/base.py). Without it `<start_of_turn>` would be text.
"""

import json
from pathlib import Path
from typing import Any

from dispatcher.errors import SourceError
from exporter.documents import read_json_object
from exporter.gemma import TOKENIZER_CONFIG
from exporter.sidefiles import MAX_SIDE_FILE_BYTES
from exporter.vocabulary import TOKENIZER_NAME, added_tokens

DESCRIBED = "added_tokens_decoder"
CODE = "auto_map"
"""Where a config names classes of Python that come with a model. Source:
https://huggingface.co/docs/transformers/custom_models"""


def leave_out_code(directory: Path) -> None:
    """Take what names code of its own (`auto_map`) out of `tokenizer_config.json`.

    Nothing here trusts remote code; but the converter asks for it in some of its classes.

    Args:
        directory: As for `describe_added_tokens`.

    Raises:
        SourceError: `side_file_invalid`.
    """
    config = directory / TOKENIZER_CONFIG
    fields = _fields(config)
    if fields.pop(CODE, None) is not None:
        config.unlink()
        config.write_text(json.dumps(fields))


def describe_added_tokens(directory: Path) -> None:
    """Put what `tokenizer.json` says of the added tokens into `tokenizer_config.json`, where that says nothing of them.

    Args:
        directory: The model's files, as laid out for the converter; a config that is a link is replaced, not followed.

    Raises:
        SourceError: `side_file_invalid`: `tokenizer_config.json` is none.
    """
    config = directory / TOKENIZER_CONFIG
    if not all((directory / name).is_file() for name in ("tokenizer.model", TOKENIZER_NAME)):
        return
    fields = _fields(config)
    added = added_tokens(directory / TOKENIZER_NAME)
    if added and not fields.get(DESCRIBED):
        described = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}
        config.unlink(missing_ok=True)
        config.write_text(json.dumps({**fields, DESCRIBED: described}))


def _fields(config: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says; nothing where there is none."""
    try:
        return read_json_object(config, limit=MAX_SIDE_FILE_BYTES) if config.is_file() else {}
    except ValueError as error:
        raise SourceError(
            f"{TOKENIZER_CONFIG} cannot be read: {str(error)[:200]}. Save the tokenizer again.",
            code="side_file_invalid",
        ) from error
