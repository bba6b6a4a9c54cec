"""Unsloth for real, without a GPU: on a plain adapter it agrees with the other two engines, or it is refused."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dispatcher.artifacts import path_of
from dispatcher.errors import ExportError
from exporter.making import Checks
from exporter.sources import open_base
from exporter.unsloth_engine import merge_with_unsloth
from tests.exporter.exporting import export, merged_into
from tests.gemmas import (
    FAMILIES,
    assert_same_tensors,
    file_tensors,
    load_model,
    make_adapter,
    model_tensors,
    save_base,
)
from tests.gemmas.families import TEXT

Record = Callable[[str, object], None]

LANGUAGE = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
AS_LARGE = {"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "head_dim": 256}
"""Gemma 3 270M's own sizes."""
BASE_OPTIONS = ("layout", "shard_bytes", "model")


def saved(place: Path, family: str, **options: Any) -> tuple[Path, Path]:
    """A base of `family` in its first layout, and an adapter for it."""
    base_options = {name: options.pop(name) for name in BASE_OPTIONS if name in options}
    model = save_base(family, place / "base", **{"layout": FAMILIES[family].layouts[0], **base_options})
    make_adapter(family, model, place / "adapter", **options)
    return place / "base", place / "adapter"


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


AGREEING: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text, in shards": ("gemma3_text", {"shard_bytes": 6000}),
    "gemma3_text, rsLoRA": ("gemma3_text", {"targets": ["q_proj", "down_proj"], "use_rslora": True}),
    "gemma3_text, ranks, bfloat16 pairs": (
        "gemma3_text",
        {"targets": ["q_proj"], "rank_pattern": {r"layers\.1\..*": 2}, "dtype": torch.bfloat16},
    ),
    "gemma3, language": ("gemma3", {"targets": LANGUAGE}),
    "gemma3, all towers, module names": ("gemma3", {"layout": "modules"}),
    "paligemma, language": ("paligemma", {"targets": LANGUAGE}),
    "paligemma, all towers, module names": ("paligemma", {"layout": "modules"}),
    "gemma3n_text": ("gemma3n_text", {}),
    "gemma4_text": ("gemma4_text", {}),
    "gemma4_k_eq_v": ("gemma4_k_eq_v", {}),
    "gemma4_moe": ("gemma4_moe", {}),
    "gemma4, all towers": ("gemma4", {}),
    "gemma4_unified": ("gemma4_unified", {}),
}


@pytest.mark.parametrize("case", AGREEING)
def test_three_engines_agree_bit_for_bit_on_a_plain_adapter(case: str, tmp_path: Path, record_property: Record) -> None:
    """Weights, and the logits of base and adapter; and base and adapter are left as they are."""
    family, options = AGREEING[case]
    base, adapter = saved(tmp_path, family, **options)
    before = contents(base), contents(adapter)
    result = export(base, adapter, tmp_path / "unsloth", engine="unsloth", checks=Checks())
    assert (contents(base), contents(adapter)) == before
    by_unsloth = path_of(result.artifact.uri)
    by_streaming = merged_into(base, adapter, tmp_path / "streaming")
    by_peft = merged_into(base, adapter, tmp_path / "peft", engine="peft")
    assert_same_tensors(file_tensors(by_unsloth), file_tensors(by_streaming))
    assert_same_tensors(model_tensors(load_model(by_unsloth)), model_tensors(load_model(by_peft)))
    pairs = len(file_tensors(adapter)) // 2
    assert (result.summary["engine"], result.summary["merged"]) == ("unsloth", pairs)
    assert result.summary["logits"]["compared"]
    assert not [name for name in sys.modules if name.split(".")[0] in ("unsloth", "unsloth_zoo")]
    record_property(case, f"{pairs} pairs: all three agree in every bit")


LEFT_OUT: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma3, all towers": ("gemma3", {}, "adapter_half_applied"),
    "paligemma, all towers": ("paligemma", {}, "adapter_half_applied"),
    "shieldgemma2": ("shieldgemma2", {}, "adapter_unmatched"),
    "gemma3n, three towers": ("gemma3n", {}, "unsloth_failed"),
}
"""What Unsloth itself does not do right: it skips SigLIP's pairs where the base has the hub's names, takes shieldgemma2
for a gemma3, and wants timm for gemma3n's towers. A later Unsloth may; then the case moves up."""


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_unsloth_leaves_out_is_refused_and_not_published(
    case: str, tmp_path: Path, record_property: Record
) -> None:
    """Unsloth says of none of these that anything is wrong, but for the last."""
    family, options, code = LEFT_OUT[case]
    base, adapter = saved(tmp_path, family, **options)
    assert refusal(base, adapter, tmp_path) == code
    record_property(case, f"Unsloth cannot: {code}")


def refusal(base: Path, adapter: Path, tmp_path: Path) -> str:
    with pytest.raises(ExportError) as refused:
        export(base, adapter, tmp_path / "store", engine="unsloth")
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    print(refused.value.message)  # noqa: T201  # shown where the code is another
    return refused.value.error_code


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"num_hidden_layers": 3}, "adapter_unmatched"), ({"intermediate_size": 28}, "unsloth_failed")],
    ids=["deeper", "wider"],
)
def test_an_adapter_of_another_base_is_refused(changes: dict[str, int], code: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("gemma3_text", base)
    other = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**TEXT, **changes}))
    make_adapter("gemma3_text", other, tmp_path / "adapter")
    assert refusal(base, tmp_path / "adapter", tmp_path) == code


BEYOND_PAIRS: dict[str, tuple[dict[str, Any], str | None]] = {
    "DoRA": ({"use_dora": True}, None),
    "modules_to_save": ({"modules_to_save": ["model.norm"]}, None),
    "trainable_token_indices": ({"trainable_token_indices": [7, 3]}, None),
}


@pytest.mark.parametrize("case", BEYOND_PAIRS)
def test_what_is_more_than_pairs_is_applied_whole_or_refused(
    case: str, tmp_path: Path, record_property: Record
) -> None:
    """Up to the last bit, for DoRA's norms."""
    options, code = BEYOND_PAIRS[case]
    base, adapter = saved(tmp_path, "gemma3_text", targets=["q_proj"], **options)
    if code is not None:
        assert refusal(base, adapter, tmp_path) == code
        record_property(case, f"Unsloth cannot: {code}")
        return
    by_unsloth = file_tensors(merged_into(base, adapter, tmp_path / "unsloth", engine="unsloth"))
    by_streaming = file_tensors(merged_into(base, adapter, tmp_path / "streaming"))
    different = {name for name in by_streaming if not torch.equal(by_streaming[name], by_unsloth[name])}
    for name in different:
        torch.testing.assert_close(by_unsloth[name], by_streaming[name], rtol=2**-7, atol=0)
    record_property(case, f"applied whole, {len(different)} tensors differ in a last bit")


@pytest.mark.parametrize("alpha", [16, 11])
def test_at_a_real_models_sizes_only_an_odd_scale_tells_the_engines_apart(
    alpha: int, tmp_path: Path, record_property: Record
) -> None:
    """Unsloth multiplies by the scale while it adds, the others before: of an odd scale another last bit is rounded.

    Each is then the correctly rounded one about as often; the counts are printed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**TEXT, **AS_LARGE}))
    base, adapter = saved(tmp_path, "gemma3_text", model=model.to(torch.bfloat16), r=16, alpha=alpha)
    by_unsloth = file_tensors(merged_into(base, adapter, tmp_path / "unsloth", engine="unsloth"))
    by_streaming = file_tensors(merged_into(base, adapter, tmp_path / "streaming"))
    originals, pairs = file_tensors(base), file_tensors(adapter)
    total, different, streaming_wrong, unsloth_wrong = 0, 0, 0, 0
    for key in (key for key in pairs if key.endswith(".lora_A.weight")):
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        product = pairs[key.replace("lora_A", "lora_B")].double() @ pairs[key].double()
        exact = (originals[name].double() + alpha / 16 * product).to(torch.bfloat16)
        total += exact.numel()
        different += int((by_unsloth[name] != by_streaming[name]).sum())
        streaming_wrong += int((by_streaming[name] != exact).sum())
        unsloth_wrong += int((by_unsloth[name] != exact).sum())
    record_property(
        f"270M's sizes, scale {alpha}/16",
        f"{different} of {total} elements differ; not as float64 rounds: {streaming_wrong} here, {unsloth_wrong} there",
    )
    assert different == 0 if alpha == 16 else different < total / 5_000
    assert unsloth_wrong <= 2 * streaming_wrong + 10
    assert streaming_wrong <= 2 * unsloth_wrong + 10


def test_unsloth_asks_nobody_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection that its process would try is noted and refused; and it runs in a directory of its own."""
    base, adapter = saved(tmp_path, "gemma3_text")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(NOTE_CONNECTIONS.format(notes=str(tmp_path / "notes")))
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'hook'}:{Path.cwd()}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("UNSLOTH_ALLOW_PARTIAL_LORA_MERGE", "1")
    monkeypatch.chdir(tmp_path / "here")
    merged_into(base, adapter, tmp_path / "store", engine="unsloth")
    assert (tmp_path / "notes").read_text() == "ran\n"
    assert not list((tmp_path / "here").iterdir())


NOTE_CONNECTIONS = """
import os, socket, sys

def note(what):
    with open({notes!r}, "a") as notes:
        notes.write(what + "\\n")

def refuse(*arguments, **options):
    note("asked for " + repr(arguments))
    raise OSError("no network here")

if "exporter.unsloth_engine" in " ".join(sys.orig_argv):
    note("ran")
    for name in ("HF_TOKEN", "UNSLOTH_ALLOW_PARTIAL_LORA_MERGE"):
        if name in os.environ:
            note("was given " + name)
    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = socket.create_connection = refuse
"""


class _StopError(Exception):
    pass


def test_whoever_waits_can_stop_it(tmp_path: Path) -> None:
    """So that a cancelled export, or a machine that goes away, does not wait for Unsloth."""
    base, adapter = saved(tmp_path, "gemma3_text")
    (tmp_path / "output").mkdir()
    waited = 0

    def stop() -> None:
        nonlocal waited
        waited += 1
        if waited == 3:
            raise _StopError

    with pytest.raises(_StopError):
        merge_with_unsloth(open_base(str(base), None, lambda: None), adapter, tmp_path / "output", while_waiting=stop)
    assert not list((tmp_path / "output").iterdir())
