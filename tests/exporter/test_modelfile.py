"""The Modelfile: Ollama's prompts are those of the model's own chat template, and nothing from outside adds a line."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.chat_format import FORMATS, GEMMA, GEMMA4_LARGE, GEMMA4_SMALL, ChatFormat, chat_format
from exporter.demo import CHAT_TEMPLATE as DEMO_TEMPLATE
from exporter.gemma import FAMILIES
from exporter.markdown import slug
from exporter.modelfile import go_template, modelfile
from tests.exporter import ollama

USER = (("user", "Hi"),)
CHAT = (("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"))
SYSTEM = (("system", "Be brief."), *CHAT)

# As the families' own do, in short: they write these turns, trim what is said, and insist on who speaks when.
TEMPLATES = {
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
        {%- for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}
        {{- m['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}
        {%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "gemma3": """{{ bos_token }}{% set said = namespace(before='') %}
        {%- for m in messages %}{% if m['role'] == 'system' %}{% set said.before = m['content'] + '\n\n' %}{% else %}
        {{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + said.before }}
        {{- m['content'] | trim }}{{ '<end_of_turn>\n' }}{% set said.before = '' %}{% endif %}{% endfor %}
        {%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "gemma4": """{{ bos_token }}{%- for m in messages %}
        {{- '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}
        {{- m['content'] | trim }}{{ '<turn|>\n' }}{% endfor %}
        {%- if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}""",
    "gemma4_large": """{{ bos_token }}{%- for m in messages %}
        {{- '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}
        {{- m['content'] | trim }}{{ '<turn|>\n' }}{% endfor %}
        {%- if add_generation_prompt %}{{ '<|turn>model\n<|channel>thought\n<channel|>' }}{% endif %}""",
    "chatml": """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
        {%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
}


def read(model_type: str, template: str | None, **options: Any) -> dict[str, list[str]]:
    """What Ollama reads of the Modelfile: of each command, the values."""
    found: dict[str, list[str]] = {}
    for name, value in ollama.commands(modelfile("a-Q8_0.gguf", model_type, chat_template=template, **options)):
        found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("gemma", "gemma"), ("gemma2", "gemma"), ("gemma3", "gemma3"), ("gemma3_text", "gemma3"), ("gemma3n", "gemma3")],
)
def test_ollama_writes_what_gemmas_own_template_writes(model_type: str, name: str) -> None:
    """The system's message begins the user's first turn, as Google says that it should where there is no such role."""
    found = read(model_type, TEMPLATES[name])
    (template,) = found["template"]
    assert ollama.prompt(template, USER) == "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert ollama.prompt(template, CHAT) == (
        "<start_of_turn>user\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    assert ollama.prompt(template, SYSTEM) == (
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    assert found["parameter stop"] == ["<end_of_turn>", "<start_of_turn>"]
    assert "renderer" not in found
    assert "requires" not in found


@pytest.mark.parametrize(("name", "renderer"), [("gemma4", "gemma4-small"), ("gemma4_large", "gemma4-large")])
@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_text", "gemma4_unified"])
def test_gemma_4_has_the_renderer_that_ollama_has_for_its_template(model_type: str, name: str, renderer: str) -> None:
    """The larger models' template begins an answer with an empty thought, the smaller ones' does not."""
    found = read(model_type, TEMPLATES[name])
    assert found["renderer"] == [renderer]
    assert found["parser"] == ["gemma4"]
    assert found["template"] == ["{{ .Prompt }}"]
    assert found["parameter stop"] == ["<turn|>"]
    assert found["requires"] == ["0.30.0"]


def test_a_template_for_every_role_gives_the_system_a_turn() -> None:
    found = read("gemma3_text", DEMO_TEMPLATE)
    assert ollama.prompt(found["template"][0], SYSTEM[:2]) == (
        "<start_of_turn>system\nBe brief.<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_base_model_trained_on_chatml_chats_in_it() -> None:
    found = read("gemma2", TEMPLATES["chatml"])
    assert ollama.prompt(found["template"][0], SYSTEM[:2]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found["parameter stop"] == ["<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_without_a_chat_template_the_prompt_is_passed_on_as_it_is(model_type: str) -> None:
    found = read(model_type, None)
    assert found["template"] == ["{{ .Prompt }}"]
    assert ollama.prompt(found["template"][0], (("user", "Once upon"),)) == "Once upon"
    assert "parameter stop" not in found
    assert "renderer" not in found


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages",
        "{{ raise_exception('never') }}",
        "{{ 1 // 0 }}",
        "{{ messages.nothing.at_all }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'a' %}",
        TEMPLATES["gemma"].replace("'<start_of_turn>' +", "'<start_of_turn>the ' +"),
        TEMPLATES["gemma3"].replace("+ '\n\n'", "+ '\n'"),
        TEMPLATES["gemma3"] + "{{ 'x' }}",
        TEMPLATES["gemma4"].replace("<turn|>", "<turn_end>"),
    ],
)
def test_a_template_that_is_not_known_is_left_to_ollama(template: str) -> None:
    """Of another format than its model was trained in, a template is worse than none."""
    text = modelfile("a.gguf", "gemma3", chat_template=template)
    assert {"template", "parameter stop"}.isdisjoint(name for name, _ in ollama.commands(text))
    assert "# gemma-export does not know the model's own chat template" in text


@pytest.mark.parametrize("template", [None, TEMPLATES["gemma3"], "{{ messages }}"])
def test_a_gemma_4_with_no_format_of_its_familys_is_warned_of(template: str | None) -> None:
    """Ollama has one renderer for the architecture, whatever a Modelfile says."""
    text = modelfile("a.gguf", "gemma4", chat_template=template)
    assert "# Ollama gives every Gemma 4 its own chat format" in text
    assert "RENDERER" not in text


def test_a_projector_is_a_second_file_of_the_model() -> None:
    found = read("gemma3", TEMPLATES["gemma3"], mmproj_name="mmproj-a-F16.gguf")
    assert found["from"] == ["./a-Q8_0.gguf", "./mmproj-a-F16.gguf"]
    assert found["requires"] == ["0.30.0"]


@pytest.mark.parametrize(
    ("generation", "parameters"),
    [
        (None, {}),
        ({}, {}),
        ({"top_k": 64}, {}),
        ({"do_sample": False, "top_k": 64}, {}),
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"temperature": "1.0", "top_k": "64", "top_p": "0.95"}),
        ({"do_sample": True, "temperature": 0.7, "min_p": 0}, {"temperature": "0.7", "min_p": "0"}),
        ({"do_sample": True, "temperature": "1\nFROM x", "top_k": True, "top_p": float("nan"), "min_p": 1e9}, {}),
        ({"do_sample": True, "temperature": None, "top_k": [64]}, {"temperature": "1.0"}),
    ],
)
def test_it_samples_as_the_model_says(generation: dict[str, Any] | None, parameters: dict[str, str]) -> None:
    found = read("gemma3", None, generation=generation)
    assert {
        key.removeprefix("parameter "): value[0] for key, value in found.items() if "parameter" in key
    } == parameters


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_family_passes_on_its_licence(model_type: str) -> None:
    terms = FAMILIES[model_type].license
    assert read(model_type, None)["license"] == [f"{terms.name}\n{terms.link}"]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@given(
    said=st.lists(st.text("ab \n", min_size=1).filter(lambda text: text == text.strip()), min_size=1, max_size=5),
    system=st.none() | st.sampled_from(["Be brief.", "One.\n\nTwo."]),
)
def test_every_formats_go_template_writes_the_format(form: ChatFormat, said: Sequence[str], system: str | None) -> None:
    said = said if len(said) % 2 else said[1:] or ["a"]
    chat = [(("user", "assistant")[at % 2], text) for at, text in enumerate(said)]
    if system is not None:
        chat.insert(0, ("system", system))
    assert ollama.prompt(go_template(form), chat) == form.prompt(chat)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_an_answer_that_was_begun_is_continued(form: ChatFormat) -> None:
    written = ollama.prompt(go_template(form), CHAT[:2])
    assert written.endswith(f"{form.open}{form.assistant}\nHello.")


def test_templates_are_known_by_what_they_write() -> None:
    known = {name: chat_format(template) for name, template in TEMPLATES.items()}
    assert known["gemma"] == known["gemma3"] == GEMMA
    assert (known["gemma4"], known["gemma4_large"]) == (GEMMA4_SMALL, GEMMA4_LARGE)
    assert known["chatml"] is FORMATS[-1]


@pytest.mark.parametrize(
    "name", ["a.gguf\nSYSTEM x", "a\r.gguf", 'a".gguf', "a b.gguf", "../a.gguf", "/a.gguf", "-a.gguf", "a.bin", ".gguf"]
)
def test_a_name_that_could_add_a_line_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no file name for a GGUF"):
        modelfile(name, "gemma", chat_template=None)
    with pytest.raises(ValueError, match="is no file name for a GGUF"):
        modelfile("a.gguf", "gemma", chat_template=None, mmproj_name=name)


@given(base_id=st.text(max_size=200))
def test_any_bases_slug_is_a_name(base_id: str) -> None:
    name = f"mmproj-{slug(base_id)}-Q4_K_M.gguf"
    assert ollama.commands(modelfile(name, "gemma", chat_template=None))[0] == ("from", f"./{name}")
    assert modelfile(f"{slug(base_id)}.gguf", "gemma", chat_template=None)
