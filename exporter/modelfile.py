"""The `Modelfile` beside a GGUF: what `ollama create` reads.

Ollama does not read the Jinja template that the GGUF carries; it has Go templates, and for Gemma 4 a renderer and a
parser built in, which also know its tools and thoughts. Source: https://docs.ollama.com/modelfile and
https://github.com/ollama/ollama/blob/main/parser/parser.go
"""

import re
from collections.abc import Mapping
from typing import Any

from exporter.chat_format import GEMMA4_LARGE, GEMMA4_SMALL, ChatFormat, chat_format
from exporter.gemma import FAMILIES

MODELFILE_NAME = "Modelfile"
GGUF_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,180}\.gguf")
"""File names that need no quoting, neither here nor in a shell."""
PLAIN = "{{ .Prompt }}"
"""The prompt as it is: Ollama's own template where there is no other."""
MIN_OLLAMA = "0.30.0"
"""The first that runs llama.cpp's own server: a projector in a file of its own and Gemma 4's GGUF need it. Source:
https://github.com/ollama/ollama/issues/16192"""
_GEMMA4 = "gemma4"


def modelfile(
    gguf_name: str,
    model_type: str,
    *,
    chat_template: str | None,
    mmproj_name: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> str:
    """The text of a `Modelfile` that lies beside the files it names.

    `chat_template` is the Jinja template that the GGUF carries, none for a base model; `generation` is what the model's
    generation_config.json says.

    Raises:
        KeyError: `model_type` is not in `FAMILIES`.
        ValueError: a file's name is not of the form `GGUF_NAME`; made with `markdown.slug` it is.
    """
    terms = FAMILIES[model_type].license
    known = None if chat_template is None else chat_format(chat_template)
    is_gemma4 = model_type.startswith(_GEMMA4)
    has_renderer = is_gemma4 and known in (GEMMA4_SMALL, GEMMA4_LARGE)
    lines = [f"FROM ./{checked(name)}" for name in (gguf_name, mmproj_name) if name is not None]
    if needs_new_ollama(model_type, has_projector=mmproj_name is not None):
        lines.append(f"REQUIRES {MIN_OLLAMA}")
    if is_gemma4 and not has_renderer:
        lines += _ALWAYS_GEMMA4
    if has_renderer and known is not None:
        # The variants' names are meant to be told: https://github.com/ollama/ollama/pull/15612. By itself Ollama
        # guesses from the number of parameters.
        lines += [f"TEMPLATE {PLAIN}", f"RENDERER {known.name}", "PARSER gemma4", _stop(known.close)]
    elif known is not None:
        lines += [f'TEMPLATE """{go_template(known)}"""', _stop(known.close), _stop(known.open)]
    elif chat_template is None:
        lines.append(f"TEMPLATE {PLAIN}")
    else:
        lines += _UNKNOWN_TEMPLATE
    lines += _sampling(generation or {})
    lines.append(f'LICENSE """{terms.name}\n{terms.link}"""')
    return "\n".join(lines) + "\n"


def needs_new_ollama(model_type: str, *, has_projector: bool) -> bool:
    """Whether it takes Ollama `MIN_OLLAMA` or newer to run it."""
    return has_projector or model_type.startswith(_GEMMA4)


def go_template(form: ChatFormat) -> str:
    """The same format in Ollama's template language. A last message of the assistant is continued, as Ollama does;
    content is taken as it is, where most Jinja templates trim it.

    `.System` holds all system messages; they are among `.Messages`, too. Source: `collate` in
    https://github.com/ollama/ollama/blob/main/template/template.go, and
    https://github.com/ollama/ollama/blob/main/template/gemma3-instruct.gotmpl
    """
    system = "" if form.folds_system else _SYSTEM_TURN
    first, folded = (_FOLD, _FOLDED) if form.folds_system else ("", "")
    text = _GO.replace("SYSTEM_TURN", system).replace("FIRST", first).replace("FOLDED", folded)
    words = {"OPEN": form.open, "CLOSE": form.close, "ASSISTANT": form.assistant, "ANSWER": form.answer}
    return re.sub("|".join(words), lambda word: words[word.group()], text)


def checked(name: str) -> str:
    """The name of a GGUF file, as it is.

    Raises:
        ValueError: it is not of the form `GGUF_NAME`.
    """
    if GGUF_NAME.fullmatch(name) is None:
        raise ValueError(f"{name[:80]!r} is no file name for a GGUF: expected {GGUF_NAME.pattern}; use markdown.slug.")
    return name


def _stop(token: str) -> str:
    return f'PARAMETER stop "{token}"'


_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_k": (0, 1 << 20),
    "top_p": (0, 1),
    "min_p": (0, 1),
}
"""Ollama's parameters that generation_config.json has under the same name, with their least and greatest values."""


def _sampling(generation: Mapping[str, Any]) -> list[str]:
    """How the model itself wants to be sampled, where it does. Unless it is said, the temperature is 1 in transformers
    and 0.8 in Ollama. Source: https://huggingface.co/docs/transformers/main_classes/text_generation"""
    if generation.get("do_sample") is not True:
        return []
    said = {"temperature": 1.0, **{key: value for key, value in generation.items() if value is not None}}
    lines = []
    for key, (least, greatest) in _LIMITS.items():
        value = said.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= greatest:
            lines.append(f"PARAMETER {key} {int(value) if key == 'top_k' else value}")
    return lines


_ALWAYS_GEMMA4 = (
    "# Ollama gives every Gemma 4 its own chat format, and this model has another or none: ask it with raw prompts",
    '# ("raw": true in /api/generate), or run it with llama.cpp.',
)
_UNKNOWN_TEMPLATE = (
    "# gemma-export does not know the model's own chat template; Ollama may. If the answers are odd, write a TEMPLATE",
    "# here, or run the model with llama.cpp, which reads the original.",
)

_SYSTEM_TURN = """
{{- if eq $message.Role "system" }}OPENsystem
{{ $message.Content }}CLOSE
{{ end }}"""
_FOLD = """
{{- $system := .System }}"""
_FOLDED = """{{ if $system }}{{ $system }}

{{ $system = "" }}{{ end }}"""
_GO = """FIRST
{{- range $i, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}SYSTEM_TURN
{{- if eq $message.Role "user" }}OPENuser
FOLDED{{ $message.Content }}CLOSE
{{ end }}
{{- if eq $message.Role "assistant" }}OPENASSISTANT
{{ $message.Content }}{{ if not $last }}CLOSE
{{ end }}
{{- else if $last }}OPENASSISTANT
ANSWER{{ end }}
{{- end }}"""
