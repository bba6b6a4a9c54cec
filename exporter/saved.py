"""What an adapter stores whole: tensors that were trained themselves, rows of an embedding, and copies of the base's.

Formats, as PEFT saves them under `base_model.model.`: with `modules_to_save` and with `bias` the tensor's own name (a
targeted module's bias as `{module}.base_layer.bias`), with `trainable_token_indices`
`{module}.token_adapter.trainable_tokens_delta` [n, dim], which despite its name holds the new rows, in the order of the
indices. Of an embedding and its head that were trained as a pair, or resized, it also stores the weight that the pair
is added to, as `{module}.base_layer.weight` or `{module}.weight`. Source: `peft.utils.other.ModulesToSaveWrapper`,
`peft.tuners.trainable_tokens.layer.TrainableTokensLayer`, `peft.utils.save_and_load.get_peft_model_state_dict`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dispatcher.errors import AdapterMismatch
from exporter.checkpoint import Tensor
from exporter.pairs import refuse_unreadable
from exporter.peft_config import names_in

CLASSIFIERS = ("classifier", "score")
"""PEFT names both for every classifier; a model has one of them. Source: `peft.PeftModelForSequenceClassification`"""
TOKENS_SUFFIX = ".token_adapter.trainable_tokens_delta"
EMBEDDING_LAYERS = (["embed_tokens", "weight"], ["lm_head", "weight"])
"""What PEFT takes for embeddings: the ends of their weights' names. Source: `peft.utils.other.EMBEDDING_LAYER_NAMES`"""


@dataclass(frozen=True)
class Saved:
    """A tensor that takes the place of the base's, or of some of its rows."""

    target: str
    """The base's tensor, as the adapter's file names it, without PEFT's prefix"""
    tensor: Tensor
    """Of the base's shape, or [n, width]"""
    rows: tuple[int, ...] | None
    """Which rows these are; None is all of it."""
    copy: bool = False
    """Whether it is PEFT's copy of what the training began with, and so, mostly, the base's own."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it takes of the adapter's file."""
        return (self.tensor,)


def saved_tensor(name: str, tensor: Tensor, config: dict[str, Any]) -> Saved | None:
    """What a tensor of an adapter's file replaces; None when the config says nothing of it.

    Args:
        name: The tensor's name without PEFT's prefix.
        tensor: Its header.
        config: The adapter's config.

    Raises:
        AdapterMismatch: The config's token indices are none, or not as many as there are rows
            (`adapter_token_indices_invalid`).
        Unsupported: `unsupported_adapter_dtype`.
    """
    if name.endswith(TOKENS_SUFFIX):
        module = name.removesuffix(TOKENS_SUFFIX)
        found = Saved(f"{module}.weight", tensor, _indices(module, tensor, config))
    elif _is_saved_module(name, config) or (config.get("bias") in ("all", "lora_only") and name.endswith(".bias")):
        found = Saved(name.replace(".base_layer.", "."), tensor, None)
    elif (plain := _plain(name)).split(".")[-2:] in EMBEDDING_LAYERS:
        found = Saved(plain, tensor, None, copy=True)
    else:
        return None
    refuse_unreadable(tensor)
    return found


def _plain(name: str) -> str:
    """A tensor's own name, without the levels that PEFT puts around a layer."""
    for level in (".token_adapter.", ".base_layer.", ".original_module."):
        name = name.replace(level, ".")
    return name


def refuse_missing(config: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse a file without something that its config says was trained.

    Args:
        config: The adapter's config.
        names: Every tensor of the file, without PEFT's prefix.

    Raises:
        AdapterMismatch: `adapter_half_missing`.
        SourceError: `modules_to_save` is no list of names (`adapter_config_invalid`).
    """
    names = list(names)
    saved = names_in(config, "modules_to_save")
    if config.get("ensure_weight_tying"):  # then PEFT adds the name that the embedding has in some other class
        saved = [module.rpartition(".")[2] for module in saved]
    missing = [module for module in saved if not any(_is_within(name, module) for name in names)]
    if any(module in CLASSIFIERS for module in saved if module not in missing):
        missing = [module for module in missing if module not in CLASSIFIERS]
    if missing:
        raise AdapterMismatch(
            f"modules_to_save names {missing[0][:200]!r}, of which the file holds nothing: it is incomplete.",
            code="adapter_half_missing",
        )
    if config.get("trainable_token_indices") and not any(name.endswith(TOKENS_SUFFIX) for name in names):
        raise AdapterMismatch(
            "the config has trainable_token_indices, but the file no such rows: it is incomplete.",
            code="adapter_half_missing",
        )


def _is_saved_module(name: str, config: dict[str, Any]) -> bool:
    return any(_is_within(name, module) for module in names_in(config, "modules_to_save"))


def _is_within(name: str, module: str) -> bool:
    """Whether a tensor belongs to a module whose name ends with `module`, which is PEFT's own rule."""
    return any(path.endswith(module) for path in _paths(name))


def _paths(name: str) -> Iterator[str]:
    parts = name.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end])


def _indices(module: str, tensor: Tensor, config: dict[str, Any]) -> tuple[int, ...]:
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((rows for key, rows in given.items() if module.endswith(str(key))), None)
    good = isinstance(given, list) and all(type(row) is int and row >= 0 for row in given)
    if not isinstance(given, list) or not good or len(set(given)) != len(given) or tensor.shape[:1] != (len(given),):
        raise AdapterMismatch(
            f"{tensor.name[:200]!r} has shape {list(tensor.shape)}, trainable_token_indices of the config is "
            f"{str(given)[:80]}: expected as many different rows.",
            code="adapter_token_indices_invalid",
        )
    return tuple(given)
