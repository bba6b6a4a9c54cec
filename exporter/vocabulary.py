"""Whether a model's vocabulary is one: rows of the embedding, what the config says, tokens of the tokenizer."""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dispatcher.errors import AdapterMismatch
from exporter.documents import read_json_object

TOKENIZER_NAME = "tokenizer.json"
ADDED_NAME = "added_tokens.json"
MAX_ADDED_BYTES = 50_000_000
_HEAD_BYTES = 8 << 20
"""Where `tokenizer.json` lists its added tokens: they come before the model's own vocabulary."""


def refuse_vocabulary_that_differs(rows: int | None, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Refuse an embedding that the model's config or its tokenizer contradicts.

    An embedding may have more rows than there are tokens, as Gemma's own has; never fewer.

    Args:
        rows: Of the output's embedding; None when it has none that we know.
        config: The output's config.json.
        files: The output's side files by name.

    Raises:
        AdapterMismatch: `vocabulary_mismatch`, with the three numbers.
    """
    declared = vocabulary_of(config)
    tokens = highest_added_token(files) + 1
    if rows is None or declared is None or (rows == declared and tokens <= rows):
        return
    raise AdapterMismatch(
        f"the vocabulary is not one: the embedding has {rows} rows, config.json says {declared}, and the tokenizer's "
        f"added tokens need {tokens}. Train embed_tokens and lm_head with the tokens that were added "
        "(modules_to_save), or export with the base's tokenizer.",
        code="vocabulary_mismatch",
    )


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """The `vocab_size` of a config.json, or of the text tower in it."""
    text = config.get("text_config")
    found = text.get("vocab_size") if isinstance(text, dict) else None
    found = config.get("vocab_size") if found is None else found
    return found if type(found) is int and 0 <= found < 2**31 else None


def highest_added_token(files: Mapping[str, Path]) -> int:
    """The highest id among the tokens that were added to a tokenizer; -1 when none were, or it does not tell.

    Only those are looked at: reading all of a Gemma's vocabulary takes more memory than merging its weights, and what
    a training adds to it is among them.
    """
    ids = [-1]
    if (path := files.get(ADDED_NAME)) is not None:
        with contextlib.suppress(ValueError):
            ids += [value for value in read_json_object(path, limit=MAX_ADDED_BYTES).values() if _is_id(value)]
    if (path := files.get(TOKENIZER_NAME)) is not None:
        ids += [token["id"] for token in added_tokens(path)]
    return max(ids)


def added_tokens(path: Path) -> list[dict[str, Any]]:
    """The tokens that a `tokenizer.json` lists as added, each with its `id`; none where it does not tell."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).decode(errors="replace")
    match = re.search(r'"added_tokens"\s*:\s*', head)
    if match is None:
        return []
    try:
        tokens, _ = json.JSONDecoder().raw_decode(head, match.end())
    except (ValueError, RecursionError):
        return []
    if not isinstance(tokens, list):
        return []
    return [token for token in tokens if isinstance(token, dict) and _is_id(token.get("id"))]


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31
