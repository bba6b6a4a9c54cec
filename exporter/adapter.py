"""A PEFT adapter on disk becomes a list of operations on named modules; whatever is not understood is refused.

Formats: `adapter_config.json` is a serialised `peft.LoraConfig`, `adapter_model.safetensors` holds
`base_model.model.{module}.lora_A.weight` [rank, in], `….lora_B.weight` [out, rank] and, with DoRA,
`….lora_magnitude_vector` [out].
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dispatcher.errors import AdapterMismatch, SourceError, Unsupported
from exporter.checkpoint import Tensor, TensorFile, read_tensor_file
from exporter.documents import read_json_object
from exporter.lora import scaling
from exporter.saved import FLOATING, Saved, refuse_missing, saved_tensor
from exporter.tensors import TORCH_DTYPE, read_tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1_000_000
KEY_PREFIX = "base_model.model."

_IRRELEVANT = frozenset({
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("runtime_config", "qalora_group_size", "use_dora", "modules_to_save", "trainable_token_indices"),
})  # fmt: skip
"""Settings of a LoraConfig that plain merging reads, or that only training needs: the file's own tensors say which
modules were trained. Any other setting that differs from `_DEFAULTS` or is truthy is refused by name."""
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Inits that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train against changed ones."""


@dataclass(frozen=True)
class LoraPair:
    """One trained module: `s * (B @ A)` is added to its weight, and with DoRA each row then gets its magnitude."""

    module: str
    """The module's name as the adapter's file has it, without PEFT's prefix."""
    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    rank: int
    scale: float
    magnitude: Tensor | None
    """[out]: DoRA's, which gives each row of the merged weight its length"""

    @property
    def target(self) -> str:
        """The tensor that it changes."""
        return f"{self.module}.weight"


Change = LoraPair | Saved
"""What becomes of one tensor of the base."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, every tensor of it accounted for by exactly one change."""

    directory: Path
    config: dict[str, Any]
    file: TensorFile
    changes: tuple[Change, ...]


def read_adapter(directory: Path) -> Adapter:
    """Read config and headers of an adapter directory; no weights yet.

    Raises:
        SourceError: The directory or a file in it is missing or damaged (`adapter_missing`,
            `adapter_config_missing`, `adapter_config_invalid`, `adapter_pickle_only`, `adapter_weights_missing`, and
            those of `read_tensor_file`).
        Unsupported: A PEFT feature that is not plain LoRA; the code names it.
        AdapterMismatch: The tensors contradict the config or each other.
    """
    if not directory.is_dir():
        raise SourceError(f"the adapter directory {directory} does not exist.", code="adapter_missing")
    config = _read_config(directory)
    _refuse_unsupported(config)
    refuse_without_weights([path.name for path in directory.iterdir() if path.is_file()], str(directory))
    file = read_tensor_file(directory / WEIGHTS_NAME)
    return Adapter(directory, config, file, _changes(file, config))


def refuse_without_weights(names: Collection[str], where: str) -> None:
    """Refuse an adapter whose files, of these names, hold no weights that we load.

    Raises:
        SourceError: `adapter_pickle_only` or `adapter_weights_missing`.
    """
    if WEIGHTS_NAME in names:
        return
    if any(name.endswith((".bin", ".pt")) for name in names):
        raise SourceError(
            f"{where} holds only pickled weights, which are never loaded: "
            f"save the adapter as {WEIGHTS_NAME} (save_pretrained does).",
            code="adapter_pickle_only",
        )
    raise SourceError(f"{where} has no {WEIGHTS_NAME}.", code="adapter_weights_missing")


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise SourceError(f"{directory} has no {CONFIG_NAME}: it is not a PEFT adapter.", code="adapter_config_missing")
    try:
        return read_json_object(path, limit=MAX_CONFIG_BYTES)
    except ValueError as error:
        raise _invalid_config(str(error)[:200]) from error


def _invalid_config(what: str) -> SourceError:
    return SourceError(f"{CONFIG_NAME} cannot be read: {what}.", code="adapter_config_invalid")


def _refuse_unsupported(config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Unsupported(
            f"the adapter is of PEFT type {str(kind)[:40]!r}; the streaming engine merges LORA.",
            code=f"unsupported_peft_type_{re.sub('[^a-z0-9]+', '_', str(kind)[:40].lower())}",
        )
    for name, value in config.items():
        if name in _IRRELEVANT or (name not in _DEFAULTS and not value):
            continue
        if not any(value is good or (isinstance(value, str) and value == good) for good in _DEFAULTS.get(name, ())):
            raise Unsupported(
                f"the adapter was trained with {name[:80]} = {str(value)[:80]!r}, "
                "which the streaming engine does not merge.",
                code=f"unsupported_{re.sub('[^a-z0-9]+', '_', name[:40].lower())}",
            )


def _changes(file: TensorFile, config: dict[str, Any]) -> tuple[Change, ...]:
    parts: dict[str, dict[str, Tensor]] = {}
    saved: list[Change] = []
    for tensor in file.tensors:
        match = re.fullmatch(
            r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|(magnitude)_vector(?:\.weight)?)", tensor.name
        )
        name = tensor.name.removeprefix(KEY_PREFIX)
        if match is not None:
            parts.setdefault(match[1], {})[match[2] or match[3]] = tensor
        elif name != tensor.name and (whole := saved_tensor(name, tensor, config)) is not None:
            saved.append(whole)
        else:
            raise _unknown_tensor(tensor.name)
    if not parts and not saved:
        raise AdapterMismatch(f"{file.name} holds no tensors: nothing was trained.", code="adapter_empty")
    refuse_missing(config, [tensor.name.removeprefix(KEY_PREFIX) for tensor in file.tensors])
    return (*(_pair(module, found, config) for module, found in sorted(parts.items())), *saved)


def _unknown_tensor(name: str) -> Unsupported | AdapterMismatch:
    for mark, code in (
        ("lora_embedding_", "unsupported_embedding_lora"),
        (".lora_B.bias", "unsupported_lora_bias"),
    ):
        if mark in name:
            return Unsupported(f"adapter tensor {name[:200]!r} is of a kind that is not merged.", code=code)
    return AdapterMismatch(
        f"adapter tensor {name[:200]!r} is nothing that the config speaks of: nothing would apply it.",
        code="adapter_unknown_tensor",
    )


def _pair(module: str, parts: dict[str, Tensor], config: dict[str, Any]) -> LoraPair:
    wanted = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    if missing := sorted(wanted - parts.keys()):
        raise AdapterMismatch(
            f"module {module[:200]!r} lacks lora_{missing[0]}: the file is incomplete.",
            code="adapter_half_missing",
        )
    if parts.keys() - wanted:
        raise AdapterMismatch(
            f"module {module[:200]!r} has a magnitude, but the config says nothing of DoRA (use_dora).",
            code="adapter_unknown_tensor",
        )
    a, b, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    for tensor in parts.values():
        if tensor.dtype not in FLOATING:
            raise Unsupported(
                f"{tensor.name!r} has dtype {tensor.dtype}; F32, F16 or BF16 are expected.",
                code="unsupported_adapter_dtype",
            )
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            raise Unsupported(
                f"{tensor.name!r} has shape {list(tensor.shape)}: LoRA on convolutions is not merged.",
                code="unsupported_conv_lora",
            )
    if magnitude is not None and magnitude.shape != (b.shape[0],):
        raise AdapterMismatch(
            f"{magnitude.name!r} has shape {list(magnitude.shape)}, expected [{b.shape[0]}], one for each row of B.",
            code="adapter_shape_mismatch",
        )
    rank = _setting(config, "rank_pattern", "r", module)
    if not isinstance(rank, int) or rank <= 0 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterMismatch(
            f"module {module[:200]!r}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, "
            f"the config gives rank {str(rank)[:40]}.",
            code="adapter_rank_mismatch",
        )
    alpha = _setting(config, "alpha_pattern", "lora_alpha", module)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _invalid_config(f"lora_alpha of {module[:200]!r} is {str(alpha)[:40]!r}, a number was expected")
    return LoraPair(module, a, b, rank, scaling(alpha, rank, use_rslora=bool(config.get("use_rslora"))), magnitude)


def _setting(config: dict[str, Any], pattern_name: str, default_name: str, module: str) -> Any:
    """PEFT's own rule: the first pattern that matches the end of the module's name, else the default.

    Source: `peft.utils.other.get_pattern_key`.
    """
    patterns = config.get(pattern_name) or {}
    if not isinstance(patterns, dict):
        raise _invalid_config(f"{pattern_name} is a {type(patterns).__name__}, an object was expected")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise _invalid_config(f"{pattern_name} has an invalid pattern {pattern[:80]!r}") from error
    return config.get(default_name)


def refuse_not_finite(file: TensorFile) -> None:
    """Read every floating tensor of an adapter's file once, one at a time, and refuse NaN and infinity.

    Raises:
        AdapterMismatch: `adapter_not_finite`, naming the first such tensor.
    """
    for tensor in file.tensors:
        if tensor.dtype in TORCH_DTYPE and not torch.isfinite(read_tensor(file, tensor)).all():
            raise AdapterMismatch(
                f"adapter tensor {tensor.name!r} holds NaN or infinity: the training diverged; nothing was merged.",
                code="adapter_not_finite",
            )
