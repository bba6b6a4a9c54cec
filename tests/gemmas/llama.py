"""Tiny Gemma bases and adapters that llama.cpp can convert, quantize and load, with tokenizers as the hub has them.

Its converter and its loader ask for more than transformers does: the layers' pattern of attention is in the code (six
a period for Gemma 3), so is Gemma 3n's number of inputs, K-quants need rows of 256 and fall back for others, and the
special tokens are read from the `added_tokens_decoder` of `tokenizer_config.json`.
"""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from exporter import demo
from tests.gemmas.adapters import make_adapter
from tests.gemmas.bases import load_model, save_base
from tests.gemmas.families import GEMMA4_AUDIO, GEMMA4_VISION, SIGLIP, SPECIAL
from tests.gemmas.processors import save_processor
from tests.gemmas.tokenizer import IMAGE_TOKEN_ID, SENTENCES, SYMBOLS

VOCABULARY = 448
RUNS = ("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁")
TAGS = ("<table>", "</table>", "<b>", "</b>")
UNUSED = ("[multimodal]", "<unused0>", "<unused1>")
CONTROL = {
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
}
GEMMA4_CONTROL = {"<start_of_turn>": "<|turn>", "<end_of_turn>": "<turn|>", "<unused0>": "<|channel>"}
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
TEXT = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
GEMMA3_TEXT = {**TEXT, "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 32, "query_pre_attn_scalar": 32}
GEMMA3N_TEXT = {
    **TEXT,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 22,
    "head_dim": 32,
    # llama.cpp has these in its code (src/models/gemma3n.cpp, src/llama-hparams.h): layers from 20 on share keys and
    # values, every fifth attends to all, and so many inputs, of such sizes.
    "num_kv_shared_layers": 2,
    "layer_types": [*(["sliding_attention"] * 4 + ["full_attention"]) * 4, *["sliding_attention"] * 2],
    "altup_num_inputs": 4,
    "laurel_rank": 64,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": VOCABULARY,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
}
GEMMA4_TEXT = {
    **TEXT,
    "num_hidden_layers": 6,
    "head_dim": 32,
    "global_head_dim": 64,
    # The last two layers with keys and values of their own are one that slides and one that does not: llama.cpp takes
    # those of the others from these by place.
    "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}


def _gemma() -> Any:
    # The one whose rows, but those of `down_proj`, are no multiples of 256, as the 1B and 270M models' are not.
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**{**TEXT, "hidden_size": 160, "intermediate_size": 512})
    )


def _gemma2() -> Any:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TEXT, query_pre_attn_scalar=64))


def _gemma3_text() -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA3_TEXT))


def _gemma3() -> Any:
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=GEMMA3_TEXT,
            vision_config={**SIGLIP, "hidden_size": 32, "intermediate_size": 64},
            mm_tokens_per_image=1,
            image_token_index=IMAGE_TOKEN_ID,
            **SPECIAL,
        )
    )


def _gemma3n() -> Any:
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**GEMMA3N_TEXT))


def _gemma4_text(**changes: Any) -> Any:
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**{**GEMMA4_TEXT, **changes}))


def _gemma4_moe() -> Any:
    return _gemma4_text(
        num_hidden_layers=3,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=64,
    )


def _gemma4() -> Any:
    return transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(
            text_config=GEMMA4_TEXT,
            vision_config={**GEMMA4_VISION, "hidden_size": 32, "intermediate_size": 64},
            audio_config={**GEMMA4_AUDIO, "hidden_size": 32},
            image_token_id=IMAGE_TOKEN_ID,
        )
    )


BUILD: dict[str, Callable[[], Any]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4_text": _gemma4_text,
    "gemma4": _gemma4,
    "gemma4_moe": _gemma4_moe,
}
LLAMA_FAMILIES = tuple(BUILD)
MULTIMODAL = ("gemma3", "gemma3n", "gemma4")
UNSCALED = ("gemma3n", "gemma4_text", "gemma4", "gemma4_moe")
"""Whose attention divides by nothing: training puts the usual square root of the head's size into the norm of the
queries. Without it the least rounding decides to which token a random model attends."""


def llama_base(family: str, directory: Path, *, seed: int = 0, shard_bytes: int | None = None) -> Path:
    """Write a base that llama.cpp converts: bfloat16 weights, config, tokenizer, chat template, processor.

    Args:
        family: One of `LLAMA_FAMILIES`.
        directory: Created if missing.
        seed: Of the weights.
        shard_bytes: As for `save_base`.

    Returns:
        `directory`.
    """
    save_base(family, directory, model=_model(family, seed), with_tokenizer=False, shard_bytes=shard_bytes)
    if family in MULTIMODAL:
        save_processor(family, directory)
    for name, content in _tokenizer_files(family.startswith("gemma4"), family in ("gemma", "gemma2")).items():
        (directory / name).write_bytes(content)
    if family.startswith("gemma4"):
        (directory / "tokenizer.model").unlink(missing_ok=True)
    return directory


def llama_adapter(family: str, base: Path, directory: Path) -> Path:
    """Write a PEFT adapter for a base of `llama_base`, both factors random.

    Returns:
        `directory`, created if missing.
    """
    make_adapter(family, load_model(base), directory, layout="hub" if family == "gemma3n" else "modules")
    return directory


def _model(family: str, seed: int) -> Any:
    """With every weight random and distinct, of a size at which logits neither vanish nor saturate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BUILD[family]()
    changed: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.data_ptr() not in changed:
            changed.add(tensor.data_ptr())
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
            if name.endswith("q_norm.weight") and family in UNSCALED:
                tensor.mul_(tensor.numel() ** -0.5)
    return model.to(torch.bfloat16).eval()


@cache
def _tokenizer_files(is_gemma4: bool, refuses_system: bool) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as scratch:
        directory = Path(scratch)
        symbols = (*SYMBOLS, *UNUSED, *RUNS, *TAGS)
        demo.save_tokenizer(directory, (*SENTENCES, *demo.CORPUS), VOCABULARY, symbols)
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        # As on the hub: the longest run first, so that a text is cut as SentencePiece cuts it.
        tokenizer["model"]["merges"].sort(key=lambda pair: -len("".join(pair)) if "".join(pair) in RUNS else 0)
        if is_gemma4:
            _as_gemma4(tokenizer)
        for token in tokenizer["added_tokens"]:
            token["special"] = is_gemma4 or token["content"] in CONTROL
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
        _describe_tokens(directory, tokenizer["added_tokens"])
        template = (NO_SYSTEM if refuses_system else "") + demo.CHAT_TEMPLATE
        if is_gemma4:
            for old, new in GEMMA4_CONTROL.items():
                template = template.replace(old, new)
        (directory / "chat_template.jinja").write_text(template)
        return {path.name: path.read_bytes() for path in directory.iterdir()}


def _as_gemma4(tokenizer: dict[str, Any]) -> None:
    """Gemma 4's own: other names of the turns, and runs and tags that are merged as any other piece."""
    vocabulary = tokenizer["model"]["vocab"]
    for old, new in GEMMA4_CONTROL.items():
        vocabulary[new] = vocabulary.pop(old)
    for token in tokenizer["added_tokens"]:
        token["content"] = GEMMA4_CONTROL.get(token["content"], token["content"])
    merged = {*RUNS, *TAGS, *UNUSED}
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] not in merged]


def _describe_tokens(directory: Path, tokens: list[dict[str, Any]]) -> None:
    """Write what the hub's `tokenizer_config.json` says of each added token, and transformers 5 no longer does."""
    path = directory / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    described = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in tokens}
    extra = [token["content"] for token in tokens if token["special"]]
    path.write_text(json.dumps({**fields, "added_tokens_decoder": described, "extra_special_tokens": extra}, indent=2))
