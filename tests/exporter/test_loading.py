"""What a user gets: the merged directory alone, offline, loads and speaks in transformers as its model card says."""

import importlib.util
import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers
from PIL import Image

from exporter import model_card
from tests.exporter.exporting import merged_into
from tests.gemmas import FAMILIES, load_model, make_adapter, save_base

REPRESENTATIVES = {"gemma2", "gemma3_text", "gemma3", "shieldgemma2", "paligemma", "gemma4", "gemma4_moe"}
NO_TIMM = pytest.mark.skipif(
    importlib.util.find_spec("timm") is not None, reason="the tests' gemma3n has a stand-in for timm's vision tower"
)


def _marks(family: str) -> list[pytest.MarkDecorator]:
    marks = [] if family in REPRESENTATIVES else [pytest.mark.full]
    return [*marks, NO_TIMM] if family == "gemma3n" else marks


EVERY_FAMILY = [pytest.param(family, marks=_marks(family)) for family in FAMILIES]
NEEDS_TORCHVISION = {"gemma4", "gemma4_unified"}
"""Their processors cannot even be imported without it; it is none of this project's dependencies."""
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any attempt to connect fails the test, also where a library would shrug it off."""
    attempts: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> NoReturn:
        attempts.append(address)
        raise OSError(f"no network here: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not attempts


def merged_alone(family: str, place: Path, *, template: str | None = None) -> Path:
    """A merged model of `family`, with base, adapter and store gone; `template` is that of the adapter's tokenizer."""
    model = save_base(family, place / "base", layout=FAMILIES[family].layouts[0])
    make_adapter(family, model, place / "adapter")
    if template is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(place / "adapter")
    merged = merged_into(place / "base", place / "adapter", place / "store")
    shutil.copytree(merged, place / "alone")
    for name in ("base", "adapter", "store"):
        shutil.rmtree(place / name)
    return place / "alone"


def card_of(directory: Path) -> str:
    return (directory / model_card.CARD_NAME).read_text()


def auto_class(directory: Path) -> Any:
    """The class that the model card loads the model with."""
    (name,) = set(re.findall(r"AutoModel\w+", card_of(directory)))
    return getattr(transformers, name)


def blocks_of(directory: Path) -> list[str]:
    """The python blocks of a model card."""
    return re.findall(r"```python\n(.*?)```", card_of(directory), re.DOTALL)


def run_block(block: str, directory: Path, image: Path) -> Any:
    """Run a block with its placeholders replaced; its `answer`."""
    code = block.replace(model_card.PATH, str(directory)).replace(model_card.IMAGE, str(image))
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102  # that it runs is what is tested
    return names["answer"]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_merged_model_alone_loads_whole_by_its_card(family: str, tmp_path: Path) -> None:
    directory = merged_alone(family, tmp_path)
    if family == "gemma3n":
        # Its vision tower is timm's, which needs torchvision; what can be loaded without is the text tower.
        with pytest.raises(ImportError, match="timm"):
            auto_class(directory).from_pretrained(directory)
        model = load_model(directory)
    else:
        model, info = auto_class(directory).from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        assert not set(info["unexpected_keys"]) - shared_keys(model)
        assert type(model).__name__ == json.loads((directory / "config.json").read_text())["architectures"][0]
    if model.can_generate():
        prompt = torch.arange(20, 26)[None]
        output = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert output.shape == (1, 9)


def shared_keys(model: Any) -> set[str]:
    """The keys and values of layers that share another's: hub checkpoints have them, transformers does not use them."""
    text = model.config.get_text_config()
    first = text.num_hidden_layers - getattr(text, "num_kv_shared_layers", 0)
    layers = range(first, text.num_hidden_layers)
    parts = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
    prefixes = ("model.layers", "model.language_model.layers")
    return {f"{prefix}.{layer}.self_attn.{part}" for prefix in prefixes for layer in layers for part in parts}


@pytest.mark.parametrize("template", [None, "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_merged_models_tokenizer_and_processor_load(family: str, template: str | None, tmp_path: Path) -> None:
    """And render a chat as the adapter's own template does, or else the base's; PaliGemma's base has none."""
    directory = merged_alone(family, tmp_path, template=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer("bring me the lantern").input_ids[0] == tokenizer.bos_token_id
    bases = "<bos><start_of_turn>user\nbring me the lantern<end_of_turn>\n"
    expected = None if family == "paligemma" and template is None else "[bring me the lantern]" if template else bases
    assert rendered(tokenizer) == expected
    if not FAMILIES[family].multimodal:
        return
    if family in NEEDS_TORCHVISION and not HAS_TORCHVISION:
        with pytest.raises(ModuleNotFoundError, match="Processor"):
            transformers.AutoProcessor.from_pretrained(directory)
        return
    processor = transformers.AutoProcessor.from_pretrained(directory)
    declared = json.loads((directory / "processor_config.json").read_text())["processor_class"]
    assert type(processor).__name__ == declared
    assert rendered(processor) == expected


def rendered(renderer: Any) -> str | None:
    """What a tokenizer or processor makes of a chat; None where it has no template."""
    if renderer.chat_template is None:
        return None
    return str(renderer.apply_chat_template([{"role": "user", "content": "bring me the lantern"}], tokenize=False))


# PaliGemma's processor turns a tensor into an array the way numpy 1 had it.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_snippet_of_the_card_runs(family: str, tmp_path: Path) -> None:
    directory = merged_alone(family, tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    blocks = blocks_of(directory)
    assert len(blocks) == {"gemma3": 2, "gemma3n": 2, "gemma4": 2, "gemma4_unified": 2}.get(family, 1)
    for block in blocks:
        if family == "gemma3n":
            with pytest.raises(ImportError, match="timm"):
                run_block(block, directory, tmp_path / "image.png")
        elif family in NEEDS_TORCHVISION and "AutoProcessor" in block and not HAS_TORCHVISION:
            with pytest.raises(ModuleNotFoundError, match="Processor"):
                run_block(block, directory, tmp_path / "image.png")
        else:
            answer = run_block(block, directory, tmp_path / "image.png")
            assert isinstance(answer, str) or answer.shape[1] == 2
