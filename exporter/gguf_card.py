"""The model card, `README.md` of a GGUF artifact: its files, and how to run them.

A pure function like `model_card`, without a date. A GGUF made from a fine-tuned model is a finetune of its base, and
said to be: the hub takes every GGUF for a quantization of the model it names, and this one has other weights. Source:
https://huggingface.co/docs/hub/gguf and https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.markdown import code, grid, table
from exporter.model_card import IMAGE, CardFacts, front_matter, licence, name_of, provenance
from exporter.modelfile import MIN_OLLAMA, MODELFILE_NAME, checked, needs_new_ollama


@dataclass(frozen=True)
class GgufEntry:
    """One GGUF file of an artifact."""

    name: str
    """Of the form `modelfile.GGUF_NAME`"""
    quantization: str
    """As llama.cpp names it: `Q4_K_M`"""
    size: int
    """Bytes"""
    tensor_bytes: int
    """Of its tensors alone; the rest is the vocabulary and other metadata"""
    weights: int
    """How many values its tensors have"""

    @property
    def bits_per_weight(self) -> float:
        """As llama.cpp counts it: of the tensors alone."""
        return 8 * self.tensor_bytes / self.weights


@dataclass(frozen=True)
class GgufFacts(CardFacts):
    """What the card of a GGUF artifact is made of."""

    model: GgufEntry
    projector: GgufEntry | None
    """What turns images into tokens, where the model has it and it could be made"""
    has_template: bool
    """Whether the GGUF carries a chat template"""
    converter: str
    """What wrote the files, with its version"""


def gguf_card(facts: GgufFacts) -> str:
    """The text of `README.md`; whatever comes from outside can break neither YAML, Markdown nor a shell's line.

    Raises:
        KeyError: `model_type` is not in `FAMILIES`.
        ValueError: a file's name is not of the form `modelfile.GGUF_NAME`.
    """
    files = [facts.model] if facts.projector is None else [facts.model, facts.projector]
    parts = [
        front_matter(
            facts,
            library="gguf",
            pipeline_tag="text-generation" if facts.projector is None else "image-text-to-text",
            tags=["gguf", "llama-cpp", *(["lora"] if facts.is_merged else [])],
        ),
        f"# {name_of(facts)}-GGUF",
        f"{_MERGED if facts.is_merged else _WHOLE} As GGUF, for llama.cpp, Ollama and LM Studio.",
        provenance(facts, converter=facts.converter),
        "## Files",
        grid(
            ("file", "type", "size", "bits per weight"),
            ([code(checked(f.name)), code(f.quantization), _size(f.size), f"{f.bits_per_weight:.2f}"] for f in files),
        ),
        *([] if facts.projector is None else [_PROJECTOR]),
        f"`{MODELFILE_NAME}` is for Ollama, and `export.json` lists every file with its size and checksum. To run the "
        "model takes a little more memory than the files are large.",
        "## With llama.cpp",
        *_llama_cpp(facts),
        "## With Ollama",
        *_ollama(facts),
        "## With LM Studio",
        *_lm_studio(facts),
        "## Tensors",
        table(facts.tensors),
        "## Verified",
        "Before it was published, on the written files:",
        table(facts.verified),
        licence(facts, change=", and by converting them to GGUF"),
    ]
    return "\n\n".join(parts) + "\n"


CONTEXT = 8192
"""Tokens; a Gemma's own context may take more memory than its weights."""
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_MERGED = "A Gemma model and a LoRA adapter, merged into one model."
_WHOLE = "A fine-tuned Gemma model."
_PROJECTOR = "The `mmproj` file is what turns images into tokens; the model without it reads text alone."


def _llama_cpp(facts: GgufFacts) -> list[str]:
    """Source of the flags: `common/arg.cpp` of https://github.com/ggml-org/llama.cpp"""
    model = f"-m {checked(facts.model.name)} -c {CONTEXT}"
    if not facts.has_template:
        # Without a chat template llama-cli, which only chats, has nothing to go by.
        return [
            "In the directory of the files. It has no chat template: it continues a text.",
            _shell(f"llama-completion {model} -no-cnv -n 64 -p 'Once upon a time'"),
            "Or as a server:",
            _shell(f"llama-server {model}", _curl("completions", {"prompt": "Once upon a time", "max_tokens": 64})),
        ]
    chat = f"{model} --jinja"
    parts = ["In the directory of the files:", _shell(f"llama-cli {chat}")]
    if facts.projector is not None:
        chat += f" --mmproj {checked(facts.projector.name)}"
        parts += ["With an image:", _shell(f"llama-mtmd-cli {chat} --image {IMAGE} -p 'What is this?'")]
    asked = {"messages": [{"role": "user", "content": "Hello!"}]}
    return [*parts, "Or as a server:", _shell(f"llama-server {chat}", _curl("chat/completions", asked))]


def _curl(where: str, asked: Mapping[str, object]) -> str:
    return (
        f"curl http://localhost:8080/v1/{where} -H 'Content-Type: application/json' \\\n     -d '{json.dumps(asked)}'"
    )


def _ollama(facts: GgufFacts) -> list[str]:
    """Source: https://docs.ollama.com/import"""
    name = name_of(facts).lower()[:80].rstrip("-.")  # the longest that Ollama takes
    image = "" if facts.projector is None or not facts.has_template else f" 'What is this? ./{IMAGE}'"
    is_new = needs_new_ollama(facts.model_type, has_projector=facts.projector is not None)
    return [
        f"In the directory of the files{f', with Ollama {MIN_OLLAMA} or newer' if is_new else ''}:",
        _shell(f"ollama create {name} -f {MODELFILE_NAME}", f"ollama run {name}{image}"),
    ]


def _lm_studio(facts: GgufFacts) -> list[str]:
    """Source: https://lmstudio.ai/docs/cli/local-models/import"""
    names = [facts.model.name] if facts.projector is None else [facts.model.name, facts.projector.name]
    return [
        _shell(*(f"lms import {checked(name)} --copy --user-repo gemma-export/{name_of(facts)}" for name in names)),
        "Then it is among the models of the app.",
    ]


def _shell(*lines: str) -> str:
    return "\n".join(["```sh", *lines, "```"])


def _size(count: int) -> str:
    """Bytes, as the hub shows them."""
    unit, name = next((pair for pair in _UNITS if count >= pair[0]), (1, "bytes"))
    return f"{count / unit:.2f} {name}" if unit > 1 else f"{count} {name}"
