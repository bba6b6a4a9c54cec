"""A PEFT adapter on disk becomes a list of changes to named tensors; whatever is not understood is refused.

`adapter_config.json` is read by `exporter.peft_config`; of what `adapter_model.safetensors` holds, `exporter.pairs`
knows the trained pairs, and `exporter.saved` what is stored whole.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.errors import AdapterMismatch, SourceError
from exporter.checkpoint import TensorFile, read_tensor_file
from exporter.gemma import UNBOUNDED
from exporter.pairs import AddedBias, LoraPair, Parts, collect, pairs_of
from exporter.peft_config import read_config, refuse_unsupported
from exporter.saved import Saved, refuse_missing, saved_tensor
from exporter.tensors import TORCH_DTYPE, is_sound, parts_of

WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

MAX_COMPARISONS = 100_000_000
"""Ten times what an adapter takes that names each of a thousand modules, with a rank and a scale of its own"""
_COMPARED = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "target_parameters"), 1),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices"), 10),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), 25),
}
"""What of a config is compared with each tensor's name, and how long one comparison takes"""

Change = LoraPair | Saved | AddedBias
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
        Unsupported: A PEFT feature that is not merged; the code names it.
        AdapterMismatch: The tensors contradict the config or each other, or nothing can be merged.
    """
    if not directory.is_dir():
        raise SourceError(f"the adapter directory {directory} does not exist.", code="adapter_missing")
    config = read_config(directory)
    refuse_unsupported(config)
    refuse_without_weights([path.name for path in directory.iterdir() if path.is_file()], str(directory))
    file = read_tensor_file(directory / WEIGHTS_NAME)
    _refuse_endless(file, config)
    return Adapter(directory, config, file, _changes(file, config))


def _refuse_endless(file: TensorFile, config: dict[str, Any]) -> None:
    """Refuse more names than can be compared with each other in a minute.

    Raises:
        SourceError: `adapter_too_complex`.
    """
    names = sum(weight * len(config[s]) for s, weight in _COMPARED.items() if isinstance(config.get(s), list | dict))
    if names * len(file.tensors) > MAX_COMPARISONS:
        raise SourceError(
            f"{file.name} has {len(file.tensors)} tensors, and its config thousands of names for them: more than can "
            "be compared. Write target_modules by the ends of names.",
            code="adapter_too_complex",
        )


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


def _changes(file: TensorFile, config: dict[str, Any]) -> tuple[Change, ...]:
    parts: Parts = {}
    saved: list[Change] = []
    for tensor in file.tensors:
        name = tensor.name.removeprefix(KEY_PREFIX)
        if name != tensor.name and collect(name, tensor, parts):
            continue
        whole = saved_tensor(name, tensor, config) if name != tensor.name else None
        if whole is None:
            raise AdapterMismatch(
                f"adapter tensor {tensor.name[:200]!r} is nothing that the config speaks of: nothing would apply it.",
                code="adapter_unknown_tensor",
            )
        saved.append(whole)
    if not parts and not saved:
        raise AdapterMismatch(f"{file.name} holds no tensors: nothing was trained.", code="adapter_empty")
    refuse_missing(config, [tensor.name.removeprefix(KEY_PREFIX) for tensor in file.tensors])
    return (*pairs_of(parts, config), *saved)


def refuse_not_finite(file: TensorFile) -> None:
    """Read every floating tensor of an adapter's file once, part by part, and refuse NaN and infinity.

    Raises:
        AdapterMismatch: `adapter_not_finite`, naming the first such tensor.
    """
    for tensor in file.tensors:
        unbounded = UNBOUNDED.search(tensor.name) is not None
        if tensor.dtype in TORCH_DTYPE and not all(
            is_sound(part, unbounded=unbounded) for part in parts_of(file, tensor)
        ):
            raise AdapterMismatch(
                f"adapter tensor {tensor.name!r} holds NaN or infinity: the training diverged; nothing was merged.",
                code="adapter_not_finite",
            )
