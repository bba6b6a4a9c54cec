"""Whether what an engine wrote is the base plus the whole adapter: what was trained is right, all else is the base's.

For engines that match names in ways of their own: a pair whose name finds no tensor is one they may leave out and not
say so. What a layer should be is PEFT's word, one layer at a time, on the base's own values in float32.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dispatcher.errors import VerificationFailed
from exporter.byte_source import read_bytes
from exporter.checkpoint import Checkpoint, Tensor, TensorFile
from exporter.gemma import HEAD, Family, canonical_name
from exporter.plan import is_tied
from exporter.tensors import read_tensor

MATMUL_ERROR = 2.0**-10
"""Of the product of two float32 matrices, relative to the whole delta; as much as a GPU that multiplies in TF32."""
BLOCK_BYTES = 8 << 20
WRAPPERS = (".base_layer", ".token_adapter")
"""Levels that PEFT puts between a module's name and its parameters' names."""

Places = Mapping[str, tuple[TensorFile, Tensor]]


@dataclass(frozen=True)
class _Trained:
    """A tensor that the adapter changes."""

    name: str
    before: torch.Tensor | None
    """The base's, float32; None where the adapter has all of it"""
    after: torch.Tensor
    """What it should be, before it is rounded"""


def verify_applied(
    written: Checkpoint, base: Checkpoint, wrapped: Any, family: Family, config: Mapping[str, Any]
) -> tuple[int, int]:
    """Compare each tensor that was written with what base and adapter say it should be.

    Args:
        written: The engine's output.
        base: What it was made from.
        wrapped: The `PeftModel` of base and adapter, unmerged; its layers are merged here, so it is used up.
        family: What maps the names of files and modules to each other.
        config: The base's.

    Returns:
        How many tensors the adapter changes, and how many are the base's.

    Raises:
        VerificationFailed: `adapter_half_applied`, `merge_wrong` or `copy_differs`.
    """
    originals = {canonical_name(name, family): place for name, place in base.tensors().items()}
    found = {canonical_name(name, family): place for name, place in written.tensors().items()}
    trained: set[str] = set()
    left_out: list[str] = []
    for tensor in _trained(wrapped, originals, family):
        if tensor.name == HEAD and tensor.name not in found and is_tied(config):
            continue  # it is the embedding, which comes under its own name
        trained.add(tensor.name)
        if tensor.name not in found:
            left_out.append(tensor.name)
            continue
        values = read_tensor(*found[tensor.name])
        if not _is_right(values, tensor):
            if tensor.before is None or not torch.equal(values.float(), tensor.before):
                raise VerificationFailed(f"{tensor.name} is not what PEFT makes of it.", code="merge_wrong")
            left_out.append(tensor.name)
    if left_out:
        raise VerificationFailed(
            f"{len(left_out)} of the {len(trained)} tensors that the adapter changes were left as they are in the "
            f"base, the first is {left_out[0]}. The streaming engine applies all of them, or says why not.",
            code="adapter_half_applied",
        )
    for name in originals.keys() | found.keys() - trained:
        if name not in trained and not _is_copy(found.get(name), originals.get(name)):
            raise VerificationFailed(f"{name} differs from the base's.", code="copy_differs")
    return len(trained), len(found.keys() - trained)


def _trained(wrapped: Any, originals: Places, family: Family) -> Iterator[_Trained]:
    """Each tensor that the adapter changes, one in memory at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    model, adapter = wrapped.get_base_model(), wrapped.active_adapter
    bias = getattr(wrapped.peft_config[adapter], "bias", "none")
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ModulesToSaveWrapper):
            for part, values in module.modules_to_save[adapter].named_parameters():
                yield _Trained(canonical_name(f"{name}.{part}", family), None, values.detach().float().cpu())
        elif isinstance(module, BaseTunerLayer):
            yield from _merged_by_peft(module, canonical_name(_plain(name), family), originals, bias)
        elif bias == "all" and _is_plain(name) and isinstance(getattr(module, "bias", None), torch.nn.Parameter):
            yield _Trained(canonical_name(f"{name}.bias", family), None, module.bias.detach().float().cpu())


def _merged_by_peft(module: Any, name: str, originals: Places, bias: str) -> Iterator[_Trained]:
    """What PEFT's own `merge` makes of a layer of the base's values in float32."""
    layer = module.get_base_layer()
    attribute = getattr(module, "parameter_name", "weight")
    device = getattr(layer, attribute).device
    before: dict[str, torch.Tensor] = {}
    kept = {part: getattr(layer, part, None) for part in (attribute, "bias")}
    for part in kept:
        place = originals.get(f"{name}.{part}")
        if isinstance(kept[part], torch.nn.Parameter) and place is not None:
            before[part] = read_tensor(*place).float()
            if part == "bias" and bias != "none":
                continue  # the adapter has it, and it is in the model already
            values = before[part].to(device, copy=True)
            setattr(layer, part, torch.nn.Parameter(values, requires_grad=False))
    module.merge()
    for part, values in before.items():
        after = getattr(layer, part).detach().float().cpu()
        if part == attribute or bias != "none" or not torch.equal(after, values):
            yield _Trained(f"{name}.{part}", values, after)
    for part, parameter in kept.items():
        if part in before:
            setattr(layer, part, parameter)
    if attribute not in before:
        yield _Trained(f"{name}.{attribute}", None, getattr(layer, attribute).detach().float().cpu())


def _is_plain(name: str) -> bool:
    """Whether a module is the model's own, and not one that PEFT added or wrapped."""
    return "lora_" not in name and _plain(name) == name


def _plain(name: str) -> str:
    for level in WRAPPERS:
        name = name.replace(level, "")
    return name


def _is_right(values: torch.Tensor, wanted: _Trained) -> bool:
    """Whether it is the wanted one, rounded, up to the last bit and the error of a matrix product."""
    if values.shape != wanted.after.shape or not values.dtype.is_floating_point:
        return False
    facts = torch.finfo(values.dtype)
    slack = wanted.after.abs() * facts.eps + facts.tiny
    if wanted.before is not None:
        slack += (wanted.after - wanted.before).abs() * MATMUL_ERROR
    return bool(((values.float() - wanted.after).abs() <= slack).all())


def _is_copy(found: tuple[TensorFile, Tensor] | None, original: tuple[TensorFile, Tensor] | None) -> bool:
    if found is None or original is None:
        return False
    (file, tensor), (source, wanted) = found, original
    if (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
        return False
    with file.open() as output, source.open() as base:
        return all(
            read_bytes(output, tensor.start + offset, count) == read_bytes(base, wanted.start + offset, count)
            for offset in range(0, tensor.nbytes, BLOCK_BYTES)
            if (count := min(BLOCK_BYTES, tensor.nbytes - offset))
        )
