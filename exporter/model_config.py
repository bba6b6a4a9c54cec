"""The output's config.json: the base's, with what the merge changed."""

import copy
from typing import Any

from exporter.plan import Plan


def merged_config(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The base's config.json with what a plan changes: an untied head, the size of the vocabulary.

    A value that the text tower has is changed there too, since either may be the one that a library reads.
    """
    edits: dict[str, Any] = {}
    if plan.untied:
        edits["tie_word_embeddings"] = False
    if plan.resized:
        edits["vocab_size"] = plan.vocabulary
    edited = copy.deepcopy(config)
    text = edited.get("text_config")
    for name, value in edits.items():
        if isinstance(text, dict):
            text[name] = value
        if not isinstance(text, dict) or name == "tie_word_embeddings" or name in edited:
            edited[name] = value
    return edited
