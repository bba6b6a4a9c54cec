"""The card of a GGUF: what the hub reads of it, how it says to run the files, and that nothing can break it."""

import dataclasses
import re
import shlex
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from exporter.gemma import FAMILIES
from exporter.gguf_card import GgufEntry, GgufFacts, gguf_card
from exporter.markdown import slug

MODEL = GgufEntry(
    "gemma-3-4b-it-Q4_K_M.gguf", "Q4_K_M", size=2_489_894_016, tensor_bytes=2_377_000_000, weights=3_880_000_000
)
PROJECTOR = GgufEntry(
    "mmproj-gemma-3-4b-it-F16.gguf", "F16", size=851_251_104, tensor_bytes=840_000_000, weights=420_000_000
)
FACTS = GgufFacts(
    base_id="google/gemma-3-4b-it",
    base_revision="093f9f388b31de276ce2de164bdc2081324b9767",
    trained_fingerprint="5" * 64,
    is_merged=True,
    engine="streaming",
    engine_version="1+torch-2.13.0",
    config={"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
    tensors={"merged": 238, "copied": 645},
    verified={"tokens": {"texts": 12}, "worst_logit_error": 0.13},
    files=frozenset({"Modelfile"}),
    model=MODEL,
    projector=PROJECTOR,
    has_template=True,
    converter="llama-cpp-python 0.3.36",
)


def card(**changes: object) -> str:
    return gguf_card(dataclasses.replace(FACTS, **changes))  # type: ignore[arg-type]  # of whichever field


def front_matter(text: str) -> dict[str, Any]:
    """What the hub's own client reads of a card."""
    data: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]  # it has no types
    return data


def shell(text: str) -> list[list[str]]:
    """The words of each command of the card, as a shell reads them."""
    blocks = re.findall(r"^```sh\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]


def command(text: str, program: str) -> list[str]:
    (found,) = (words for words in shell(text) if words[0] == program)
    return found


def test_the_hub_reads_that_it_is_a_gguf_of_a_finetuned_model() -> None:
    """Not a quantization of its base, whose weights it does not have."""
    assert front_matter(card()) == {
        "library_name": "gguf",
        "license": "gemma",
        "base_model": "google/gemma-3-4b-it",
        "base_model_relation": "finetune",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gemma", "gemma3", "gguf", "llama-cpp", "lora", "gemma-export"],
    }


def test_without_a_projector_it_generates_from_text_alone() -> None:
    text = card(projector=None)
    assert front_matter(text)["pipeline_tag"] == "text-generation"
    assert "mmproj" not in text
    assert "image" not in text


def test_each_file_is_listed_with_its_size_and_bits_per_weight() -> None:
    lines = card().splitlines()
    assert "| `gemma-3-4b-it-Q4_K_M.gguf` | `Q4_K_M` | 2.49 GB | 4.90 |" in lines
    assert "| `mmproj-gemma-3-4b-it-F16.gguf` | `F16` | 851.25 MB | 16.00 |" in lines
    assert "| worst logit error | `0.13` |" in lines
    assert "| converter | `llama-cpp-python 0.3.36` |" in lines


@pytest.mark.parametrize(("size", "shown"), [(999, "999 bytes"), (1000, "1.00 kB"), (48_500_000, "48.50 MB")])
def test_small_files_have_small_units(size: int, shown: str) -> None:
    assert f"| {shown} |" in card(model=dataclasses.replace(MODEL, size=size))


def test_it_says_how_to_chat_and_to_show_an_image() -> None:
    text = card()
    model, projector = MODEL.name, PROJECTOR.name
    assert command(text, "llama-cli") == ["llama-cli", "-m", model, "-c", "8192", "--jinja"]
    assert command(text, "llama-mtmd-cli") == [
        *("llama-mtmd-cli", "-m", model, "-c", "8192", "--jinja", "--mmproj", projector),
        *("--image", "path/to/image.png", "-p", "What is this?"),
    ]
    assert command(text, "llama-server") == [
        *("llama-server", "-m", model, "-c", "8192", "--jinja", "--mmproj", projector)
    ]
    assert command(text, "curl")[1] == "http://localhost:8080/v1/chat/completions"
    assert [words[1:] for words in shell(text) if words[0] == "ollama"] == [
        ["create", "gemma-3-4b-it-merged", "-f", "Modelfile"],
        # Ollama takes a path for an image where it begins with ./ or /
        ["run", "gemma-3-4b-it-merged", "What is this? ./path/to/image.png"],
    ]
    assert [words[2] for words in shell(text) if words[0] == "lms"] == [model, projector]


def test_a_model_without_a_chat_template_continues_a_text() -> None:
    """Neither llama-cli nor llama-mtmd-cli runs without one."""
    text = card(has_template=False)
    assert {"llama-cli", "llama-mtmd-cli"}.isdisjoint(words[0] for words in shell(text))
    assert command(text, "llama-completion")[-5:] == ["-no-cnv", "-n", "64", "-p", "Once upon a time"]
    assert command(text, "curl")[1] == "http://localhost:8080/v1/completions"


@pytest.mark.parametrize(
    ("model_type", "projector", "is_new"),
    [("gemma3", PROJECTOR, True), ("gemma3", None, False), ("gemma4_text", None, True), ("gemma2", None, False)],
)
def test_it_says_where_only_a_newer_ollama_will_do(model_type: str, projector: GgufEntry | None, is_new: bool) -> None:
    assert ("Ollama 0.30.0" in card(config={"model_type": model_type}, projector=projector)) is is_new


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_family_says_its_own_licence_and_what_was_changed(model_type: str) -> None:
    text = card(config={"model_type": model_type})
    terms = FAMILIES[model_type].license
    assert front_matter(text)["license"] == terms.tag
    assert terms.duties in text
    assert "by merging a fine-tuned adapter into them, and by converting them to GGUF." in text


def test_a_whole_model_is_not_called_merged() -> None:
    text = card(is_merged=False)
    assert "# gemma-3-4b-it-fine-tuned-GGUF" in text.splitlines()
    assert "by fine-tuning, and by converting them to GGUF." in text
    assert "LoRA" not in text
    assert "lora" not in front_matter(text)["tags"]


def test_a_base_in_a_directory_is_told_by_its_last_name_only() -> None:
    text = card(base_id="/home/ann/gemma-mine", base_revision="directory:0")
    assert "home" not in text
    assert "base_model" not in front_matter(text)


def test_the_same_facts_have_the_same_card() -> None:
    assert card() == card()
    assert not re.search(r"\b20\d\d-\d\d", card())


HOSTILE = st.one_of(
    st.text(max_size=120),
    st.sampled_from(
        [
            "a\n---\nlicense: mit",
            "x`|`y](javascript:1)",
            "```\n$(rm -rf /)",
            "'; reboot; '",
            "a/-rf",
            "--help",
            "x" * 300,
            "1e5",
        ]
    ),
)


@given(base_id=HOSTILE, revision=HOSTILE, key=HOSTILE, value=HOSTILE)
def test_nothing_from_outside_can_break_the_card(base_id: str, revision: str, key: str, value: str) -> None:
    """Same headings, same fences, same commands, whatever the values are; the files are named after the base."""
    plain = card()
    stem = slug(base_id)
    text = card(
        base_id=base_id,
        base_revision=revision,
        trained_fingerprint=value,
        engine=value,
        config={"model_type": "gemma3", "architectures": [value]},
        tensors={key: value},
        verified={value: {key: value}},
        converter=value,
        model=dataclasses.replace(MODEL, name=f"{stem}-Q4_K_M.gguf", quantization=value),
        projector=dataclasses.replace(PROJECTOR, name=f"mmproj-{stem}-F16.gguf"),
    )
    data = front_matter(text)
    assert data["license"] == "gemma"
    assert data.get("base_model") in (None, base_id)
    assert text.isascii()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        line for line in plain.splitlines() if line.startswith("## ")
    ]
    assert text.count("```") == plain.count("```")
    assert [[words[0], len(words)] for words in shell(text)] == [[words[0], len(words)] for words in shell(plain)]
    for line in text.splitlines():
        if line.startswith("| ") and line != "| | |":
            assert re.fullmatch(r"\|( (`[^`|]+`|[A-Za-z0-9 .?]*) \|)+", line), line
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,79}", ollama_name(text))


def ollama_name(text: str) -> str:
    return next(words[2] for words in shell(text) if words[:2] == ["ollama", "create"])


@pytest.mark.parametrize("name", ["a.gguf; reboot", "a\n.gguf", "$(a).gguf", "-m.gguf", "a.bin"])
def test_a_name_that_a_shell_would_not_take_as_it_is_is_refused(name: str) -> None:
    for changes in (
        {"model": dataclasses.replace(MODEL, name=name)},
        {"projector": dataclasses.replace(MODEL, name=name)},
    ):
        with pytest.raises(ValueError, match="is no file name for a GGUF"):
            card(**changes)
