"""`adapter_config.json`, a serialised `peft.LoraConfig`: what it says of the tensors, and what it must not say.

A setting that is not known to leave the meaning of the tensors alone is refused by name, so that what a later PEFT
adds is not merged as if it were not there. Source: `peft.LoraConfig` of PEFT 0.21.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import re2

from dispatcher.errors import AdapterMismatch, ExportError, SourceError, Unsupported
from exporter.documents import read_json_object
from exporter.gemma import EXPERTS_MODULE
from exporter.lora import scaling

CONFIG_NAME = "adapter_config.json"
_SILENT = re2.Options()
_SILENT.log_errors = False  # it would write to stderr past our log
_SILENT.max_mem = 1 << 20  # of each of a thousand patterns
MAX_CONFIG_BYTES = 1_000_000
MAX_RANK = 1_000_000
MAX_ALPHA = 1e30

_IRRELEVANT = frozenset({
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config"),
    *("runtime_config", "qalora_group_size", "use_dora", "modules_to_save", "trainable_token_indices"),
    *("lora_bias", "target_parameters", "ensure_weight_tying"),
})  # fmt: skip
"""Settings that merging reads, or that only training needs: the file's own tensors say which modules were trained. Any
other setting that differs from `_DEFAULTS` or is truthy is refused by name."""
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_NOT_ONE_WEIGHT = {
    "layer_replication": "the model has some of the base's layers several times, each with pairs of its own",
    "alora_invocation_tokens": "its pairs only count after certain tokens, which no weight can say",
    "arrow_config": "which of its pairs counts is decided for each token, which no weight can say",
    "adapters": "which of several adapters counts is decided for each token, which no weight can say",
    "use_qalora": "its pairs are of groups of inputs, of weights that are stored quantized",
}
"""Settings whose result is not one weight for each of the base's; PEFT merges some of them wrong."""
_NOT_MERGEABLE = frozenset({
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"),
    *("CPT", "CARTRIDGE", "ADAPTION_PROMPT"),
})  # fmt: skip
"""PEFT types that train what goes into a model, or beside it, and none of its weights."""


def read_config(directory: Path) -> dict[str, Any]:
    """The config of an adapter directory, of whatever PEFT type.

    Raises:
        SourceError: `adapter_config_missing` or `adapter_config_invalid`.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise SourceError(f"{directory} has no {CONFIG_NAME}: it is not a PEFT adapter.", code="adapter_config_missing")
    try:
        return read_json_object(path, limit=MAX_CONFIG_BYTES)
    except ValueError as error:
        raise _invalid(str(error)[:200]) from error


def _invalid(what: str) -> SourceError:
    return SourceError(f"{CONFIG_NAME} cannot be read: {what}.", code="adapter_config_invalid")


def refuse_unmergeable(config: dict[str, Any]) -> None:
    """Refuse what no engine can merge into the base as it is.

    Raises:
        AdapterMismatch: `adapter_nothing_to_merge` for prompt tuning and its like, `adapter_base_mutated` for a pair
            that takes what it starts with out of the base's own weights, and so belongs to others (PEFT itself cannot
            make them again where that takes chance or data), and those of `_NOT_ONE_WEIGHT`.
    """
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in _NOT_MERGEABLE:
        raise AdapterMismatch(
            f"the adapter is of PEFT type {kind}: it trains no weight of the model, so there is nothing to merge. "
            "Export it as it is (export_type adapter).",
            code="adapter_nothing_to_merge",
        )
    for name, reason in _NOT_ONE_WEIGHT.items():
        if config.get(name):
            raise AdapterMismatch(
                f"the adapter was trained with {name}: {reason}.", code=f"adapter_{name.removeprefix('use_')}"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _DEFAULTS["init_lora_weights"]:
        raise AdapterMismatch(
            f"the adapter was trained with init_lora_weights = {init[:40]!r}, so it belongs to a base whose weights "
            "were changed before the training. Save it converted to the original base: "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…).",
            code="adapter_base_mutated",
        )


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Refuse what the streaming engine does not merge.

    Raises:
        AdapterMismatch: As `refuse_unmergeable`.
        Unsupported: `unsupported_` and what it is.
    """
    refuse_unmergeable(config)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Unsupported(
            f"the adapter is of PEFT type {str(kind)[:40]!r}; the streaming engine merges LORA.",
            code=f"unsupported_peft_type_{_slug(kind)}",
        )
    for name, value in config.items():
        if name in _IRRELEVANT or (name not in _DEFAULTS and not value):
            continue
        if not any(value is good or (isinstance(value, str) and value == good) for good in _DEFAULTS.get(name, ())):
            raise Unsupported(
                f"the adapter was trained with {name[:80]} = {str(value)[:80]!r}, "
                "which the streaming engine does not merge.",
                code=f"unsupported_{_slug(name)}",
            )


def _slug(text: object) -> str:
    return re.sub("[^a-z0-9]+", "_", str(text)[:40].lower())


def rank_and_scale(config: dict[str, Any], module: str) -> tuple[int, float]:
    """The rank r and the factor s of a module.

    Raises:
        AdapterMismatch: The rank is no positive number (`adapter_rank_mismatch`).
        SourceError: A pattern or `lora_alpha` is not what PEFT writes (`adapter_config_invalid`).
    """
    rank = _setting(config, "rank_pattern", "r", module)
    if type(rank) is not int or not 0 < rank < MAX_RANK:
        raise rank_mismatch(module, f"the config gives rank {str(rank)[:40]}")
    alpha = _setting(config, "alpha_pattern", "lora_alpha", module)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
        raise _invalid(f"lora_alpha of {module[:200]!r} is {str(alpha)[:40]!r}, a number was expected")
    return rank, scaling(alpha, rank, use_rslora=bool(config.get("use_rslora")))


def rank_mismatch(module: str, what: str) -> ExportError:
    return AdapterMismatch(f"module {module[:200]!r}: {what}.", code="adapter_rank_mismatch")


def _setting(config: dict[str, Any], pattern_name: str, default_name: str, module: str) -> Any:
    """PEFT's own rule: the first pattern that matches the end of the module's name, else the default.

    Matched by RE2, in time that grows with the text alone: whoever wrote the config could make Python's own `re` work
    on one name for ever. Source: `peft.utils.other.get_pattern_key`.
    """
    patterns = config.get(pattern_name) or {}
    if not isinstance(patterns, dict):
        raise _invalid(f"{pattern_name} is a {type(patterns).__name__}, an object was expected")
    for pattern, value in patterns.items():
        try:
            if _compiled(pattern).match(module):
                return value
        except re2.error as error:
            raise _invalid(f"{pattern_name} has an invalid pattern {pattern[:80]!r}") from error
    return config.get(default_name)


@lru_cache(maxsize=2048)
def _compiled(pattern: str) -> Any:
    return re2.compile(rf"(.*\.)?({pattern})$", _SILENT)


def names_in(config: dict[str, Any], setting: str) -> list[str]:
    """A setting that is a list of names, or nothing.

    Raises:
        SourceError: It is something else (`adapter_config_invalid`).
    """
    names = config.get(setting) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise _invalid(f"{setting} is {str(names)[:80]}, a list of names was expected")
    return names


def refuse_untargeted(module: str, config: dict[str, Any]) -> None:
    """Refuse a pair that the config's lists leave out, and that PEFT would therefore not apply.

    Raises:
        AdapterMismatch: `adapter_untargeted`.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    layers = config.get("layers_to_transform")
    by_parameter = any(f".{module}.".endswith(f".{module_of(t)}.") for t in names_in(config, "target_parameters"))
    tied = config.get("ensure_weight_tying") and module.rpartition(".")[2] == "lm_head"
    if by_parameter or tied:
        return
    number = re.match(r".*\.[^.]*\.(\d+)\.", module)  # PEFT's own pattern for where the layer's number is
    wanted = [layers] if isinstance(layers, int) else layers
    # By the last part of each name: what is before it, tools rename in one of the two files alone.
    last = module.rpartition(".")[2]
    left_out = isinstance(targets, list) and bool(targets) and last not in {str(t).rpartition(".")[2] for t in targets}
    left_out |= isinstance(excluded, list) and last in excluded
    left_out |= isinstance(wanted, list) and number is not None and int(number[1]) not in wanted
    if left_out:
        raise AdapterMismatch(
            f"the file holds a pair for {module[:200]!r}, which is none of the config's target_modules, or is excluded "
            "there: config and weights are of different adapters.",
            code="adapter_untargeted",
        )


def module_of(target: str) -> str:
    """The end of the module's name that a target parameter gives; the experts' own where it gives none."""
    return target.rpartition(".")[0] or EXPERTS_MODULE
