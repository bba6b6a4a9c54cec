"""The ledger: what became of each tensor of the adapter and of the output, and it is true."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dispatcher.artifacts import path_of
from tests.exporter.exporting import export
from tests.gemmas import FAMILIES, file_tensors, make_adapter, same_bits, save_base


def exported(place: Path, family: str, **options: Any) -> tuple[dict[str, Any], Path]:
    model = save_base(family, place / "base", dtype=torch.float32, layout=FAMILIES[family].layouts[0])
    make_adapter(family, model, place / "adapter", **options)
    merged = path_of(export(place / "base", place / "adapter", place / "store").artifact.uri)
    return json.loads((merged / "ledger.json").read_text()), merged


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma3", {"targets": r".*(q|v)_proj", "bias": "lora_only"}),
        ("gemma3_text", {"targets": ["q_proj"], "use_dora": True, "modules_to_save": ["norm"]}),
        ("gemma4_moe", {"targets": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
        ("gemma2", {"targets": ["lm_head"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_every_tensor_is_in_it_once_with_what_became_of_it(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    ledger, merged = exported(tmp_path, family, **options)
    base, written = file_tensors(tmp_path / "base"), file_tensors(merged)
    assert ledger["adapter"].keys() == file_tensors(tmp_path / "adapter").keys()
    assert ledger["output"].keys() == written.keys()
    for name, entry in ledger["output"].items():
        before = base[entry.get("from", name)]
        assert (entry["operation"] == "added") == (name not in base)
        if entry["operation"] == "copied":
            assert same_bits(written[name], before)
            continue
        delta = (written[name] - before).double()
        assert entry["max_abs_change"] == pytest.approx(float(delta.abs().max()), rel=1e-3)
        relative = float(torch.linalg.vector_norm(delta) / torch.linalg.vector_norm(before.double()))
        assert entry["relative_norm"] == pytest.approx(relative, rel=1e-3)
    used = {name for use in ledger["adapter"].values() for name in use["tensors"]}
    changed = {name for name, entry in ledger["output"].items() if entry["operation"] != "copied"}
    assert used == changed


def test_the_towers_are_counted_apart(tmp_path: Path) -> None:
    ledger, merged = exported(tmp_path, "gemma4")
    towers = ledger["towers"]
    assert towers.keys() == {"language", "vision", "audio"}
    assert all(tower["merged"] > 0 for tower in towers.values())
    total = sum(count for tower in towers.values() for count in tower.values())
    assert total == len(file_tensors(merged))
    manifest = json.loads((merged / "export.json").read_text())
    assert manifest["tensors"]["towers"] == towers
    assert "ledger.json" in {file["name"] for file in manifest["files"]}


def test_two_runs_write_the_same_ledger(tmp_path: Path) -> None:
    _, merged = exported(tmp_path, "gemma3_text")
    again = path_of(export(tmp_path / "base", tmp_path / "adapter", tmp_path / "other").artifact.uri)
    assert (merged / "ledger.json").read_bytes() == (again / "ledger.json").read_bytes()
