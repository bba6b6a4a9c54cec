"""Of which class a base is: its config.json, corrected where the names of the tensors show that it is wrong.

What `architectures` says decides what loads a model: vLLM, text-generation-inference and PEFT's engine take the class
from there. Bases are found in the wild whose config says otherwise than their weights do:

- merged by a trainer as the text-only class, with the multimodal model's weights, so that vLLM finds no
  `language_model` in it (https://github.com/unslothai/unsloth/issues/2086);
- saved with the class of the model without its head (https://github.com/unslothai/unsloth-zoo/pull/149);
- the text tower taken out of a multimodal model, its config left as it was
  (https://github.com/google/gemma.cpp/pull/918 tells of such checkpoints).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dispatcher.errors import SourceError
from exporter.gemma import FAMILIES, SCORE_ROOT, TEXT_ROOT, TEXT_ROOTS, USES, Family, Use, family_of, tower_of
from exporter.sources import Base

_FROM_THE_WHOLE = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
"""What a multimodal config has beside its text_config, and a text-only one needs as well."""
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")


@dataclass(frozen=True)
class _Found:
    """What the names of a checkpoint's tensors say."""

    nested: bool
    """A text tower within a multimodal model"""
    flat: bool
    """Text layers at the top, as a text-only model has them"""
    tower: str | None
    """A tensor of another tower, if there is one"""
    bare: bool
    """The layers are those of a model without a head"""
    scores: bool


def fitting_config(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The config.json that fits the tensors of a base: the same one, or with `architectures` as the names have it.

    A multimodal config whose checkpoint is the text-only class's becomes its own `text_config`.

    Args:
        config: The base's config.json, of a known family.
        names: Every tensor of the base.

    Raises:
        SourceError: `base_architecture_mismatch`: config and tensors are those of different models, and nothing here
            says how the right config goes on.
    """
    family, found = family_of(dict(config)), _found(names)
    if found.flat and not found.nested and found.tower is None and family.text_type is not None:
        config, family = _text_config(config, family)
    _refuse_other_model(config, family, found)
    declared = config.get("architectures")
    if isinstance(declared, list) and len(declared) == 1 and _is_right(str(declared[0]), family, found):
        return dict(config)
    if found.scores:
        raise _mismatch(config, f"the weights have a classifier's {SCORE_ROOT!r}; name its class in architectures")
    bare = found.bare and family.text_type is None and not declared
    return {**config, "architectures": [_backbone(family) if bare else family.architecture]}


def fitted(base: Base) -> Base:
    """A base whose config is the one that fits its tensors.

    Raises:
        SourceError: As `fitting_config`, or as `open_checkpoint`.
    """
    return replace(base, config=fitting_config(base.config, base.checkpoint().tensors()))


def use_of(architecture: str) -> Use:
    """How a class that `fitting_config` left in `architectures` is loaded."""
    return next((use for end, use in USES.items() if architecture.endswith(end)), USES["Model"])


def _found(names: Iterable[str]) -> _Found:
    nested, flat, bare, tower, scores = False, False, False, None, False
    for name in names:
        inner = name
        while inner.startswith("model."):
            inner = inner.removeprefix("model.")
        root = inner.split(".")[0]
        nested |= root == TEXT_ROOT
        flat |= root in TEXT_ROOTS
        bare |= root in TEXT_ROOTS and inner == name
        scores |= root == SCORE_ROOT
        tower = name if tower is None and tower_of(inner) != "language" else tower
    return _Found(nested, flat, tower, bare, scores)


def _refuse_other_model(config: Mapping[str, Any], family: Family, found: _Found) -> None:
    if family.text_type is None:
        if found.tower is not None:
            raise _mismatch(config, f"the weights are of a multimodal model, with {found.tower[:200]!r}")
        if found.nested and not family.reads_nested:
            raise _mismatch(config, f"the weights are named as within a multimodal model, under {TEXT_ROOT!r}")
        return
    if found.flat:
        raise _mismatch(config, "the weights have their text layers where only a text-only model has them")
    wants_tower = not family.towers_optional or isinstance(config.get("vision_config"), dict)
    if found.nested and found.tower is None and wants_tower:
        raise _mismatch(config, "the weights are its text tower alone")


def _mismatch(config: Mapping[str, Any], what: str) -> SourceError:
    declared = FAMILIES[config["model_type"]].architecture
    return SourceError(
        f"the base's config.json has model_type {config['model_type']!r}, which is {declared}; but {what}. "
        "Register the model that it was taken from, or save it with its own config.json.",
        code="base_architecture_mismatch",
    )


def _text_config(config: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], Family]:
    """The config of the text tower alone, and its family."""
    text = config.get("text_config")
    kind = str(text.get("model_type", family.text_type)) if isinstance(text, dict) else ""
    if not isinstance(text, dict) or kind not in FAMILIES or FAMILIES[kind].text_type is not None:
        raise _mismatch(config, "the weights are a text-only model's, and no text_config describes that")
    own = {**{key: config[key] for key in _FROM_THE_WHOLE if key in config}, **text, "model_type": kind}
    if "tie_word_embeddings" in config:
        own["tie_word_embeddings"] = config["tie_word_embeddings"]
    return {**own, "architectures": [FAMILIES[kind].architecture]}, FAMILIES[kind]


def _is_right(declared: str, family: Family, found: _Found) -> bool:
    if found.scores:
        return declared.endswith(_CLASSIFIERS)
    return declared == family.architecture or (
        found.bare and family.text_type is None and declared == _backbone(family)
    )


def _backbone(family: Family) -> str:
    """The class of a text family without its head, as EmbeddingGemma is saved."""
    stem = family.architecture.removesuffix("ForCausalLM")
    return f"{stem}Model" if stem in ("Gemma", "Gemma2") else f"{stem}TextModel"
