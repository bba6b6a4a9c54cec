"""What base and adapter together are, in float64: written out from PEFT's own modules, and from nothing of ours."""

from collections.abc import Iterator

import peft
import torch
from peft.tuners.lora import Embedding, Linear, ParamWrapper
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

ADAPTER = "default"
INSIDE = (".base_layer", ".original_module", ".token_adapter")


def exact_merge(wrapped: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Every parameter of the merged model in float64, by today's module name; head and embedding each their own."""
    model = wrapped.get_base_model()
    found = {
        _plain(name): parameter.detach().double()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not any(mark in name for mark in ("lora_", ".modules_to_save.", "trainable_tokens"))
    }
    for name, module in model.named_modules(remove_duplicate=False):
        match module:
            case ParamWrapper():
                found[f"{_plain(name)}.{module.parameter_name}"] = _stack(module)
            case Embedding():
                found[f"{name}.weight"] = _embedding(module)
            case Linear():
                found |= {f"{name}.{part}": value for part, value in _linear(module)}
            case ModulesToSaveWrapper():
                saved = module.modules_to_save[ADAPTER]
                found |= {f"{name}.{part}": value.detach().double() for part, value in saved.named_parameters()}
            case TrainableTokensWrapper():
                tokens = module.token_adapter
                weight = module.original_module.weight.detach().double().clone()
                weight[tokens.token_indices[ADAPTER]] = tokens.trainable_tokens_delta[ADAPTER].detach().double()
                found[f"{name}.weight"] = weight
    return found


def _plain(name: str) -> str:
    for level in INSIDE:
        name = name.replace(level, "")
    return name


def _linear(module: Linear) -> Iterator[tuple[str, torch.Tensor]]:
    layer, scale = module.get_base_layer(), module.scaling[ADAPTER]
    a, b = (half[ADAPTER].weight.detach().double() for half in (module.lora_A, module.lora_B))
    weight = layer.weight.detach().double() + scale * (b @ a)
    if ADAPTER in module.lora_magnitude_vector:
        magnitude = module.lora_magnitude_vector[ADAPTER].weight.detach().double()
        weight *= (magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]
    yield "weight", weight
    if module.lora_bias[ADAPTER] and layer.bias is not None:
        yield "bias", layer.bias.detach().double() + scale * module.lora_B[ADAPTER].bias.detach().double()


def _embedding(module: Embedding) -> torch.Tensor:
    a, b = (half[ADAPTER].detach().double() for half in (module.lora_embedding_A, module.lora_embedding_B))
    weight: torch.Tensor = module.get_base_layer().weight.detach().double() + module.scaling[ADAPTER] * (b @ a).T
    if module.lora_magnitude_vector is not None and ADAPTER in module.lora_magnitude_vector:
        magnitude = module.lora_magnitude_vector[ADAPTER].weight.detach().double()
        weight *= (magnitude / torch.linalg.vector_norm(weight, dim=0))[None, :]
    return weight


def _stack(module: ParamWrapper) -> torch.Tensor:
    weight: torch.Tensor = module.get_param().detach().double()
    a, b = (half[ADAPTER].weight.detach().double() for half in (module.lora_A, module.lora_B))
    rank = module.r[ADAPTER]
    added = torch.zeros_like(weight)
    for expert in range(weight.shape[0]):
        # PEFT: the experts are outermost in A, and innermost in B.
        product = b[:, expert :: weight.shape[0]] @ a[expert * rank : (expert + 1) * rank]
        added[expert] = product if product.shape == weight.shape[1:] else product.T
    merged: torch.Tensor = weight + module.scaling[ADAPTER] * added
    return merged
