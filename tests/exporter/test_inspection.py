"""`gemma-export inspect`: what an export would do, said before anything is fetched or written."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dispatcher.artifacts import path_of
from dispatcher.demo import CLI
from tests.exporter.damage import edit_adapter, edit_config
from tests.exporter.exporting import export
from tests.exporter.hub import TOKEN, hub_serving
from tests.gemmas import make_adapter, save_base


@pytest.fixture
def place(tmp_path: Path) -> Path:
    model = save_base("gemma3", tmp_path / "base", shard_bytes=6000)
    make_adapter("gemma3", model, tmp_path / "adapter", targets=r".*q_proj")
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def inspect(
    place: Path, *arguments: str, as_json: bool = True, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    command = [*CLI, "inspect", str(place / "adapter"), *arguments]
    done = subprocess.run(
        [*command, *(["--json"] if as_json else [])],
        env={**os.environ, "GEMMA_EXPORT_HOME": str(place / "home"), **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout


def report(place: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    code, output = inspect(place, *arguments, environment=environment)
    found: dict[str, Any] = json.loads(output)
    assert code == (found["outcome"] == "refused")
    return found


def test_it_says_what_the_export_then_does(place: Path) -> None:
    found = report(place)
    assert not (place / "home").exists()
    result = export(place / "base", place / "adapter", place / "store")
    merged = path_of(result.artifact.uri)
    ledger = json.loads((merged / "ledger.json").read_text())
    assert found["outcome"] == "merged"
    assert found["adapter_tensors"] == ledger["adapter"]
    assert found["towers"] == ledger["towers"]
    assert found["bytes"] == sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    assert found["memory_bytes"] > 1 << 20


def test_for_people_it_is_a_page(place: Path) -> None:
    code, output = inspect(place, as_json=False)
    assert code == 0
    assert "8 merged" not in output
    assert "4 merged" in output
    assert "vision" in output
    assert "lora_A.weight: merged language_model.model.layers.0.self_attn.q_proj.weight" in output


def test_what_is_refused_says_why_and_ends_with_1(place: Path) -> None:
    edit_config(place / "adapter", init_lora_weights="olora")
    found = report(place)
    assert (found["outcome"], found["code"]) == ("refused", "adapter_base_mutated")
    code, output = inspect(place, as_json=False)
    assert code == 1
    assert "adapter_base_mutated" in output


def test_another_base_can_be_named(place: Path) -> None:
    save_base("gemma3_text", place / "other")
    edit_adapter(place / "adapter", lambda own: {k: v for k, v in own.items() if "language_model" in k})
    found = report(place, "--base", str(place / "other"))
    assert found["mapped_to_tower"] == "language_model"
    assert report(place, "--base", str(place / "nowhere"))["code"] == "base_missing"


def test_of_a_base_on_the_hub_only_headers_are_read(place: Path) -> None:
    expected = report(place)
    with hub_serving(place / "base") as hub:
        edit_config(place / "adapter", base_model_name_or_path="google/tiny")
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(place / "cache")}
        found = report(place, **online, HF_TOKEN=TOKEN)
        assert found["outcome"] == "merged", found.get("message")
        assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    for name in ("outcome", "tensors", "towers", "adapter_tensors"):
        assert found[name] == expected[name]


def test_a_whole_model_needs_no_merging(place: Path) -> None:
    save_base("gemma3_text", place / "adapter2")
    (place / "adapter").rename(place / "old")
    (place / "adapter2").rename(place / "adapter")
    assert report(place)["outcome"] == "passthrough"
