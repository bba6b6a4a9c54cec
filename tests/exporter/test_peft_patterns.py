"""Patterns in an adapter's config: PEFT is given names, and applies what it would have applied."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dispatcher.errors import SourceError, Unsupported
from exporter.models import load_model
from exporter.peft_engine import read_for_peft
from exporter.peft_patterns import harmless_config
from exporter.sources import open_base
from tests.exporter.damage import edit_config
from tests.gemmas import make_adapter, save_base

BOMB = r"(([a-z_.0-9]+)+)+!"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of q_proj and v_proj, and its base beside it."""
    model = save_base("gemma3_text", tmp_path / "base", with_tokenizer=False)
    make_adapter("gemma3_text", model, tmp_path / "adapter", targets=["q_proj", "v_proj"])
    return tmp_path / "adapter"


def _model(adapter: Path) -> Any:
    base = open_base(str(adapter.with_name("base")), None, lambda: None)
    return load_model(base.directory, base.config, torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(.*\.)*(q|v)_proj"},
        {"target_modules": r"^(?!.*mlp).*\.(?:q_proj|v_proj)$"},
        {"target_modules": r".*_proj", "exclude_modules": r".*\.(k|o|gate|up|down)_proj"},
        {"rank_pattern": {r"layers\.(0|1)\.self_attn\.q_proj": 4, ".*v_proj": 8}, "alpha_pattern": {"(q|v)_proj": 2}},
    ],
)
def test_names_in_place_of_patterns_apply_the_same_pairs(changes: dict[str, Any], adapter: Path) -> None:
    """Of the same modules, with the same rank and scale, as the patterns themselves."""
    from peft import PeftConfig, get_peft_model

    edit_config(adapter, **changes)
    model = _model(adapter)
    harmless = harmless_config(adapter, model)
    for name in changes:
        assert getattr(harmless, name) != changes[name]
    pairs = []
    for config in (PeftConfig.from_pretrained(str(adapter)), harmless):
        wrapped = get_peft_model(_model(adapter), config)
        layers = {name: layer for name, layer in wrapped.named_modules() if hasattr(layer, "lora_A")}
        pairs.append({name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()})
    assert pairs[0] == pairs[1] != {}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"target_modules": BOMB}, "adapter_pattern_too_slow"),
        ({"target_modules": "(.*_proj)", "exclude_modules": BOMB}, "adapter_pattern_too_slow"),
        ({"rank_pattern": {BOMB: 4}}, "adapter_pattern_too_slow"),
        ({"alpha_pattern": {"(a|b": 4}}, "adapter_config_invalid"),
        ({"modules_to_save": [BOMB]}, "adapter_pattern_refused"),
        ({"layers_to_transform": [0], "layers_pattern": BOMB}, "adapter_pattern_refused"),
    ],
)
def test_a_pattern_that_matches_for_ever_is_refused_in_seconds(
    changes: dict[str, Any], code: str, adapter: Path
) -> None:
    """Python's own `re` would hold the interpreter until the task is killed."""
    edit_config(adapter, **changes)
    model, started = _model(adapter), time.monotonic()
    with pytest.raises(SourceError) as refused:
        harmless_config(adapter, model)
    assert refused.value.error_code == code
    assert time.monotonic() - started < 60


def test_a_config_of_names_goes_to_peft_as_it_is(adapter: Path) -> None:
    """What is no pattern is not written otherwise."""
    from peft import PeftConfig

    edit_config(adapter, rank_pattern={"layers.0.self_attn.q_proj": 4}, modules_to_save=["norm"])
    assert harmless_config(adapter, _model(adapter)).to_dict() == PeftConfig.from_pretrained(str(adapter)).to_dict()


def test_a_module_that_the_config_names_is_not_imported(adapter: Path) -> None:
    """PEFT would import `megatron_core` wherever there is a `megatron_config`."""
    edit_config(adapter, megatron_config={"a": 1}, megatron_core="this")
    with pytest.raises(Unsupported) as refused:
        read_for_peft(adapter, open_base(str(adapter.with_name("base")), None, lambda: None))
    assert refused.value.error_code == "unsupported_megatron_config"
