"""Tiny real Gemma models, adapters and bases for the tests: built in code, written to disk, merged by PEFT.

model = save_base("gemma3", tmp_path / "base", layout="hub", shard_bytes=4096)
make_adapter("gemma3", model, tmp_path / "adapter", layout="hub")
expected = peft_merged(tmp_path / "base", tmp_path / "adapter")
... merge into tmp_path / "out" ...
assert_same_tensors(model_tensors(load_model(tmp_path / "out")), expected)
"""

from tests.gemmas.adapters import make_adapter, peft_merged
from tests.gemmas.bases import (
    assert_same_tensors,
    checkpoint_tensors,
    file_tensors,
    load_model,
    model_tensors,
    same_bits,
    save_base,
    shared_kv_names,
    text_logits,
)
from tests.gemmas.families import CASES, FAMILIES, Family, build_model
from tests.gemmas.names import Layout, renamed
from tests.gemmas.quantized import quantize_in_place
from tests.gemmas.tokenizer import SENTENCES, save_tokenizer

__all__ = [
    "CASES",
    "FAMILIES",
    "SENTENCES",
    "Family",
    "Layout",
    "assert_same_tensors",
    "build_model",
    "checkpoint_tensors",
    "file_tensors",
    "load_model",
    "make_adapter",
    "model_tensors",
    "peft_merged",
    "quantize_in_place",
    "renamed",
    "same_bits",
    "save_base",
    "save_tokenizer",
    "shared_kv_names",
    "text_logits",
]
