"""Every Gemma family that transformers has, as a real model small enough to build in a test.

The sizes differ from each other wherever a family allows it: a transposed or misplaced tensor cannot fit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tests.gemmas.names import Layout
from tests.gemmas.tokenizer import IMAGE_TOKEN_ID, VOCABULARY

SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
TEXT = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
SHARED_KV_TEXT = {
    **TEXT,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
}
GEMMA3N_TEXT = {
    **SHARED_KV_TEXT,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
GEMMA4_TEXT = {**SHARED_KV_TEXT, "global_head_dim": 12}
SIGLIP = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "vision_use_head": False,
}
GEMMA4_VISION = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
}
GEMMA4_AUDIO = {
    "hidden_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 4],
    "output_proj_dims": 16,
}
UNIFIED_VISION = {
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "mm_embed_dim": 12,
    "mm_posemb_size": 4,
    "output_proj_dims": 12,
}

Build = Callable[[], transformers.PreTrainedModel]


@dataclass(frozen=True)
class Family:
    """One family: how to build it with fresh weights, and in which distinct layouts its checkpoints occur."""

    name: str
    build: Build
    layouts: tuple[Layout, ...]
    multimodal: bool = False


def _gemma() -> Any:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**TEXT))


def _gemma2() -> Any:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TEXT, query_pre_attn_scalar=8))


def _gemma3_text() -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT))


def _gemma3_config(kind: Any) -> Any:
    return kind(
        text_config=TEXT,
        vision_config=SIGLIP,
        mm_tokens_per_image=1,
        image_token_index=IMAGE_TOKEN_ID,
        **SPECIAL,
    )


def _gemma3() -> Any:
    return transformers.Gemma3ForConditionalGeneration(_gemma3_config(transformers.Gemma3Config))


def _shieldgemma2() -> Any:
    config = _gemma3_config(transformers.ShieldGemma2Config)
    config.yes_token_index, config.no_token_index = 10, 11
    return transformers.ShieldGemma2ForImageClassification(config)


def _paligemma() -> Any:
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            text_config={**TEXT, "model_type": "gemma"},
            vision_config={**SIGLIP, "projection_dim": 16},
            projection_dim=16,
            image_token_index=IMAGE_TOKEN_ID,
            **SPECIAL,
        )
    )


def _gemma3n_text() -> Any:
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**GEMMA3N_TEXT))


def _gemma4_text(**changes: Any) -> Any:
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**{**GEMMA4_TEXT, **changes}))


def _gemma4_k_eq_v() -> Any:
    return _gemma4_text(attention_k_eq_v=True, num_global_key_value_heads=1, num_kv_shared_layers=0)


def _gemma4_moe() -> Any:
    return _gemma4_text(
        num_kv_shared_layers=0, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=12
    )


def _gemma4() -> Any:
    return transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(text_config=GEMMA4_TEXT, vision_config=GEMMA4_VISION, audio_config=GEMMA4_AUDIO)
    )


def _gemma4_unified() -> Any:
    return transformers.Gemma4UnifiedForConditionalGeneration(
        transformers.Gemma4UnifiedConfig(
            text_config={**GEMMA4_TEXT, "hidden_size_per_layer_input": 0},
            vision_config=UNIFIED_VISION,
            audio_config={"audio_embed_dim": 8},
        )
    )


ONE_LAYOUT: tuple[Layout, ...] = ("hub",)
LLAVA_LAYOUTS: tuple[Layout, ...] = ("hub", "modules", "saved", "nested")
FAMILIES = {
    family.name: family
    for family in (
        Family("gemma", _gemma, ONE_LAYOUT),
        Family("gemma2", _gemma2, ONE_LAYOUT),
        Family("gemma3_text", _gemma3_text, ONE_LAYOUT),
        Family("gemma3", _gemma3, LLAVA_LAYOUTS, multimodal=True),
        Family("shieldgemma2", _shieldgemma2, LLAVA_LAYOUTS, multimodal=True),
        Family("paligemma", _paligemma, LLAVA_LAYOUTS, multimodal=True),
        Family("gemma3n_text", _gemma3n_text, ("modules",)),
        # Its checkpoint has all three towers; what a test builds and loads is the text one (see `gemma3n`).
        Family("gemma3n", _gemma3n_text, ("hub",), multimodal=True),
        Family("gemma4_text", _gemma4_text, ONE_LAYOUT),
        Family("gemma4_k_eq_v", _gemma4_k_eq_v, ONE_LAYOUT),
        Family("gemma4_moe", _gemma4_moe, ONE_LAYOUT),
        Family("gemma4", _gemma4, ONE_LAYOUT, multimodal=True),
        Family("gemma4_unified", _gemma4_unified, ("hub", "modules"), multimodal=True),
    )
}
CASES = [(family.name, layout) for family in FAMILIES.values() for layout in family.layouts]
"""Every family in each of its distinct layouts, for `pytest.mark.parametrize`."""


def build_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> transformers.PreTrainedModel:
    """A model of `family` in eval mode, every finite weight and buffer random and distinct.

    transformers initialises norms, scalars and scales with constants: a swapped tensor would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family].build()
    changed: set[int] = set()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.data_ptr() not in changed:
            changed.add(tensor.data_ptr())
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()
