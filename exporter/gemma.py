"""Facts of the Gemma families as data: model types, classes, licences, key layouts, side files.

Checkpoints and adapters name the same module differently, depending on who wrote them: hub checkpoints keep the
layout of the release, transformers 5 re-saves some families under module names, and an adapter carries the module
names of the library version that trained it. `canonical_name` maps all of these to one name.
"""

import re
from dataclasses import dataclass
from typing import Any

from dispatcher.errors import SourceError


@dataclass(frozen=True)
class License:
    """Under what a family's weights, and models derived from them, are passed on."""

    tag: str
    """As the hub's model cards name it"""
    name: str
    link: str
    duties: str
    """What who passes the model on has to do"""


# Section 3.1 of the terms. They are the older families' alone since Gemma 4, as they say in their first lines.
GEMMA_TERMS = License(
    tag="gemma",
    name="Gemma Terms of Use",
    link="https://ai.google.dev/gemma/terms",
    duties="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
    "Whoever passes this model on hands over a copy of these terms and a `Notice` text file with the sentence before "
    "this one, keeps the notice of modification below, and binds the receiver to the "
    "[Prohibited Use Policy](https://ai.google.dev/gemma/prohibited_use_policy).",
)
# https://ai.google.dev/edge/litert-lm/models/gemma-4
APACHE_2 = License(
    tag="apache-2.0",
    name="Apache License 2.0",
    link="https://ai.google.dev/gemma/apache_2",
    duties="Whoever passes this model on hands over a copy of the licence and keeps the notice of modification below.",
)


@dataclass(frozen=True)
class Family:
    """What is particular to one `model_type` of config.json."""

    renames: tuple[tuple[str, str], ...]
    """Regular expressions and replacements, applied in order, from any layout's names to the canonical ones"""
    architecture: str
    """The class of a whole checkpoint, with the head it was released with"""
    text_type: str | None = None
    """Of a multimodal family: the model_type of its text tower alone"""
    license: License = GEMMA_TERMS
    towers_optional: bool = False
    """Whether a config without `vision_config` means a model without a vision tower; others take a default one"""
    reads_nested: bool = False
    """Whether the text-only class loads a text tower by the names it has within the multimodal model"""
    hidden_head: bool = False
    """Whether PEFT does not find the head, which is of a model inside the model; it then trains tokens of the embedding
    alone. Source: `peft.utils.other._get_module_names_tied_with_embedding`."""


_LEADING_MODEL = (r"^(?:model\.)+", "")
# `model.` is the base-model prefix of every class; shieldgemma2 wraps a whole Gemma3 under one more of it.
_TEXT_TOWER = (r"^language_model\.(?:model\.)?", "language_model.")
# Hub checkpoints of gemma3, shieldgemma2 and paligemma nest a whole causal model under `language_model`.
_LM_HEAD = (r"^language_model\.lm_head\.", "lm_head.")
_SIGLIP = (r"^vision_tower\.vision_model\.", "vision_tower.")
# transformers 5 dropped SigLIP's inner `vision_model` level.
_LLAVA = (_LEADING_MODEL, _TEXT_TOWER, _LM_HEAD, _SIGLIP)
_PLAIN = (_LEADING_MODEL,)
_FROM_MULTIMODAL = (_LEADING_MODEL, (r"^language_model\.", ""))
# The text-only class also loads the multimodal checkpoint's text tower.
_UNIFIED = (
    _LEADING_MODEL,
    (r"^embed_vision\.embedding_projection\.", "embed_vision.multimodal_embedder.embedding_projection."),
    (r"^vision_embedder\.", "embed_vision."),
)

FAMILIES: dict[str, Family] = {
    "gemma": Family(_PLAIN, "GemmaForCausalLM"),
    "gemma2": Family(_PLAIN, "Gemma2ForCausalLM"),
    "gemma3_text": Family(_PLAIN, "Gemma3ForCausalLM"),
    "gemma3": Family(_LLAVA, "Gemma3ForConditionalGeneration", "gemma3_text"),
    "gemma3n_text": Family(_FROM_MULTIMODAL, "Gemma3nForCausalLM", reads_nested=True),
    "gemma3n": Family(_PLAIN, "Gemma3nForConditionalGeneration", "gemma3n_text"),
    "gemma4_text": Family(_PLAIN, "Gemma4ForCausalLM", license=APACHE_2),
    "gemma4": Family(_PLAIN, "Gemma4ForConditionalGeneration", "gemma4_text", license=APACHE_2, towers_optional=True),
    "gemma4_unified_text": Family(_PLAIN, "Gemma4UnifiedForCausalLM", license=APACHE_2),
    "gemma4_unified": Family(
        _UNIFIED, "Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text", license=APACHE_2, towers_optional=True
    ),
    "shieldgemma2": Family(_LLAVA, "ShieldGemma2ForImageClassification", "gemma3_text", hidden_head=True),
    "paligemma": Family(_LLAVA, "PaliGemmaForConditionalGeneration", "gemma"),
}
"""A test compares the renames and classes with the installed library's own. Source:
https://github.com/huggingface/transformers/blob/main/src/transformers/conversion_mapping.py"""

TEXT_ROOT = "language_model"
"""How every multimodal class calls its text tower."""
TEXT_ROOTS = frozenset({"embed_tokens", "layers"})
"""What a text-only checkpoint has in that place."""
SCORE_ROOT = "score"
"""The head of a sequence or token classifier."""


@dataclass(frozen=True)
class Use:
    """How a class is loaded and what it is for, as the hub's model cards say it."""

    auto_class: str
    pipeline_tag: str


USES = {
    "ForCausalLM": Use("AutoModelForCausalLM", "text-generation"),
    "ForConditionalGeneration": Use("AutoModelForImageTextToText", "image-text-to-text"),
    # The hub's own tag of google/shieldgemma-2-4b-it, which answers Yes or No to an image and a policy.
    "ForImageClassification": Use("AutoModelForImageClassification", "image-text-to-text"),
    "ForSequenceClassification": Use("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": Use("AutoModelForTokenClassification", "token-classification"),
    "Model": Use("AutoModel", "feature-extraction"),
}
"""By the end of a class's name."""

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
"""What a user loads beside the weights. transformers 5 does not save `tokenizer.model`, and GGUF needs it."""

TEMPLATE_FOLDER = "additional_chat_templates"
"""Where templates besides the chat's own lie, as `*.jinja`."""

UNBOUNDED = re.compile(r"\.(in|out)put_(min|max)$")
"""Bounds that Gemma 4's towers clip to, where infinity means none: no sign of a training that diverged. Source:
https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma4/modeling_gemma4.py
(Gemma4ClippableLinear)"""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""Either of these is a tokenizer."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_GROUP = frozenset({"tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"})
"""What makes one tokenizer."""
TEMPLATE_FILE = "chat_template.jinja"
LEGACY_TEMPLATE_FILE = "chat_template.json"
"""The processor's own, up to transformers 4.50; where it is, a processor reads no other."""
TEMPLATE_FILES = frozenset({TEMPLATE_FILE, LEGACY_TEMPLATE_FILE})
PROCESSOR_FILES = frozenset({"processor_config.json", "preprocessor_config.json"})
"""Either of these is a processor."""


EMBEDDINGS = ("embed_tokens.weight", "language_model.embed_tokens.weight")
"""The canonical name of the embedding that every Gemma ties its output head to unless its config says otherwise."""
HEAD = "lm_head.weight"
"""The canonical name of the output head."""

EXPERTS_MODULE = "experts"
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""The stacks of experts of a mixture-of-experts layer, in the order in which the module defines them.
Source: `transformers.models.gemma4.modeling_gemma4.Gemma4TextExperts`."""


def head_name(embedding: str) -> str:
    """What a checkpoint calls its output head, given how it calls its embedding.

    The hub's layout of multimodal checkpoints nests a whole causal model, head and all, under `language_model`.
    """
    return f"language_model.{HEAD}" if embedding.startswith("language_model.model.") else HEAD


def is_side_file(name: str) -> bool:
    """Whether a file of this name, or path inside its model, is one that a user loads beside the weights."""
    folder, _, last = name.rpartition("/")
    return last.endswith(".jinja") if folder == TEMPLATE_FOLDER else name in SIDE_FILES


def family_of(config: dict[str, Any], *, role: str = "base") -> Family:
    """The family that the config.json of a `role` (the base, or a whole model) declares.

    Raises:
        SourceError: `{role}_not_gemma` for anything that is not in `FAMILIES`.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SourceError(
            f"the {role}'s config.json has model_type {str(model_type)[:80]!r}; "
            f"this exports Gemma models: {', '.join(FAMILIES)}.",
            code=f"{role}_not_gemma",
        )
    return FAMILIES[model_type]


TOWERS = {
    "vision": ("vision_tower.", "vision_model.", "multi_modal_projector.", "embed_vision.", "vision_embedder."),
    "audio": ("audio_tower.", "embed_audio."),
}
"""The canonical beginnings of what belongs to a tower; all else is language."""


def tower_of(name: str) -> str:
    """`language`, `vision` or `audio`, by a tensor's canonical name."""
    return next((tower for tower, beginnings in TOWERS.items() if name.startswith(beginnings)), "language")


def canonical_name(name: str, family: Family) -> str:
    """One name for a tensor or module, whichever layout or library version wrote it."""
    for pattern, replacement in family.renames:
        name = re.sub(pattern, replacement, name)
    return name
