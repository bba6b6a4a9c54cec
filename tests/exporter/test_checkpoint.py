"""Safetensors headers: what is well-formed reads as the library reads it, what is not is refused by name."""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.errors import SourceError, Unavailable
from exporter.byte_source import LocalFile
from exporter.checkpoint import header_bytes, open_checkpoint, parse_header, read_tensor_file
from tests.exporter.damage import edit_header

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "U8": torch.uint8}
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=20), st.tuples(SHAPES, st.sampled_from(sorted(DTYPES))), min_size=1)
)
def test_what_the_library_writes_reads_back_as_it_was_meant(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    """Names, dtypes and shapes, 0-dim and empty tensors included; and our own header describes the same bytes."""
    wanted.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("codec") / "a.safetensors"
    safetensors.torch.save_file(
        {name: torch.zeros(shape, dtype=DTYPES[d]) for name, (shape, d) in wanted.items()}, path
    )
    file = read_tensor_file(path)
    assert {tensor.name: (tensor.shape, tensor.dtype) for tensor in file.tensors} == wanted
    ours = header_bytes(file.tensors, {"format": "pt"})
    data = (
        path.read_bytes()[-sum(tensor.nbytes for tensor in file.tensors) :]
        if any(tensor.nbytes for tensor in file.tensors)
        else b""
    )
    path.write_bytes(ours + data)
    again = safetensors.torch.load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in again.items()} == {
        k: shape for k, (shape, _) in wanted.items()
    }
    assert len(ours) % 8 == 0


def _header(raw: dict[str, Any], data: int) -> bytes:
    text = json.dumps(raw).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "safetensors_truncated"),
        (b"1234567", "safetensors_truncated"),
        ((10**6).to_bytes(8, "little") + b"{}", "safetensors_truncated"),
        ((2**63).to_bytes(8, "little") + b"{}", "safetensors_corrupt"),
        ((2).to_bytes(8, "little") + b"[]", "safetensors_corrupt"),
        ((2).to_bytes(8, "little") + b"{x", "safetensors_corrupt"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "safetensors_corrupt"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "safetensors_corrupt"),
        (_header({"a": _entry()}, 7), "safetensors_truncated"),
        (_header({"a": _entry()}, 9), "safetensors_corrupt"),
        (_header({"a": _entry(), "b": _entry(offsets=(4, 12))}, 12), "safetensors_corrupt"),
        (_header({"a": _entry(), "b": _entry(offsets=(12, 20))}, 20), "safetensors_corrupt"),
        (_header({"a": _entry(shape=(3,))}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(shape=(-2,))}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(shape=(2.0,))}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(shape=(True, 2))}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(shape=(math.nan,))}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(shape=(2**62, 2**62))}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(shape=[1] * 1000 + [2])}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(offsets=(8, 0))}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(offsets=(0,))}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(dtype="F33")}, 8), "safetensors_corrupt"),
        (_header({"a": _entry(dtype=["F32"])}, 8), "safetensors_corrupt"),
        (_header({"a": {"dtype": "F32"}}, 8), "safetensors_corrupt"),
        (_header({"a": 3}, 8), "safetensors_corrupt"),
        (_header({"__metadata__": {"a": 1}}, 0), "safetensors_corrupt"),
        (_header({"__metadata__": []}, 0), "safetensors_corrupt"),
    ],
)
def test_a_header_that_lies_is_refused(content: bytes, code: str) -> None:
    with pytest.raises(SourceError) as refused:
        parse_header(lambda offset, length: content[offset : offset + length], len(content), "x.safetensors")
    assert refused.value.error_code == code
    assert "x.safetensors" in refused.value.message


def test_a_name_that_occurs_twice_is_refused() -> None:
    entry = json.dumps(_entry())
    text = f'{{"a": {entry}, "a": {entry}}}'.encode()
    content = len(text).to_bytes(8, "little") + text + bytes(8)
    with pytest.raises(SourceError, match="twice"):
        parse_header(lambda offset, length: content[offset : offset + length], len(content), "x")


@given(st.binary(max_size=300))
def test_no_bytes_make_the_parser_fail_otherwise(content: bytes) -> None:
    with contextlib.suppress(SourceError):
        parse_header(lambda offset, length: content[offset : offset + length], len(content), "x")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError) as refused:
        open_checkpoint(tmp_path)
    assert refused.value.error_code == "safetensors_truncated"


def _sharded(directory: Path) -> dict[str, str]:
    weight_map = {}
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({f"t{number}": torch.ones(3)}, directory / name)
        weight_map[f"t{number}"] = name
    _write_index(directory, weight_map)
    return weight_map


def _write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _missing_shard(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / weight_map["t2"]).unlink()


def _pointing_elsewhere(directory: Path, weight_map: dict[str, str]) -> None:
    _write_index(directory, {"t1": weight_map["t2"], "t2": weight_map["t2"]})


def _leading_out(directory: Path, weight_map: dict[str, str]) -> None:
    _write_index(directory, {"t1": "../secret.safetensors"})


def _twice(directory: Path, weight_map: dict[str, str]) -> None:
    safetensors.torch.save_file({"t1": torch.ones(3), "t2": torch.ones(3)}, directory / weight_map["t2"])


def _no_object(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text("[1]")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (_missing_shard, "base_missing"),
        (_pointing_elsewhere, "base_index_invalid"),
        (_leading_out, "base_index_invalid"),
        (_twice, "base_index_invalid"),
        (_no_object, "base_index_invalid"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(
    damage: Callable[[Path, dict[str, str]], None], code: str, tmp_path: Path
) -> None:
    damage(tmp_path, _sharded(tmp_path))
    with pytest.raises(SourceError) as refused:
        open_checkpoint(tmp_path)
    assert refused.value.error_code == code


def test_pickled_weights_are_named_and_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    with pytest.raises(SourceError) as refused:
        open_checkpoint(tmp_path)
    assert refused.value.error_code == "base_pickle_only"


def test_an_edited_header_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    edit_header(path, lambda header: header["a"].update(shape=[5]))
    with pytest.raises(SourceError) as refused:
        open_checkpoint(tmp_path)
    assert refused.value.error_code == "safetensors_corrupt"


@pytest.mark.parametrize("fault", [None, KeyError])
def test_a_file_that_is_edited_in_place_while_it_is_read_is_noticed(
    tmp_path: Path, fault: type[Exception] | None
) -> None:
    """When it is closed, its size and inode being the same; and no other fault is hidden by that."""
    path = tmp_path / "file"
    path.write_bytes(b"a" * 8)
    with pytest.raises(fault or Unavailable):
        _read_and_edit(LocalFile.of(path), fault)


def _read_and_edit(source: LocalFile, fault: type[Exception] | None) -> None:
    with source.open() as reader:
        reader.read_into(memoryview(bytearray(4)), 0)
        source.path.write_bytes(b"b" * 8)
        os.utime(source.path, ns=(0, source.stamp[3] + 1))
        if fault is not None:
            raise fault
