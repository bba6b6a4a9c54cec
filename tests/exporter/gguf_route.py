"""llama.cpp's own route to a quantized GGUF, in its separate steps, and how another file differs from what it makes.

PEFT merges into a directory, `convert_hf_to_gguf.py` makes a bfloat16 file of that, `llama_model_quantize` another.
"""

import ctypes
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from exporter.llama_cpp import ensure_importable, home
from exporter.peft_engine import merge_with_peft
from exporter.quantizer import file_type
from exporter.sources import open_base


def peft_directory(base: Path, adapter: Path, directory: Path) -> Path:
    """Merge with PEFT into a directory, the base's other files beside it; returned.

    Args:
        base: The base's directory.
        adapter: The adapter's.
        directory: Where to; created. The converter names the model after it.
    """
    directory.mkdir(parents=True)
    merge_with_peft(open_base(str(base), None, lambda: None), adapter, directory)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and not (directory / path.name).exists():
            shutil.copy(path, directory)
    return directory


def converted(model: Path, output: Path, kind: str, *options: str) -> Path:
    """Run `convert_hf_to_gguf.py` on a model's directory; returns `output`.

    Args:
        model: Weights, config.json and tokenizer.
        output: The file to write.
        kind: Its `--outtype`.
        options: Further ones, such as `--mmproj`.
    """
    script = home() / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(model), "--outtype", kind, "--outfile", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def quantized(source: Path, quantization: str) -> Path:
    """Quantize a file of the converter's with llama.cpp's quantizer, into one beside it, which is returned."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type(quantization)
    output = source.with_name(f"{quantization}.gguf")
    llama_cpp.llama_log_set(_silence(), None)
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(output), ctypes.byref(params)) == 0
    return output


@cache
def _silence() -> Any:
    """What is set as llama.cpp's log has to outlive every call."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, user_data: None)


def differences(ours: Path, theirs: Path) -> list[str]:
    """How two GGUF files differ: metadata keys and tensors by name, then their order; nothing where all bytes agree."""
    if ours.read_bytes() == theirs.read_bytes():
        return []
    a, b = read(ours), read(theirs)
    found = [f"{kind}: {name}" for kind in a for name in sorted(a[kind].keys() ^ b[kind].keys())]
    for kind in a:
        found += [f"{kind}: {name} differs" for name in a[kind] if name in b[kind] and a[kind][name] != b[kind][name]]
        found += [f"{kind}: another order"] if not found and list(a[kind]) != list(b[kind]) else []
    return found or ["padding"]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """A GGUF file's `keys`, each with its types and value, and `tensors`, each with its type, shape and bytes."""
    ensure_importable()
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {
        name: (field.types, [part.tobytes() for part in field.parts])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in reader.tensors
    }
    return {"keys": keys, "tensors": tensors}
