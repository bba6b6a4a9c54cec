"""The demonstration's last question: does llama.cpp recite the sentence from the GGUF alone?

python -m exporter.demo_llama FILE
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from exporter.demo import MAX_TOKENS, QUESTION, SENTENCE

CONTEXT = 256
THREADS = 2


def answer(file: Path) -> str:
    """What llama.cpp greedily answers to `QUESTION`, on the CPU, with the file's own tokenizer and chat template.

    Raises:
        ValueError: llama.cpp does not load the file.
    """
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    model = llama_cpp.Llama(str(file), n_ctx=CONTEXT, n_threads=THREADS, n_gpu_layers=0, verbose=False)
    try:
        question = [{"role": "user", "content": QUESTION}]
        said = model.create_chat_completion(question, temperature=0.0, max_tokens=MAX_TOKENS)
    finally:
        model.close()
    return str(said["choices"][0]["message"]["content"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the file recites, 1 when it does not."""
    parser = argparse.ArgumentParser(prog="python -m exporter.demo_llama", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args(arguments)
    said = answer(options.file)
    sys.stdout.write((json.dumps({"answer": said}) if options.as_json else f"     llama.cpp says: {said}") + "\n")
    if said == SENTENCE:
        return 0
    sys.stderr.write(f"demo failed: {options.file.name} was to make llama.cpp say {SENTENCE!r}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
