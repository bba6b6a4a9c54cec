"""The chat template of a merged model renders as the adapter's own, wherever trainers keep it; else as the base's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from dispatcher.errors import SourceError
from exporter.sidefiles import side_files
from tests.exporter.exporting import merged_into
from tests.gemmas import make_adapter, save_base

OWN = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"
OTHER = "{% for message in messages %}other: {{ message['content'] }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "bring me the lantern"}]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

Arrange = Callable[[Path], None]


def as_file(template: str) -> Arrange:
    """As transformers 5 saves it."""

    def arrange(directory: Path) -> None:
        (directory / "chat_template.jinja").write_text(template)

    return arrange


def inside(template: object) -> Arrange:
    """As transformers 4 saved it: in the tokenizer's config, and nowhere else."""

    def arrange(directory: Path) -> None:
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))

    return arrange


def of_the_processor(template: str) -> Arrange:
    """As processors had it up to transformers 4.50, beside the tokenizer's own."""

    def arrange(directory: Path) -> None:
        inside(template)(directory)
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))

    return arrange


def nowhere(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink(missing_ok=True)


CASES = {
    "file over file": (as_file(OTHER), True, as_file(OWN)),
    "inside over file": (as_file(OTHER), True, inside(OWN)),
    "file over inside": (inside(OTHER), True, as_file(OWN)),
    "file without a tokenizer over inside": (inside(OTHER), False, as_file(OWN)),
    "file over the processor's": (of_the_processor(OTHER), True, as_file(OWN)),
    "inside over the processor's": (of_the_processor(OTHER), True, inside(OWN)),
    "the processor's over file": (as_file(OTHER), True, of_the_processor(OWN)),
    "one of several": (
        as_file(OTHER),
        True,
        inside([{"name": "tool_use", "template": OTHER}, {"name": "default", "template": OWN}]),
    ),
    "the base's file": (as_file(OWN), True, nowhere),
    "the base's inside": (inside(OWN), True, nowhere),
    "the base's, adapter without a tokenizer": (inside(OWN), False, nowhere),
}


@pytest.mark.parametrize(("of_base", "has_tokenizer", "of_adapter"), CASES.values(), ids=CASES)
def test_the_template_renders_as_the_adapters_or_else_the_bases(
    of_base: Arrange, has_tokenizer: bool, of_adapter: Arrange, tmp_path: Path
) -> None:
    """For the tokenizer and for the processor, which look in different places."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = save_base("gemma3", base)
    make_adapter("gemma3", model, adapter, targets=["q_proj"])
    if has_tokenizer:
        for name in TOKENIZER:
            shutil.copy(base / name, adapter / name)
    of_base(base)
    of_adapter(adapter)
    merged = merged_into(base, adapter, tmp_path / "store")
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    processor = transformers.AutoProcessor.from_pretrained(merged)
    own = "[user] bring me the lantern"
    assert rendered(tokenizer) == own
    assert rendered(processor) == own
    if has_tokenizer and of_adapter is not nowhere:
        assert rendered(transformers.AutoTokenizer.from_pretrained(adapter)) == own


def rendered(renderer: Any) -> str:
    return str(renderer.apply_chat_template(MESSAGES, tokenize=False))


def test_further_templates_come_with_the_one_they_belong_to(tmp_path: Path) -> None:
    for name, template in (("base", OTHER), ("adapter", OWN)):
        folder = tmp_path / name / "additional_chat_templates"
        folder.mkdir(parents=True)
        (folder / f"of_{name}.jinja").write_text(template)
        as_file(template)(tmp_path / name)
    found = side_files(tmp_path / "base", tmp_path / "adapter")
    assert found == {
        name: tmp_path / "adapter" / name
        for name in ("chat_template.jinja", "additional_chat_templates/of_adapter.jinja")
    }


def test_no_template_anywhere_makes_none(tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
    assert side_files(tmp_path / "base", tmp_path / "adapter") == {
        "tokenizer_config.json": tmp_path / "adapter" / "tokenizer_config.json"
    }


@pytest.mark.parametrize("content", ["[]", "{", '{"chat_template": "\\ud800"}'])
def test_a_tokenizer_config_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(content)
    with pytest.raises(SourceError) as refusal:
        side_files(tmp_path / "base", tmp_path / "adapter")
    assert refusal.value.error_code == "side_file_invalid"
