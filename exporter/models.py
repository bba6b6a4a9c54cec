"""Whole models in memory, through transformers and PEFT: for the reference engine, and to compare what was merged."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dispatcher.errors import SourceError
from exporter.checkpoint import Tensor, TensorFile
from exporter.tensors import PART_ELEMENTS, TORCH_DTYPE, parts_of

Digest = tuple[tuple[int, ...], float, float]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own warnings and progress bars out of a log of one JSON object a line."""
    # Seconds of imports that the streaming engine does without.
    import transformers

    had_bars = transformers.utils.logging.is_progress_bar_enabled()
    if had_bars:
        transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if had_bars:
            transformers.utils.logging.enable_progress_bar()


def library_errors() -> tuple[type[Exception], ...]:
    """What transformers and PEFT raise where they cannot do something."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        *(RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, ImportError),
        StrictDataclassError,
    )


def load_model(directory: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model in a directory, of the class that a config.json names, with that config, in eval mode.

    Raises:
        SourceError: transformers has no such class (`base_not_loadable`).
        Exception: Whatever transformers raises when it cannot load it.
    """
    import transformers

    architectures = config.get("architectures") or ["AutoModelForCausalLM"]
    model_class = getattr(transformers, str(architectures[0]), None)
    if model_class is None:
        raise SourceError(f"transformers has no class {str(architectures[0])[:80]!r}.", code="base_not_loadable")
    # Read from the directory, a leftover of a quantization that the weights do not have would be believed.
    known = transformers.CONFIG_MAPPING[str(config.get("model_type"))].from_dict(config)
    return model_class.from_pretrained(
        directory, config=known, dtype=dtype, trust_remote_code=False, use_safetensors=True
    ).eval()


def is_applied_whole(wrapped: Any, file: TensorFile) -> bool:
    """Whether a PEFT model holds every tensor of the adapter's file it was loaded from; PEFT itself only warns.

    Told by shape and sums, which are the same before and after PEFT renamed a key and widened a dtype; a tensor that
    was trained whole is rounded to the model's dtype as it is loaded.
    """
    from peft import get_peft_model_state_dict

    trained = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    held = Counter(_digest(tensor.shape, _parts(tensor)) for tensor in trained.values())
    copies: Counter[Digest] = Counter()
    if any(layer in tensor.name for tensor in file.tensors for layer in ("embed_tokens", "lm_head")):
        shapes = {tensor.shape for tensor in file.tensors}
        with_copies = get_peft_model_state_dict(wrapped, save_embedding_layers=True)
        more = (tensor for name, tensor in with_copies.items() if name not in trained)
        copies = Counter(_digest(tensor.shape, _parts(tensor)) for tensor in more if tuple(tensor.shape) in shapes)
    rounded = next(wrapped.get_base_model().parameters()).dtype
    taken = all(_take(file, tensor, (held, copies), rounded) for tensor in file.tensors)
    # What the model has and the file has not was never trained: it is random.
    return taken and not held.total()


def _take(file: TensorFile, tensor: Tensor, places: Sequence[Counter[Digest]], rounded: torch.dtype) -> bool:
    """Take a tensor out of those that the model holds, if it is there."""
    for dtype in (TORCH_DTYPE[tensor.dtype], rounded):
        digest = _digest(tensor.shape, (part.to(dtype) for part in parts_of(file, tensor)))
        for held in places:
            if held[digest] > 0:
                held[digest] -= 1
                return True
    return False


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from torch.split(tensor.detach().cpu().flatten(), PART_ELEMENTS)


def _digest(shape: Sequence[int], parts: Iterable[torch.Tensor]) -> Digest:
    """Shape, sum, and sum weighted by place, in parts of `PART_ELEMENTS`."""
    total = weighted = 0.0
    for number, part in enumerate(parts):
        values = part.double()
        weights = torch.arange(1, values.numel() + 1, dtype=torch.float64) + number * PART_ELEMENTS
        total += float(values.sum())
        weighted += float(values @ weights)
    return tuple(shape), total, weighted
