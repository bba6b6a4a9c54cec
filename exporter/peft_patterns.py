"""An adapter's config as PEFT can be given it: where a stranger's pattern was, the very names that it matches.

PEFT matches names of modules with Python's `re`, which may try for ever, and holds the interpreter meanwhile, heartbeat
and all. So each pattern that could is tried beforehand in a process of its own (`exporter.pattern_run`), and replaced
by what it matched. By Python's `re` all the same: a pattern that looks ahead, to leave out a tower, RE2 does not know.
Where PEFT makes a larger pattern of a setting, one that could is refused. Source: `peft.utils.other`
(match_target_against_key, get_pattern_key), `peft.tuners.tuners_utils.check_target_module_exists`.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dispatcher.errors import SourceError
from exporter.limited import CPU_SECONDS, LimitExceeded, ask
from exporter.peft_config import CONFIG_NAME

MATCHED = ("target_modules", "exclude_modules", "feedforward_modules")
"""Settings that are matched as a whole where they are a text"""
INTERPOLATED = ("layers_pattern", "modules_to_save", "trainable_token_indices", "target_parameters")
"""Settings that become part of a pattern"""
BY_END = frozenset({"LORA", "LOHA", "LOKR"})
"""PEFT types that match the keys of `…_pattern` with the end of a module's name"""
ALL_LINEAR = "all-linear"
"""No pattern: all linear layers"""
EMBEDDINGS = ("embed_tokens", "lm_head")
"""What PEFT matches besides the model's own names, to see whether embeddings were trained"""
NOTHING = "(?!)"
"""A pattern that matches no name"""
_BRANCHING = re.compile(r"[*+?{|]")
"""Without any of these there is one way to match, and it takes no time."""


def harmless_config(adapter: Path, model: Any) -> Any:
    """The `PeftConfig` of an adapter's directory, for this model: the same, without a pattern that takes long.

    Args:
        adapter: The adapter's directory.
        model: What it will be put on: a module of torch.

    Raises:
        SourceError: `adapter_pattern_too_slow`, `adapter_config_invalid` where a pattern is none, and
            `adapter_pattern_refused`.
        Exception: Whatever PEFT raises at such a config.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(adapter))
    names = [*(name for name, _ in model.named_modules() if name), *EMBEDDINGS]
    whole = {name: str(value) for name in MATCHED if _is_risky(value := getattr(config, name, None))}
    by_end = {
        setting: value
        for setting, value in vars(config).items()
        if setting.endswith("_pattern") and isinstance(value, dict) and any(map(_is_risky, value))
    }
    risky = [setting for setting in INTERPOLATED if any(map(_is_risky, _texts(getattr(config, setting, None))))]
    if str(getattr(config.peft_type, "value", config.peft_type)) not in BY_END:
        risky += by_end
    if risky:
        raise SourceError(
            f"{CONFIG_NAME} has a pattern in {risky[0][:80]!r}, where names are expected: write them out.",
            code="adapter_pattern_refused",
        )
    if whole or by_end:
        _replace(config, names, whole, by_end)
    return config


def _replace(config: Any, names: Sequence[str], whole: dict[str, str], by_end: dict[str, dict[str, Any]]) -> None:
    """Put the matched names in the place of patterns."""
    keys = [key for patterns in by_end.values() for key in patterns]
    found = iter(_matched([*whole.values(), *(rf"(.*\.)?({key})" for key in keys)], names))
    for setting in whole:
        setattr(config, setting, "|".join(map(re.escape, next(found))) or NOTHING)
    for setting, patterns in by_end.items():
        values: dict[str, Any] = {}
        for value in patterns.values():
            for name in next(found):
                values.setdefault(f"^{re.escape(name)}", value)  # the first pattern that matches counts
        setattr(config, setting, values)


def _matched(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    try:
        matched = ask("exporter.pattern_run", {"patterns": list(patterns), "names": list(names)})["matched"]
    except LimitExceeded as error:
        raise SourceError(
            f"the patterns of {CONFIG_NAME} take more than {CPU_SECONDS} s or too much memory to match with "
            f"{len(names)} names of modules: write the names out.",
            code="adapter_pattern_too_slow",
        ) from error
    found: list[list[str]] = []
    for pattern, names_matched in zip(patterns, matched, strict=True):
        if names_matched is None:
            raise SourceError(f"{CONFIG_NAME} has an invalid pattern {pattern[:80]!r}.", code="adapter_config_invalid")
        found.append(names_matched)
    return found


def _texts(value: object) -> Iterable[object]:
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list | tuple | set | frozenset | dict) else []


def _is_risky(value: object) -> bool:
    return isinstance(value, str) and value != ALL_LINEAR and _BRANCHING.search(value) is not None
