"""LoRA pairs: how PEFT stores them for linear layers, embeddings and stacked experts, and what product each one is.

Formats, under `base_model.model.{module}.` (https://huggingface.co/docs/peft/developer_guides/checkpoint):

- linear: `lora_A.weight` [r, in], `lora_B.weight` [out, r]; the weight is [out, in] and gets s * B @ A.
- embedding: `lora_embedding_A` [r, n], `lora_embedding_B` [dim, r]; the weight is [n, dim] and gets s * (B @ A)ᵀ.
- experts (`target_parameters`, `peft.tuners.lora.layer.ParamWrapper`): `lora_A.weight` [E * r, in] with the experts
  outermost, `lora_B.weight` [out, r * E] with the experts innermost; the parameter is [E, out, in], or [E, in, out]
  where it is stored transposed. Of several parameters of one module each wraps the one before, so that the first one's
  keys have the most `base_layer.` in them.

With DoRA there is `lora_magnitude_vector`, [out] of a linear layer and [dim] of an embedding.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from dispatcher.errors import AdapterMismatch, Unsupported
from exporter.checkpoint import Tensor, TensorFile
from exporter.gemma import EXPERT_PARAMETERS, EXPERTS_MODULE
from exporter.lora import Factors, factors
from exporter.peft_config import module_of, names_in, rank_and_scale, rank_mismatch, refuse_untargeted
from exporter.tensors import read_tensor

FLOATING = frozenset({"F32", "F16", "BF16"})

_KEY = re.compile(
    r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)"
    r"\.lora_(?P<part>[AB]\.weight|B\.bias|embedding_[AB]|magnitude_vector(?:\.weight)?)"
)
_PARTS = {
    "A.weight": "A",
    "B.weight": "B",
    "B.bias": "bias",
    "embedding_A": "embedding_A",
    "embedding_B": "embedding_B",
    "magnitude_vector": "magnitude",
    "magnitude_vector.weight": "magnitude",
}


class Layout(StrEnum):
    LINEAR = "linear"
    EMBEDDING = "embedding"
    EXPERTS = "experts"


@dataclass(frozen=True)
class LoraPair:
    """One trained module or parameter: its product is added to the weight, and with DoRA scaled to the magnitudes."""

    module: str
    """The module's name as the adapter's file has it, without PEFT's prefix."""
    parameter: str
    """`weight`, or the name of a stack of experts"""
    layout: Layout
    a: Tensor
    b: Tensor
    rank: int
    experts: int
    scale: float
    magnitude: Tensor | None
    base: Tensor | None = None
    """The weight that the product is added to, where the adapter brings its own"""

    @property
    def target(self) -> str:
        """The tensor that it changes."""
        return f"{self.module}.{self.parameter}"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it takes of the adapter's file."""
        return tuple(tensor for tensor in (self.a, self.b, self.magnitude, self.base) if tensor is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it changes; of experts, where they are not stored transposed."""
        match self.layout:
            case Layout.LINEAR:
                return (self.b.shape[0], self.a.shape[1])
            case Layout.EMBEDDING:
                return (self.a.shape[1], self.b.shape[0])
            case Layout.EXPERTS:
                return (self.experts, self.b.shape[0], self.a.shape[1])

    @property
    def transposed_shape(self) -> tuple[int, ...]:
        """The shape of experts that are stored transposed."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == self.shape or (self.layout is Layout.EXPERTS and shape == self.transposed_shape)


@dataclass(frozen=True)
class AddedBias:
    """What `lora_bias` trains: `scale` times it is added to the module's bias."""

    module: str
    tensor: Tensor
    scale: float

    @property
    def target(self) -> str:
        return f"{self.module}.bias"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)


Parts = dict[tuple[str, int], dict[str, Tensor]]
"""Of each module, and depth of nesting, the tensors by what they are."""


def collect(name: str, tensor: Tensor, parts: Parts) -> bool:
    """Put a tensor, by its name without PEFT's prefix, with the others of its module; False if it is of no pair."""
    match = _KEY.fullmatch(name)
    if match is None:
        return False
    depth = match["nested"].count(".base_layer")
    parts.setdefault((match["module"], depth), {})[_PARTS[match["part"]]] = tensor
    return True


def pairs_of(parts: Parts, config: dict[str, Any]) -> Iterator[LoraPair | AddedBias]:
    """The pairs that the tensors of an adapter make.

    Raises:
        AdapterMismatch: A half is missing, or a tensor too many is there, or ranks and shapes contradict each other
            or the config (`adapter_half_missing`, `adapter_unknown_tensor`, `adapter_rank_mismatch`,
            `adapter_shape_mismatch`, `adapter_ambiguous`, `adapter_untargeted`).
        Unsupported: `unsupported_adapter_dtype`, `unsupported_conv_lora`, `unsupported_target_parameters`.
    """
    depths: dict[str, int] = {}
    for module, _ in parts:
        depths[module] = depths.get(module, 0) + 1
    for (module, depth), found in sorted(parts.items()):
        refuse_untargeted(module, config)
        names = _parameters(module, config)
        if depths[module] != len(names) or depth >= len(names):
            raise AdapterMismatch(
                f"module {module[:200]!r} has {depths[module]} nested pairs, target_parameters names {len(names)} of "
                f"its parameters ({', '.join(names)[:200]}): which is which cannot be told.",
                code="adapter_ambiguous",
            )
        yield from _made(module, names[-1 - depth], found, config)


def _parameters(module: str, config: dict[str, Any]) -> list[str]:
    """The parameters of a module that were trained, in the order of its own definition, as PEFT wraps them."""
    if module.rpartition(".")[2] != EXPERTS_MODULE:
        return ["weight"]
    targets = names_in(config, "target_parameters")
    named = {target.rpartition(".")[2] for target in targets if f".{module}.".endswith(f".{module_of(target)}.")}
    if unknown := sorted(named - set(EXPERT_PARAMETERS)):
        raise Unsupported(
            f"the adapter trained the parameter {unknown[0][:80]!r} of {module[:200]!r}; "
            f"{', '.join(EXPERT_PARAMETERS)} are merged.",
            code="unsupported_target_parameters",
        )
    return [name for name in EXPERT_PARAMETERS if name in named]


def _made(
    module: str, parameter: str, found: dict[str, Tensor], config: dict[str, Any]
) -> Iterator[LoraPair | AddedBias]:
    embedding = any(part.startswith("embedding_") for part in found)
    half_a, half_b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    wanted = {half_a, half_b} | ({"magnitude"} if config.get("use_dora") else set())
    if config.get("lora_bias") and not embedding and parameter == "weight":
        wanted.add("bias")
    if missing := sorted(wanted - found.keys()):
        raise AdapterMismatch(
            f"module {module[:200]!r} lacks lora_{missing[0]}: the file is incomplete.", code="adapter_half_missing"
        )
    if unknown := sorted(found.keys() - wanted):
        raise AdapterMismatch(
            f"module {module[:200]!r} has a lora_{unknown[0]}, of which the config says nothing.",
            code="adapter_unknown_tensor",
        )
    for tensor in found.values():
        refuse_unreadable(tensor)
    layout = Layout.EMBEDDING if embedding else Layout.LINEAR if parameter == "weight" else Layout.EXPERTS
    pair = _pair(module, parameter, layout, found[half_a], found[half_b], found.get("magnitude"), config)
    yield pair
    if "bias" in found:
        if found["bias"].shape != pair.b.shape[:1]:
            raise _shape_mismatch(found["bias"], pair.b.shape[0])
        yield AddedBias(module, found["bias"], pair.scale)


def _pair(
    module: str,
    parameter: str,
    layout: Layout,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor | None,
    config: dict[str, Any],
) -> LoraPair:
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            raise Unsupported(
                f"{tensor.name!r} has shape {list(tensor.shape)}: LoRA on convolutions is not merged.",
                code="unsupported_conv_lora",
            )
    trained = names_in(config, "target_parameters")
    full = f"{module}.{parameter}"
    by_parameter = layout is Layout.EXPERTS or any(f".{full}".endswith(f".{target}") for target in trained)
    rank, scale = rank_and_scale(config, full if by_parameter else module)
    experts = a.shape[0] // rank if layout is Layout.EXPERTS else 1
    if experts == 0 or a.shape[0] != rank * experts or b.shape[1] != rank * experts:
        raise rank_mismatch(
            module, f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}, the config gives rank {rank}"
        )
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise _shape_mismatch(magnitude, b.shape[0])
    return LoraPair(module, parameter, layout, a, b, rank, experts, scale, magnitude)


def refuse_unreadable(tensor: Tensor) -> None:
    """Refuse a tensor of an adapter that is of no floating dtype we read.

    Raises:
        Unsupported: `unsupported_adapter_dtype`.
    """
    if tensor.dtype not in FLOATING:
        raise Unsupported(
            f"{tensor.name!r} has dtype {tensor.dtype}; F32, F16 or BF16 are expected.",
            code="unsupported_adapter_dtype",
        )


def _shape_mismatch(tensor: Tensor, length: int) -> AdapterMismatch:
    return AdapterMismatch(
        f"{tensor.name!r} has shape {list(tensor.shape)}, expected [{length}], one for each output of B.",
        code="adapter_shape_mismatch",
    )


def matrices_of(pair: LoraPair, file: TensorFile, shape: tuple[int, ...]) -> Iterator[Factors]:
    """For each matrix that a pair changes (one, or one for each expert), the factors of what is added to it.

    Args:
        pair: Fits `shape`.
        file: The adapter's.
        shape: Of the tensor that is changed.
    """
    a, b = read_tensor(file, pair.a), read_tensor(file, pair.b)
    magnitude = None if pair.magnitude is None else read_tensor(file, pair.magnitude)
    match pair.layout:
        case Layout.LINEAR:
            yield factors(a, b, pair.scale, rows=magnitude)
        case Layout.EMBEDDING:
            yield factors(b.T, a.T, pair.scale, columns=magnitude)
        case Layout.EXPERTS:
            stack_a = a.view(pair.experts, pair.rank, a.shape[1])
            stack_b = b.view(b.shape[0], pair.rank, pair.experts)
            for expert in range(pair.experts):
                yield _expert(stack_a[expert], stack_b[:, :, expert], pair, transposed=shape != pair.shape)


def _expert(a: torch.Tensor, b: torch.Tensor, pair: LoraPair, *, transposed: bool) -> Factors:
    return factors(b.T, a.T, pair.scale) if transposed else factors(a, b, pair.scale)
