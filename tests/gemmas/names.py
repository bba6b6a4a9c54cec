"""The names one and the same tensor has had: on the hub, and in the modules of several transformers versions.

- `hub`: the published checkpoints; also the module names up to transformers 4.51, so of old adapters.
- `nested`: the module names from transformers 4.52 on, with SigLIP's `vision_model` still in between.
- `modules`: the module names of the installed transformers.
- `saved`: what the installed `save_pretrained` writes for a freshly built model.

Families that are not listed have the same names everywhere.
"""

from typing import Literal

Layout = Literal["hub", "nested", "modules", "saved"]
Renames = tuple[tuple[str, str], ...]

_LLAVA_HUB: Renames = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_LLAVA: dict[Layout, Renames] = {
    "hub": _LLAVA_HUB,
    "nested": (("model.vision_tower.", "model.vision_tower.vision_model."),),
    "saved": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
}
_SHIELDGEMMA2: dict[Layout, Renames] = {
    "hub": tuple((f"model.{old}", f"model.{new}") for old, new in _LLAVA_HUB),
    "nested": (("model.model.vision_tower.", "model.model.vision_tower.vision_model."),),
    "saved": (("model.model.language_model.", "model.model.language_model.model."),),
}
_UNIFIED: Renames = (
    ("model.embed_vision.multimodal_embedder.", "model.embed_vision."),
    ("model.embed_vision.", "model.vision_embedder."),
)
_BY_FAMILY: dict[str, dict[Layout, Renames]] = {
    "gemma3": _LLAVA,
    "paligemma": _LLAVA,
    "shieldgemma2": _SHIELDGEMMA2,
    "gemma3n": {"hub": (("model.", "model.language_model."),)},
    "gemma4_unified": {"hub": _UNIFIED, "saved": _UNIFIED},
}


def renamed(family: str, layout: Layout, name: str) -> str:
    """The name in `layout` of the tensor that today's modules of `family` call `name`."""
    for old, new in _BY_FAMILY.get(family, {}).get(layout, ()):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
