"""llama.cpp at work on a finished GGUF, in a process of its own: `python -m exporter.llama_run DIRECTORY`.

Native code that meets a damaged file may abort, and would take the exporter with it. What to do is in the directory's
`request.json` (see `Request`), what came of it in `answer.json` and `logits.f32`. Nothing here knows what is right:
`exporter.llama_check` compares. Needs llama-cpp-python, and neither torch nor transformers.
"""

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from exporter.child import end_with_parent
from exporter.limited import limits

LOG_ERROR, LOG_CONTINUED = 4, 5
"""Levels of a log callback (`enum ggml_log_level` in ggml.h); the latter goes on with the line before."""
CONTEXT = 512
"""Tokens; a batch is as long, so that a prompt is one batch."""


class Request(TypedDict):
    """What the parent asks."""

    path: str
    whole: bool
    """Load the weights, too, and look for NaN and infinity in them."""
    plain: list[str]
    """To tokenize as text in which special tokens are no tokens."""
    special: list[str]
    """To tokenize as a prompt, in which they are."""
    conversations: list[list[dict[str, Any]]]
    prompt: list[int]
    """Token ids to compute logits for, if whole; or none."""


class Answer(TypedDict, total=False):
    """What the child found; `error` alone where llama.cpp does not load the file."""

    error: str
    vocabulary: list[str]
    adds: list[list[int]]
    """Ids that llama.cpp puts before and after a prompt by itself."""
    plain: list[list[int]]
    special: list[list[int]]
    template: str | None
    rendered: list[list[str | None]]
    """Of each conversation: without and with the beginning of an answer; None where the template refuses it."""
    logits: list[int]
    """Shape of `logits.f32`: prompt and vocabulary; absent where none were asked for."""


class _Loaded(NamedTuple):
    library: Any
    model: Any
    vocabulary: Any


def main(place: Path) -> None:
    """Answer the request in `place`."""
    end_with_parent()
    request: Request = json.loads((place / "request.json").read_text())
    answer = _answer(request, place)
    (place / "answer.json").write_text(json.dumps(answer))


def _answer(request: Request, place: Path) -> Answer:
    import llama_cpp

    said: list[str] = []
    callback = llama_cpp.llama_log_callback(_collector(said))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    options.vocab_only = not request["whole"]
    options.check_tensors = request["whole"]
    options.use_extra_bufts = False  # the blocks as they are in the file: repacked, they would be in memory twice
    model = llama_cpp.llama_model_load_from_file(request["path"].encode(), options)
    if not model:
        return {"error": "; ".join(line for line in said if line)[-1000:] or "it does not say why"}
    loaded = _Loaded(llama_cpp, model, llama_cpp.llama_model_get_vocab(model))
    count = llama_cpp.llama_vocab_n_tokens(loaded.vocabulary)
    template = llama_cpp.llama_model_chat_template(model, None)
    answer: Answer = {
        "vocabulary": [_text(loaded, token) for token in range(count)],
        "adds": _adds(loaded),
        "plain": [_tokenized(loaded, text, special=False) for text in request["plain"]],
        "special": [_tokenized(loaded, text, special=True) for text in request["special"]],
        "template": None if template is None else template.decode(errors="replace"),
    }
    if answer["template"] is not None:
        answer["rendered"] = [_rendered(loaded, answer["template"], turns) for turns in request["conversations"]]
    if request["whole"] and request["prompt"]:
        (place / "logits.f32").write_bytes(_logits(loaded, request["prompt"]))
        answer["logits"] = [len(request["prompt"]), count]
    return answer


def _collector(said: list[str]) -> Any:
    """A log callback that keeps what llama.cpp complains of, and prints it for the case of an abort."""
    levels = [0]

    def collect(level: int, text: bytes, _: Any) -> None:
        levels[0] = level if level != LOG_CONTINUED else levels[0]
        if levels[0] == LOG_ERROR:
            line = text.decode(errors="replace").strip()
            said.append(line)
            sys.stderr.write(line + "\n")

    return collect


def _text(loaded: _Loaded, token: int) -> str:
    text: bytes = loaded.library.llama_vocab_get_text(loaded.vocabulary, token)
    return text.decode(errors="replace")


def _adds(loaded: _Loaded) -> list[list[int]]:
    """What it adds to a text of one token: before and after."""
    alone = _tokenized(loaded, "a", special=True)
    whole = _tokenized(loaded, "a", special=True, add=True)
    where = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
    return [whole[:where], whole[where + len(alone) :]]


def _tokenized(loaded: _Loaded, text: str, *, special: bool, add: bool = False) -> list[int]:
    encoded = text.encode()
    room = len(encoded) + 8
    tokens = (loaded.library.llama_token * room)()
    count = loaded.library.llama_tokenize(loaded.vocabulary, encoded, len(encoded), tokens, room, add, special)
    return list(tokens[:count])


def _rendered(loaded: _Loaded, template: str, turns: list[dict[str, Any]]) -> list[str | None]:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    bos, eos = (
        _text(loaded, token) if token >= 0 else ""
        for token in (
            loaded.library.llama_vocab_bos(loaded.vocabulary),
            loaded.library.llama_vocab_eos(loaded.vocabulary),
        )
    )
    formatter: Any = Jinja2ChatFormatter  # whose type for messages is narrower than what it takes
    found: list[str | None] = []
    for begin in (False, True):
        try:
            with limits():
                render = formatter(template, eos_token=eos, bos_token=bos, add_generation_prompt=begin)
                found.append(render(messages=turns).prompt)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001  # a template is a stranger's program, and may make any error
            found.append(None)
    return found


def _logits(loaded: _Loaded, prompt: Sequence[int]) -> bytes:
    """Of every token, float32, with nothing rounded on the way that need not be."""
    library = loaded.library
    options = library.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = CONTEXT
    options.type_k = options.type_v = library.GGML_TYPE_F32
    options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.offload_kqv = options.op_offload = False
    options.n_threads = options.n_threads_batch = os.cpu_count() or 1
    context = library.llama_init_from_model(loaded.model, options)
    if not context:
        raise RuntimeError("llama.cpp has no context for the model")
    batch = library.llama_batch_init(len(prompt), 0, 1)
    batch.n_tokens = len(prompt)
    for position, token in enumerate(prompt):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.logits[position] = True
    if status := library.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode says {status}")
    size = 4 * len(prompt) * library.llama_vocab_n_tokens(loaded.vocabulary)
    return ctypes.string_at(library.llama_get_logits(context), size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
