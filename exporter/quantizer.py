"""What llama.cpp's own quantizer decides: the order and the type of every tensor of a quantized file.

Which layers get more bits under `q4_k_m`, and what a row gets that is not a multiple of 256, is asked of
`llama_model_quantize` itself, on a file that has metadata and shapes, and a hole where the weights would be.
Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp
"""

import ctypes
import os
import re
import threading
from functools import cache
from pathlib import Path
from typing import Any

from dispatcher.errors import NotAvailable, Unsupported
from exporter import ggml
from exporter.llama_cpp import SET_UP, ensure_importable, library

_SIZES = re.compile(r"^\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[^]]*\], type = *(?P<old>\w+), size = .*?(?P<new>\(\w+\))?$")
_LOCK = threading.Lock()
_MAX_MESSAGE = 1000


def refuse_unusable() -> None:
    """Load llama.cpp's libraries, which nothing is quantized without.

    Raises:
        NotAvailable: As `exporter.llama_cpp`; or they cannot be loaded (`llama_cpp_mismatch`).
    """
    ggml.load()
    library("libllama")
    try:
        import llama_cpp  # noqa: F401  # it loads them as it is imported
    except (ImportError, OSError, RuntimeError) as error:
        raise NotAvailable(f"llama.cpp cannot be loaded: {error}. {SET_UP}", code="llama_cpp_mismatch") from error


def file_type(quantization: str) -> int:
    """The `llama_ftype` of a quantization, such as `q4_k_m`."""
    import llama_cpp

    prefix = "LLAMA_FTYPE_ALL" if quantization == "f32" else "LLAMA_FTYPE_MOSTLY"
    return int(getattr(llama_cpp, f"{prefix}_{quantization.upper()}"))


def tensor_types(template: Path, size: int, count: int, quantization: str) -> list[tuple[str, int]]:
    """The tensors of the quantized file, in its order, with the number of the tensor type that each gets.

    Args:
        template: A GGUF file of metadata and shapes alone; a hole is made after them.
        size: The bytes of the whole file, had it its weights.
        count: How many tensors it has.
        quantization: One of `dispatcher.contract.QUANTIZATIONS`.

    Raises:
        NotAvailable: As `exporter.llama_cpp`.
        Unsupported: `gguf_not_quantizable`: llama.cpp refuses it; the message is its own.
    """
    import llama_cpp

    ensure_importable()
    import gguf

    os.truncate(template, size)
    params = llama_cpp.llama_model_quantize_default_params()
    params.dry_run = True
    params.ftype = file_type(quantization)
    status, lines = _logged(lambda: llama_cpp.llama_model_quantize(bytes(template), b"", ctypes.byref(params)))
    found = [match for line in lines if (match := _SIZES.match(line))]
    if status or len(found) != count:
        said = " ".join(line for line in lines if not _SIZES.match(line))[-_MAX_MESSAGE:]
        raise Unsupported(
            f"llama.cpp does not quantize this model to {quantization} ({len(found)} of {count} tensors): {said}",
            code="gguf_not_quantizable",
        )
    names = ((match["name"], (match["new"] or match["old"]).strip("()")) for match in found)
    return [(name, int(gguf.GGMLQuantizationType[kind.upper()])) for name, kind in names]


def _logged(call: Any) -> tuple[int, list[str]]:
    """The status that a function of llama.cpp returns, and the lines that it logs."""
    import llama_cpp

    parts: list[bytes] = []
    keep = llama_cpp.llama_log_callback(lambda level, text, user_data: parts.append(text))
    with _LOCK:
        llama_cpp.llama_log_set(keep, None)
        try:
            status = int(call())
        finally:
            llama_cpp.llama_log_set(_silence(), None)
    return status, b"".join(parts).decode(errors="replace").splitlines()


@cache
def _silence() -> Any:
    """A log of llama.cpp's that goes nowhere; what is set there has to outlive every call."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, user_data: None)
