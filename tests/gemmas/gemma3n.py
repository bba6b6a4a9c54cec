"""What a multimodal Gemma 3n checkpoint has besides its text tower.

Its vision tower is a timm model, and timm is not needed to merge it: those tensors only have to keep their
names and bytes. The audio tower and the embedders come from transformers' own classes.
"""

from typing import Any

import torch
import transformers
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder, Gemma3nMultimodalEmbedder

VISION_SHAPES = {
    "conv_stem.conv.weight": (4, 3, 3, 3),
    "conv_stem.conv.bias": (4,),
    "conv_stem.bn.weight": (4,),
    "blocks.0.0.conv_exp.weight": (8, 4, 3, 3),
    "blocks.0.0.bn1.weight": (8,),
    "blocks.2.1.attn.query.proj.weight": (8, 4, 1, 1),
    "blocks.2.1.attn.key.down_conv.weight": (4, 1, 3, 3),
    "blocks.2.1.layer_scale.gamma": (4,),
    "msfa.ffn.pw_exp.conv.weight": (8, 4, 1, 1),
    "msfa.norm.weight": (4,),
}
AUDIO = {
    "hidden_size": 16,
    "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 2,
    "sscp_conv_channel_size": [4, 4],
    "input_feat_size": 16,
    "vocab_size": 8,
}


def config(text: Any, dtype: torch.dtype) -> Any:
    """The checkpoint's configuration around the text tower's."""
    whole = transformers.Gemma3nConfig(
        text_config=text.to_dict(), vision_config={"hidden_size": 8}, audio_config=AUDIO, dtype=dtype
    )
    whole.architectures = ["Gemma3nForConditionalGeneration"]
    return whole


def other_towers(text: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Vision, audio and embedder tensors under their hub names."""
    generator = torch.Generator().manual_seed(1)
    whole = config(text, dtype)
    shapes = {f"model.vision_tower.timm_model.{name}": torch.Size(shape) for name, shape in VISION_SHAPES.items()}
    with torch.device("meta"):
        modules = {
            "model.audio_tower.": Gemma3nAudioEncoder(whole.audio_config),
            "model.embed_audio.": Gemma3nMultimodalEmbedder(whole.audio_config, whole.text_config),
            "model.embed_vision.": Gemma3nMultimodalEmbedder(whole.vision_config, whole.text_config),
        }
    for prefix, module in modules.items():
        shapes |= {prefix + name: tensor.shape for name, tensor in module.state_dict().items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
