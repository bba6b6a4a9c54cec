"""Whole models in memory, through transformers and PEFT: for the reference engine, and to compare what was merged."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dispatcher.errors import SourceError
from exporter.checkpoint import TensorFile
from exporter.tensors import read_tensor


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
    return model_class.from_pretrained(directory, config=known, dtype=dtype, trust_remote_code=False).eval()


def is_applied_whole(wrapped: Any, file: TensorFile) -> bool:
    """Whether a PEFT model holds every tensor of the adapter's file it was loaded from; PEFT itself only warns.

    Told by shape and sums, which are the same before and after PEFT renamed a key and widened a dtype.
    """
    from peft import get_peft_model_state_dict

    # With the embeddings, as the file may have them; `auto` would ask the hub about them.
    applied = Counter(_digest(t) for t in get_peft_model_state_dict(wrapped, save_embedding_layers=True).values())
    return not Counter(_digest(read_tensor(file, tensor)) for tensor in file.tensors) - applied


def _digest(tensor: torch.Tensor) -> tuple[tuple[int, ...], float, float]:
    values = tensor.detach().cpu().double().flatten()
    weights = torch.arange(1, values.numel() + 1, dtype=torch.float64)
    return tuple(tensor.shape), float(values.sum()), float(values @ weights)
