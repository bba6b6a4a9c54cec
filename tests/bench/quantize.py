"""What `llama-quantize` does, with the installed libraries: the last step of the route to a quantized GGUF.

python -m tests.bench.quantize FILE OUT QUANTIZATION
"""

import ctypes
import sys


def main(file: str, out: str, quantization: str) -> int:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization.upper()}")
    return int(llama_cpp.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
