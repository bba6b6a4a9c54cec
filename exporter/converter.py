"""llama.cpp's own converter, fed with merged tensors that nobody has read yet.

It decides names, metadata, vocabulary and layout of a GGUF file; its output here is metadata, and for each tensor how
to get it. Source: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dispatcher.errors import Unsupported
from dispatcher.logs import clean
from exporter.llama_cpp import ensure_importable
from exporter.models import library_errors, quiet
from exporter.tensors import TORCH_DTYPE

MAX_MESSAGE = 500
OURS = "Gemma"
"""How the classes begin that are converted"""
_LOCK = threading.Lock()
"""For what belongs to the whole process, and `quiet` and libraries change and put back"""

Read = Callable[[str], torch.Tensor]
"""Gives a whole merged tensor by its name in the checkpoint, in its own dtype."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the converter is told of it."""

    source: str | None
    """Its name in the checkpoint; None for zeros"""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it"""


@dataclass(frozen=True)
class Converted:
    """What the converter made of a model."""

    writer: Any
    """llama.cpp's `GGUFWriter`, with all metadata and tensors, none of them read"""

    @property
    def tensors(self) -> dict[str, Any]:
        """llama.cpp's `TensorInfo` of each tensor; its `tensor` is a `lazy_rows.RowArray`, or an array, lazy or not."""
        infos: dict[str, Any] = self.writer.tensors[0]
        return infos

    @property
    def chat_template(self) -> str | None:
        """The template that the file will carry."""
        found = self.writer.kv_data[0].get("tokenizer.chat_template")
        return None if found is None else str(found.value)

    def head(self, path: Path) -> bytes:
        """Everything before the first tensor's data, unpadded, as llama.cpp's own writer has it; `path` is written."""
        self.writer.write_header_to_file(path)
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        self.writer.close()
        return path.read_bytes()


def convert(directory: Path, tensors: Mapping[str, Stored], read: Read, *, projector: bool = False) -> Converted:
    """Let llama.cpp's converter describe the GGUF file of a model.

    Args:
        directory: config.json, tokenizer and all other files of the merged model but its weights; its name is the
            model's name.
        tensors: The merged tensors, by the names that the converter knows.
        read: Called for those that the converter does not leave as they are.
        projector: Whether the multimodal projector (`mmproj`) is wanted, in F16, instead of the language model in BF16.

    Raises:
        NotAvailable: As `exporter.llama_cpp`.
        Unsupported: `gguf_unsupported_architecture`: llama.cpp has no converter for it; `gguf_not_convertible`: it has,
            which refuses this very model, and the message is its own.
    """
    ensure_importable()
    import conversion
    import gguf

    for name in ("hf-to-gguf", "gguf.gguf_writer", "gguf.vocab", "gguf.lazy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    kind = conversion.ModelType.MMPROJ if projector else conversion.ModelType.TEXT
    file_type = gguf.LlamaFileType.MOSTLY_F16 if projector else gguf.LlamaFileType.MOSTLY_BF16
    refusals: tuple[type[Exception], ...] = (AssertionError, ArithmeticError, IndexError, *library_errors())
    try:
        with _LOCK, quiet(), torch.inference_mode():
            hparams = conversion.ModelBase.load_hparams(directory, False)
            architecture = conversion.get_model_architecture(hparams, kind)
            if not str(architecture).startswith(OURS):
                # Some of the others' classes load a tokenizer with trust_remote_code; and a nested config names one.
                raise NotImplementedError(f"{str(architecture)[:80]!r} is no Gemma")
            model_class = conversion.get_model_class(architecture, mmproj=projector)
            model = _fed(model_class, tensors, read)(directory, file_type, directory / "unwritten.gguf")
            model.prepare_tensors()
            model.prepare_metadata(vocab_only=False)
    except NotImplementedError as error:
        raise Unsupported(
            f"llama.cpp has no converter for this model: {_said(error, directory)}",
            code="gguf_unsupported_architecture",
        ) from error
    except refusals as error:
        raise Unsupported(
            f"llama.cpp's converter refuses this model: {_said(error, directory)}", code="gguf_not_convertible"
        ) from error
    return Converted(model.gguf_writer)


def _said(error: Exception, directory: Path) -> str:
    """A library's message, without where the model lies for the moment."""
    text = f"{type(error).__name__}: {error}".replace(str(directory), directory.name)
    return clean(text, limit=MAX_MESSAGE)


def _fed(model_class: Any, tensors: Mapping[str, Stored], read: Read) -> Any:
    """The converter's class for a model, whose tensors are the merged ones."""
    from exporter.lazy_rows import LazyRows, Rows

    def thunk(stored: Stored) -> Callable[[], LazyRows]:
        rows = Rows(stored.source, stored.shape, stored.shape[0] if stored.shape and stored.source else 0)
        return lambda: LazyRows(rows, TORCH_DTYPE[stored.dtype], lambda asked: _padded(asked, read))

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], LazyRows]]:
        thunks = ((name, thunk(stored)) for name, stored in tensors.items())
        kept = (self.filter_tensors(item) for item in thunks)
        return dict(item for item in kept if item is not None)

    return type(
        model_class.__name__, (model_class,), {"model_arch": model_class.model_arch, "index_tensors": index_tensors}
    )


def _padded(rows: Any, read: Read) -> torch.Tensor:
    if rows.source is None:
        return torch.zeros(rows.shape)
    whole = read(rows.source)
    if not rows.shape:
        return whole
    zeros = torch.zeros(rows.shape[0] - rows.kept, *whole.shape[1:], dtype=whole.dtype)
    return torch.cat([whole[: rows.kept], zeros])
