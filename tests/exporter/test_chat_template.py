"""Chat templates are rendered as transformers renders them, and a hostile one ends within its limits."""

import time
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from dispatcher.errors import SourceError
from exporter import template_run
from exporter.chat_template import MAX_TEMPLATE, render
from exporter.demo import CHAT_TEMPLATE
from exporter.limited import limits
from exporter.llama_corpus import CONVERSATIONS
from tests.exporter.exporting import export_gguf_of
from tests.exporter.test_modelfile import TEMPLATES
from tests.gemmas.llama import llama_adapter, llama_base

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
GROWING = "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CONSTRUCTS = {
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ '<&\\'é' | tojson }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{{ bos_token }}{% endgeneration %}\n{{ a }}",
    "blocks": "  {% if true %}\n  x\n  {%- endif %}\n\ny\n",
    "absent": "{{ tools is none }}{{ documents is none }}{{ strftime_now is defined }}{{ enable_thinking is defined }}",
    "refusal": "{{ raise_exception('no') }}",
    "mutation": "{{ messages.append(1) }}",
    "attributes": "{{ messages.__class__.__mro__ }}",
}


def _by_transformers(template: str, messages: list[dict[str, Any]], *, begin: bool) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=begin, **TOKENS)
    except (TemplateError, TypeError, ValueError):
        return None
    return str(text)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, *TEMPLATES.values(), *CONSTRUCTS.values()])
def test_a_template_makes_what_it_makes_in_transformers(template: str) -> None:
    """Of every conversation, with every construct that transformers adds to Jinja."""
    for turns in CONVERSATIONS:
        for begin in (False, True):
            prompt = {**TOKENS, "messages": turns, "add_generation_prompt": begin}
            (found,) = template_run.answer({"template": template, "prompts": [prompt]})["rendered"]
            assert found == _by_transformers(template, turns, begin=begin)


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (LOOP, "chat_template_too_slow"),
        ("{{ lipsum(n=10 ** 7) }}", "chat_template_too_slow"),
        ("{{ 10 ** (10 ** 9) }}", "chat_template_too_slow"),
        ("{{ 'a' * 10 ** 9 }}", "chat_template_too_large"),
        ("{{ [0] * 10 ** 9 }}", "chat_template_too_large"),
        ("{{ '%99999999d' | format(1) }}", "chat_template_too_large"),
        (GROWING, "chat_template_too_large"),
        ("x" * (MAX_TEMPLATE + 1), "chat_template_too_large"),
    ],
    ids=lambda value: value[:24],
)
def test_a_template_that_takes_time_or_memory_is_refused(template: str, code: str) -> None:
    """In seconds, and this process goes on."""
    started = time.monotonic()
    with pytest.raises(SourceError) as refused:
        render(template, [{"messages": []}])
    assert refused.value.error_code == code
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ 1 // 0 }}",
        "{{" + "(" * 9000,
    ],
    ids=lambda value: value[:24],
)
def test_a_template_that_reaches_out_of_its_sandbox_gets_nothing(template: str) -> None:
    """It counts as one that refuses the chat."""
    assert render(template, [{"messages": []}]) == [None]


def test_limits_end_with_the_work() -> None:
    """What this process may take afterwards is what it might before."""
    import resource

    before = [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)]
    with pytest.raises(MemoryError), limits():
        bytearray(1 << 32)
    assert [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)] == before


def test_a_gguf_of_a_template_that_loops_is_refused(tmp_path: Path) -> None:
    """What would hang every server that loads it is not published, and nothing is left of it."""
    base = llama_base("gemma3_text", tmp_path / "base")
    llama_adapter("gemma3_text", base, tmp_path / "adapter")
    (base / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(SourceError) as refused:
        export_gguf_of(base, tmp_path / "adapter", tmp_path / "store", ["q8_0"])
    assert refused.value.error_code == "chat_template_too_slow"
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
