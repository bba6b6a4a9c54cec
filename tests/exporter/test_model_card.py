"""The model card: what the hub reads of it, what it says, and that nothing from outside can break it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from exporter.architecture import use_of
from exporter.gemma import FAMILIES, USES
from exporter.model_card import CARD_NAME, CardFacts, model_card
from tests.exporter.exporting import export, merged_into
from tests.exporter.place import Place
from tests.gemmas import make_adapter, save_base

FACTS = CardFacts(
    base_id="google/gemma-3-4b-it",
    base_revision="093f9f388b31de276ce2de164bdc2081324b9767",
    trained_fingerprint="5" * 64,
    is_merged=True,
    engine="streaming",
    engine_version="1+torch-2.13.0",
    config={"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
    tensors={"merged": 238, "copied": 645, "towers": {"vision": {"merged": 2}}},
    verified={"files": 2, "worst_error_ulp": 0.5003},
    files=frozenset({"config.json", "chat_template.jinja", "processor_config.json", "tokenizer.json"}),
)


def card(**changes: object) -> str:
    return model_card(dataclasses.replace(FACTS, **changes))  # type: ignore[arg-type]  # of whichever field


def front_matter(text: str) -> dict[str, Any]:
    """What the hub's own client reads of a card."""
    data: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]  # it has no types
    return data


def test_the_hub_reads_what_it_was_made_from_and_how_it_is_used() -> None:
    data = front_matter(card())
    assert data == {
        "library_name": "transformers",
        "license": "gemma",
        "base_model": "google/gemma-3-4b-it",
        "base_model_relation": "finetune",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gemma", "gemma3", "lora", "merged", "gemma-export"],
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_family_says_its_own_licence(model_type: str) -> None:
    """Gemma 4 is under Apache 2.0, all before it under Google's own terms."""
    text = card(config={"model_type": model_type})
    data = front_matter(text)
    apache = model_type.startswith("gemma4")
    assert data["license"] == ("apache-2.0" if apache else "gemma")
    assert ("Gemma is provided under and subject to the Gemma Terms of Use" in text) is not apache
    assert ("https://ai.google.dev/gemma/apache_2" in text) is apache
    assert "Notice of modification" in text


def test_the_card_tells_counts_checks_engine_and_adapter() -> None:
    text = card()
    for row in (
        "| merged | `238` |",
        "| copied | `645` |",
        "| towers vision merged | `2` |",
        "| worst error ulp | `0.5003` |",
        f"| revision | `{FACTS.base_revision}` |",
        f"| adapter fingerprint | `{'5' * 64}` |",
        "| engine | `streaming 1+torch-2.13.0` |",
    ):
        assert row in text.splitlines()


@pytest.mark.parametrize(
    ("base_id", "revision"),
    [
        ("/home/ann/models/secret/gemma-mine", "x"),
        ("file:///home/ann/gemma-mine", "x"),
        ("home/gemma-mine", "directory:0"),
    ],
)
def test_a_base_in_a_directory_is_told_by_its_last_name_only(base_id: str, revision: str) -> None:
    text = card(base_id=base_id, base_revision=revision)
    assert "home" not in text
    assert "base_model" not in front_matter(text)
    assert "| base model | `gemma-mine (a directory)` |" in text
    assert "# gemma-mine-merged" in text.splitlines()


@pytest.mark.parametrize("base_id", ["no", "1e5", "007", "google/gemma-2-2b", "null"])
def test_an_id_that_yaml_takes_for_something_else_stays_an_id(base_id: str) -> None:
    assert front_matter(card(base_id=base_id))["base_model"] == base_id


HOSTILE = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "a\n---\nlicense: mit",
            "x`|`y](javascript:1)",
            "```\n$(rm -rf /)",
            "--- \u2028 a: b",
            "'; reboot; '",
            "<script>",
            "../..",
            "\\",
            "a/b/c\t| d",
        ]
    ),
)


@given(base_id=HOSTILE, revision=HOSTILE, fingerprint=HOSTILE, engine=HOSTILE, key=HOSTILE, value=HOSTILE)
def test_nothing_from_outside_can_break_the_card(
    base_id: str, revision: str, fingerprint: str, engine: str, key: str, value: str
) -> None:
    """Same front matter keys, same headings, same fences, same tables, whatever the values are."""
    plain = card()
    text = card(
        base_id=base_id,
        base_revision=revision,
        trained_fingerprint=fingerprint,
        engine=engine,
        engine_version=engine,
        config={"model_type": "gemma3", "architectures": [f"{value}ForConditionalGeneration"]},
        tensors={key: value, "merged": [value]},
        verified={value: {key: value}},
    )
    data = front_matter(text)
    assert {"base_model", "base_model_relation"} | data.keys() == front_matter(plain).keys()
    assert data["license"] == "gemma"
    assert data.get("base_model") in (None, base_id)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        line for line in plain.splitlines() if line.startswith("## ")
    ]
    assert text.count("```") == plain.count("```")
    assert text.isascii()
    for line in text.splitlines():
        if line.startswith("| ") and line != "| | |":
            assert re.fullmatch(r"\| [A-Za-z0-9 ?]* \| `[^`|]+` \|", line), line
    (shell,) = re.findall(r"^vllm serve .*$", text, re.MULTILINE)
    assert re.fullmatch(r"vllm serve path/to/this/directory --served-model-name [A-Za-z0-9][A-Za-z0-9.-]*", shell)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_familys_auto_class_loads_its_class(model_type: str) -> None:
    """The table says what the installed library's own mappings say."""
    architecture = FAMILIES[model_type].architecture
    auto = getattr(transformers, use_of(architecture).auto_class)
    config = getattr(transformers, architecture).config_class
    assert auto._model_mapping[config].__name__ == architecture


@pytest.mark.parametrize("use", USES.values())
def test_every_auto_class_is_one_of_the_librarys(use: object) -> None:
    assert hasattr(transformers, getattr(use, "auto_class"))  # noqa: B009  # typed as object for the test's id


@pytest.mark.parametrize(
    ("files", "blocks", "asked"),
    [
        (FACTS.files, 2, "/v1/chat/completions"),
        (FACTS.files - {"chat_template.jinja"}, 1, "/v1/completions"),
        (FACTS.files - {"processor_config.json"}, 1, "/v1/chat/completions"),
    ],
)
def test_only_what_the_files_allow_is_shown(files: frozenset[str], blocks: int, asked: str) -> None:
    text = card(files=files)
    assert text.count("```python") == blocks
    assert f"http://localhost:8000{asked} " in text


def test_a_classifier_is_shown_as_one() -> None:
    text = card(config={"model_type": "gemma2", "architectures": ["Gemma2ForSequenceClassification"]})
    assert "AutoModelForSequenceClassification.from_pretrained" in text
    assert "generate" not in text
    assert front_matter(text)["pipeline_tag"] == "text-classification"


@pytest.mark.parametrize("engine", ["streaming", "peft"])
def test_every_artifact_has_the_card_in_its_manifest_and_no_one_elses(engine: str, place: Place) -> None:
    """Trainers write a README.md beside the adapter, and the hub has one beside each base."""
    for source in ("base", "adapter"):
        (place.root / source / CARD_NAME).write_text(f"the {source}'s own card")
    merged = merged_into(place.root / "base", place.root / "adapter", place.root / "store", engine=engine)
    text = (merged / CARD_NAME).read_text()
    assert "own card" not in text
    assert f"| engine | `{engine} " in text
    assert str(place.root) not in text
    listed = {entry["name"]: entry["bytes"] for entry in json.loads((merged / "export.json").read_text())["files"]}
    assert listed[CARD_NAME] == (merged / CARD_NAME).stat().st_size


def test_a_whole_model_is_not_called_merged() -> None:
    text = card(is_merged=False, engine="passthrough")
    assert "Notice of modification: the weights were changed from the base's by fine-tuning." in text
    assert f"| model fingerprint | `{'5' * 64}` |" in text
    assert "gemma-3-4b-it-fine-tuned" in text
    assert "merging" not in text
    assert {"lora", "merged"}.isdisjoint(front_matter(text)["tags"])


@pytest.mark.parametrize("declared", [None, [], "Gemma3ForCausalLM", [1], ["x`y"], ["A", "B"]])
def test_without_a_class_in_the_config_it_is_the_familys(declared: object) -> None:
    text = card(config={"model_type": "gemma3", "architectures": declared})
    assert "| class | `Gemma3ForConditionalGeneration` |" in text


def test_two_exports_of_the_same_have_the_same_card(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    first = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "one")
    second = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "two")
    assert (first / CARD_NAME).read_bytes() == (second / CARD_NAME).read_bytes()


def test_the_card_counts_what_the_export_counted(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    result = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    text = (Path(result.artifact.uri.removeprefix("file://")) / CARD_NAME).read_text()
    assert f"| merged | `{result.summary['merged']}` |" in text
    assert f"| copied | `{result.summary['copied']}` |" in text
