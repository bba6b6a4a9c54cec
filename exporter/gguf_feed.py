"""What of a checkpoint goes to llama.cpp's converter, and under which names it expects it.

The converter is made for the hub's checkpoints. transformers re-saves some families under other names, without tensors
that no forward pass reads, or with a head beside the embedding that it is tied to.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dispatcher.errors import SourceError, Unsupported
from exporter.checkpoint import Tensor
from exporter.converter import Stored
from exporter.gemma import HEAD, Family, canonical_name, tower_of
from exporter.plan import is_tied
from exporter.tensors import TORCH_DTYPE

NEEDS_SENTENCEPIECE = frozenset({"gemma", "gemma2", "gemma3_text", "gemma3", "gemma3n_text", "gemma3n"})
"""By model_type: what llama.cpp reads the vocabulary of from `tokenizer.model`."""
TIED_ONLY = frozenset({"gemma", "gemma2"})
"""By model_type: what llama.cpp has no output head for. Source: `filter_tensors` of GemmaModel and Gemma2Model in
https://github.com/ggml-org/llama.cpp/blob/master/conversion/gemma.py"""
WANTS_SHARED = frozenset({"gemma3n_text", "gemma3n"})
"""By model_type: where llama.cpp does not load a file without the keys and values of layers that share another layer's,
though it never reads them. Source: https://github.com/ggml-org/llama.cpp/blob/master/src/models/gemma3n.cpp"""
MAX_LAYERS = 512
"""`LLAMA_MAX_LAYERS`: with more, llama.cpp aborts the process. Source:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-hparams.h"""
_LAYER = re.compile(r"(?P<layers>.*\blayers\.)(?P<number>\d+)\.(?P<rest>.+)")
_SHARED = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")
# transformers 5 saves SigLIP without its inner level, and every multimodal model under `model`.
_TOWER_NAMES = (
    (r"^model\.(?=vision_tower\.|multi_modal_projector\.)", ""),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)


def refuse_inconvertible(model_type: str, config: Mapping[str, Any], files: Iterable[str]) -> None:
    """Refuse what llama.cpp would convert wrong or not at all, before any weight is read.

    Args:
        model_type: Of config.json.
        config: The merged model's.
        files: The names of the files beside the weights.

    Raises:
        SourceError: `tokenizer_model_missing`.
        Unsupported: `gguf_untied_head`, `gguf_not_quantizable`.
    """
    if model_type in NEEDS_SENTENCEPIECE and "tokenizer.model" not in files:
        raise SourceError(
            f"llama.cpp reads the vocabulary of a {model_type} from tokenizer.model, which neither the adapter nor the "
            "base has. Put the base's tokenizer.model beside either.",
            code="tokenizer_model_missing",
        )
    layers = text_of(config).get("num_hidden_layers")
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise Unsupported(
            f"config.json says num_hidden_layers {str(layers)[:20]}; llama.cpp takes 1 to {MAX_LAYERS}.",
            code="gguf_not_quantizable",
        )
    if model_type in TIED_ONLY and not is_tied(config):
        raise Unsupported(
            f"the output head differs from the embedding, and llama.cpp has no head of its own for {model_type}: the "
            "file would not say what was trained. Export `merged` instead.",
            code="gguf_untied_head",
        )


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text tower's part of a config.json."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def language_tensors(
    outputs: Mapping[str, Tensor], family: Family, model_type: str, config: Mapping[str, Any]
) -> dict[str, Stored]:
    """The language model's tensors, by the names that the converter knows.

    Args:
        outputs: The merged tensors by name.
        family: Their key layout.
        model_type: Of config.json.
        config: The merged model's.

    Raises:
        Unsupported: `unsupported_base_dtype`.
    """
    text = text_of(config)
    layers, shared = (_count(text, name) for name in ("num_hidden_layers", "num_kv_shared_layers"))
    fed: dict[str, Stored] = {}
    for name, tensor in outputs.items():
        canonical = canonical_name(name, family)
        place = _LAYER.fullmatch(canonical)
        is_shared = place is not None and int(place["number"]) >= layers - shared and place["rest"] in _SHARED
        tied_head = canonical == HEAD and is_tied(config)
        if tower_of(canonical) == "language" and not tied_head and (model_type in WANTS_SHARED or not is_shared):
            if tensor.dtype not in TORCH_DTYPE:
                raise Unsupported(
                    f"{name!r} is stored as {tensor.dtype}; {', '.join(sorted(TORCH_DTYPE))} are converted.",
                    code="unsupported_base_dtype",
                )
            fed[name] = Stored(name, tensor.shape, tensor.dtype)
    if model_type in WANTS_SHARED:
        fed |= _missing(fed, layers - shared)
    return fed


def _count(text: Mapping[str, Any], name: str) -> int:
    """A number of layers in a config.json; 0 where it says nothing, or what is none."""
    found = text.get(name)
    return found if type(found) is int and 0 <= found <= MAX_LAYERS else 0


def _missing(fed: Mapping[str, Stored], first: int) -> dict[str, Stored]:
    """Zeros for the keys and values of layers from `first` on that a checkpoint was saved without."""
    missing = {}
    places = {name: _LAYER.fullmatch(name) for name in fed}
    numbers = sorted({int(place["number"]) for place in places.values() if place})
    for name, stored in fed.items():
        place = places[name]
        if place is not None and int(place["number"]) == 0 and place["rest"] in _SHARED:
            for number in (number for number in numbers if number < MAX_LAYERS):
                sibling = f"{place['layers']}{number}.{place['rest']}"
                if number >= first and sibling not in fed:
                    missing[sibling] = Stored(None, stored.shape, stored.dtype)
    return missing


def projector_tensors(outputs: Mapping[str, Tensor], family: Family, model_type: str) -> dict[str, Stored]:
    """The weights of vision and audio towers, by the names that the converter knows."""
    fed = {}
    for name, tensor in outputs.items():
        if tower_of(canonical_name(name, family)) != "language" and tensor.dtype in TORCH_DTYPE:
            known = name
            for pattern, replacement in _TOWER_NAMES if model_type == "gemma3" else ():
                known = re.sub(pattern, replacement, known)
            fed[known] = Stored(name, tensor.shape, tensor.dtype)
    return fed
