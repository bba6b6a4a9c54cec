"""`python -m exporter.template_run DIRECTORY`: renders a chat template as transformers does, and needs Jinja alone.

For `exporter.chat_template`, within the limits of `exporter.limited`.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exporter.limited import serve

MAX_TEXT = 1_000_000
"""Characters of a prompt"""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what the assistant says, and leaves the text as it is."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the request's `template` makes of each of its `prompts`: a text, or None where it refuses."""
    return {"rendered": [_rendered(request["template"], prompt) for prompt in request["prompts"]]}


def _rendered(template: str, variables: dict[str, Any]) -> str | None:
    try:
        text = environment().from_string(template).render(tools=None, documents=None, **variables)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # a template is a stranger's program: it refuses by an error, and may make any
        return None
    if len(text) > MAX_TEXT:
        raise MemoryError
    return text


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to a template. Source:
    https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py"""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return made


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now(UTC).astimezone().strftime(form)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), answer)
