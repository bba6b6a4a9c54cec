"""A finished GGUF in llama.cpp: a right one passes, and each way to be wrong has its code.

The files are made by llama.cpp's own converter and quantizer, so what passes here is right by its own account.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dispatcher.contract import QUANTIZATIONS
from dispatcher.errors import VerificationFailed
from exporter.llama_check import LIMITS, LlamaCheck, check_gguf
from tests.exporter.gguf_route import converted, quantized
from tests.gemmas import file_tensors
from tests.gemmas.llama import LLAMA_FAMILIES, llama_adapter, llama_base

QUICK_FAMILIES = ("gemma", "gemma2", "gemma3_text", "gemma4_text")
QUICK_TYPES = ("f32", "bf16", "q8_0", "q4_k_m")
BUDGET = 1 << 30
LIGHT = 0.4
"""A scale at which a random adapter changes the logits by a quarter to a half of their size."""
Made = Callable[[str], "Example"]


@dataclass(frozen=True)
class Example:
    """A base, and GGUFs of it."""

    family: str
    base: Path

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.base / "config.json").read_text())
        return config

    def gguf(self, quantization: str) -> Path:
        """The base as llama.cpp's own two steps make it."""
        bf16 = self.base / "bf16.gguf"
        path = bf16.with_name(f"{quantization}.gguf")
        if not bf16.exists():
            converted(self.base, bf16, "bf16")
        if not path.exists():
            quantized(bf16, quantization)
        return path

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from file_tensors(self.base).items()

    def with_adapter(self, adapter: Path, *, scale: float) -> Iterator[tuple[str, torch.Tensor]]:
        """The base's tensors with B @ A added at some scale, in float32."""
        factors = file_tensors(adapter)
        for name, tensor in self.tensors():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (factors.pop(f"{key}.lora_{part}.weight", None) for part in "AB")
            yield name, tensor if a is None or b is None else tensor.float() + scale * b @ a
        assert not factors

    def check(self, path: Path, quantization: str = "bf16", **options: Any) -> LlamaCheck:
        options = {"weights": self.tensors, "memory_budget": BUDGET, **options}
        return check_gguf(path, options.pop("model_dir", self.base), self.config, quantization, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Examples by family, each made once."""
    examples: dict[str, Example] = {}

    def make(family: str) -> Example:
        if family not in examples:
            examples[family] = Example(family, llama_base(family, tmp_path_factory.mktemp(family)))
        return examples[family]

    return make


def _cases() -> Iterator[Any]:
    for family in LLAMA_FAMILIES:
        for quantization in QUANTIZATIONS:
            quick = family in QUICK_FAMILIES and quantization in QUICK_TYPES
            marks = [pytest.mark.xdist_group(family), *([] if quick else [pytest.mark.full])]
            yield pytest.param(family, quantization, marks=marks)


@pytest.mark.parametrize(("family", "quantization"), list(_cases()))
def test_a_right_file_passes(family: str, quantization: str, made: Made) -> None:
    """Every line, every conversation, and logits at most two thirds of the limit away."""
    example = made(family)
    found = example.check(example.gguf(quantization), quantization)
    gemma4 = family.startswith("gemma4")
    assert found.verified == {
        "vocabulary": 448,
        "lines": 60 if gemma4 else 69,
        "known_differences": {"U+2581": 0 if gemma4 else 2, "bos": 0, "unnamed": 0},
        "chat_template": "rendered",
        "conversations": 4 if family in ("gemma", "gemma2") else 5,
    }
    if family == "gemma3n":
        assert found.logits["compared"] is False
        assert "Gemma 3n" in found.logits["why"]
        return
    assert found.logits["compared"]
    limit = found.logits["relative_rms_limit"]
    assert limit == pytest.approx(LIMITS[quantization] * (2 if family == "gemma4_moe" else 1))
    assert 0 < found.logits["relative_rms_difference"] <= limit * 2 / 3


@pytest.mark.parametrize(
    "quantization", [*(pytest.param(name, marks=pytest.mark.full) for name in ("f32", "f16", "bf16", "q6_k")), "q8_0"]
)
@pytest.mark.parametrize(
    ("family", "scale"),
    [
        pytest.param(family, scale, marks=pytest.mark.xdist_group(family))
        for family in QUICK_FAMILIES
        for scale in (LIGHT, -LIGHT)
    ],
)
def test_an_adapter_that_was_not_applied_or_twice_is_seen(
    family: str, scale: float, quantization: str, made: Made, tmp_path: Path
) -> None:
    """The model is the file with it, which then lacks it; or the file without it, which then has it once too often."""
    example = made(family)
    adapter = llama_adapter(family, example.base, tmp_path)
    weights = partial(example.with_adapter, adapter, scale=scale)
    with pytest.raises(VerificationFailed) as refused:
        example.check(example.gguf(quantization), quantization, weights=weights)
    assert refused.value.error_code == "gguf_logits_differ"


def _refused(example: Example, path: Path, **options: Any) -> VerificationFailed:
    with pytest.raises(VerificationFailed) as refused:
        example.check(path, **options)
    return refused.value


def _damaged(example: Example, path: Path, old: bytes, new: bytes) -> Path:
    """The bf16 file with one place in it changed."""
    content = example.gguf("bf16").read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.xdist_group("gemma3_text")
def test_a_swapped_token_is_seen(made: Made, tmp_path: Path) -> None:
    """One that no line of the corpus has in it, too."""
    example = made("gemma3_text")
    content = example.gguf("bf16").read_bytes()
    swapped = content.replace(b"<0xF5>", b"<0x??>").replace(b"<0xF6>", b"<0xF5>").replace(b"<0x??>", b"<0xF6>")
    assert swapped != content
    (tmp_path / "swapped.gguf").write_bytes(swapped)
    error = _refused(example, tmp_path / "swapped.gguf")
    assert error.error_code == "gguf_tokens_differ"
    assert "<0xF5>" in error.message


@pytest.mark.xdist_group("gemma3_text")
def test_tokens_that_the_converter_did_not_know_for_special_are_seen(made: Made, tmp_path: Path) -> None:
    """It reads `added_tokens_decoder`, which transformers 5 does not write: turns would be spelled out."""
    base = shutil.copytree(made("gemma3_text").base, tmp_path / "base", ignore=shutil.ignore_patterns("*.gguf"))
    fields = json.loads((base / "tokenizer_config.json").read_text())
    del fields["added_tokens_decoder"]
    (base / "tokenizer_config.json").write_text(json.dumps(fields))
    example = Example("gemma3_text", base)
    error = _refused(example, example.gguf("bf16"))
    assert error.error_code == "gguf_tokens_differ"


@pytest.mark.xdist_group("gemma3_text")
def test_a_prompt_without_its_bos_is_seen(made: Made, tmp_path: Path) -> None:
    """`tokenizer.ggml.add_bos_token` false, and the tokenizer adds one."""
    key = b"tokenizer.ggml.add_bos_token" + struct.pack("<I", 7)  # GGUF's bool
    path = _damaged(made("gemma3_text"), tmp_path / "bos.gguf", key + b"\1", key + b"\0")
    error = _refused(made("gemma3_text"), path)
    assert error.error_code == "gguf_tokens_differ"
    assert "prompt" in error.message


@pytest.mark.xdist_group("gemma3_text")
def test_another_chat_template_is_seen(made: Made, tmp_path: Path) -> None:
    """One that gives the model's turns another name, and one where there should be none."""
    example = made("gemma3_text")
    path = _damaged(example, tmp_path / "template.gguf", b"'model' if", b"'agent' if")
    assert _refused(example, path).error_code == "gguf_template_differs"
    bare = shutil.copytree(example.base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.gguf", "*.jinja"))
    error = _refused(example, example.gguf("bf16"), model_dir=bare)
    assert error.error_code == "gguf_template_differs"


@pytest.mark.xdist_group("gemma3_text")
def test_no_chat_template_on_either_side_is_said(made: Made, tmp_path: Path) -> None:
    """A base model that was never made to chat."""
    example = made("gemma3_text")
    bare = shutil.copytree(example.base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.gguf", "*.jinja"))
    path = _damaged(example, tmp_path / "none.gguf", b"tokenizer.chat_template", b"tokenizer.chat_templa_e")
    found = example.check(path, model_dir=bare)
    assert (found.verified["chat_template"], found.verified["conversations"]) == ("none", 0)


@pytest.mark.xdist_group("gemma3_text")
def test_a_truncated_file_is_not_loadable(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In llama.cpp's own words, none of which reach this process's output."""
    example = made("gemma3_text")
    content = example.gguf("bf16").read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: len(content) // 2])
    capfd.readouterr()
    error = _refused(example, tmp_path / "half.gguf")
    assert error.error_code == "gguf_not_loadable"
    assert "not within the file bounds" in error.message
    assert capfd.readouterr() == ("", "")


@pytest.mark.xdist_group("gemma3_text")
def test_one_wrong_tensor_is_seen(made: Made, tmp_path: Path) -> None:
    """Another layer's in its place; and one that is not a number."""
    example = made("gemma3_text")
    tensors = file_tensors(example.base)
    one, other = (tensors[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (2, 3))
    path = _damaged(example, tmp_path / "other.gguf", _bytes(one), _bytes(other))
    assert _refused(example, path).error_code == "gguf_logits_differ"
    path = _damaged(example, tmp_path / "nan.gguf", _bytes(one), _bytes(torch.full_like(one, torch.nan)))
    error = _refused(example, path)
    assert error.error_code == "gguf_not_loadable"
    assert "invalid data" in error.message


@pytest.mark.xdist_group("gemma4_text")
def test_a_file_at_which_llama_cpp_aborts_takes_nobody_with_it(made: Made, tmp_path: Path) -> None:
    """Layers that share keys with a kind of layer that is not there: an assertion in native code."""
    key = b"gemma4.attention.shared_kv_layers" + struct.pack("<I", 4)  # GGUF's uint32
    path = _damaged(
        made("gemma4_text"), tmp_path / "shared.gguf", key + struct.pack("<I", 3), key + struct.pack("<I", 2)
    )
    error = _refused(made("gemma4_text"), path)
    assert error.error_code == "gguf_not_loadable"
    assert "SIGABRT" in error.message
    assert "GGML_ASSERT" in error.message


@pytest.mark.xdist_group("gemma3_text")
def test_what_is_not_compared_says_why(made: Made) -> None:
    """A file or weights beyond the memory budget; the text is compared all the same."""
    example = made("gemma3_text")
    small = example.check(example.gguf("bf16"), memory_budget=1 << 20)
    assert small.verified == example.check(example.gguf("bf16")).verified
    assert small.loaded == "vocabulary"
    assert small.logits == {"compared": False, "why": "the file is larger than the memory budget"}
    bare = example.check(example.gguf("bf16"), weights=None)
    assert bare.loaded == "whole"
    assert bare.logits == {"compared": False, "why": "the weights do not fit the memory budget"}
    nothing = example.check(example.gguf("bf16"), weights=lambda: iter(()))
    assert nothing.logits["compared"] is False


@pytest.mark.xdist_group("gemma3_text")
def test_llama_cpp_has_only_so_long(made: Made) -> None:
    """And is waited for with a heartbeat."""
    example = made("gemma3_text")
    beats: list[int] = []
    error = _refused(example, example.gguf("bf16"), seconds=0.05, while_waiting=lambda: beats.append(1))
    assert error.error_code == "gguf_not_loadable"
    assert "takes longer" in error.message
    assert beats


def test_every_quantization_has_its_limit() -> None:
    """And fewer bits never have a smaller one than the type with the next more of them."""
    assert set(LIMITS) == set(QUANTIZATIONS)
    order = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
    limits = [LIMITS[name] for name in order]
    assert limits == sorted(limits)
