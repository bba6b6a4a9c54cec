"""What strangers wrote instead of JSON, weights and directories: refused by name, in bounded time and memory."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dispatcher.errors import ExportError, SourceError
from exporter.adapter import read_adapter
from exporter.byte_source import LocalFile
from exporter.checkpoint import MAX_EMPTY, open_checkpoint, parse_header
from exporter.documents import MAX_MARKS, parse_json_object, read_json_object
from exporter.sidefiles import MAX_SIDE_FILE_BYTES, side_files
from exporter.sources import open_base
from exporter.vocabulary import highest_added_token
from tests.exporter.damage import edit_config
from tests.exporter.exporting import export
from tests.gemmas import make_adapter, save_base


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" + b"{}," * MAX_MARKS + b"{}]", f"more than {MAX_MARKS} values"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": 1e999}', "1e999 is larger than any number"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": [-Infinity]}', "-Infinity is no number of JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' occurs twice"),
        (b'{"a\\n' + b"a" * 9999 + b'": 1, "a\\n' + b"a" * 9999 + b'": 1}', r"'a\\na+' occurs twice"),
        (b'{"a": "\\ud800"}', "half a surrogate"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"", "Expecting value"),
        (b"[1]", "holds a list"),
    ],
    ids=lambda value: repr(value[:16]),
)
def test_what_readers_would_read_differently_or_never_is_no_document(content: bytes, said: str) -> None:
    """The message says what, in a few characters."""
    with pytest.raises(ValueError, match=said) as refused:
        parse_json_object(content)
    assert len(str(refused.value)) < 300


def test_text_of_any_script_is_a_document() -> None:
    """Surrogate pairs that are whole, and numbers of any reasonable size."""
    assert parse_json_object(b'{"\\ud83d\\ude00": [1e-9, -0.5, 1000000000000000019884624838656]}') == {
        "😀": [1e-9, -0.5, 1000000000000000019884624838656]
    }


def test_a_document_larger_than_its_limit_is_not_read(tmp_path: Path) -> None:
    """Nor one that has no end at all; a hole of a terabyte takes no time."""
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)
    for place in (path, Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"larger than 10 bytes|no regular file"):
            read_json_object(place, limit=10)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("instead", [_pipe, _directory, _device])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_file_is_not_waited_for(name: str, instead: Callable[[Path], None], tmp_path: Path) -> None:
    """A pipe that nobody writes to, a directory, a device that never ends."""
    make_adapter("gemma3_text", save_base("gemma3_text", tmp_path / "base"), tmp_path / "adapter")
    instead(tmp_path / "adapter" / name)
    with pytest.raises(SourceError):
        read_adapter(tmp_path / "adapter")
    with pytest.raises(SourceError):
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")


@pytest.mark.parametrize("instead", [_pipe, _device])
def test_what_takes_a_files_place_while_it_is_used_is_not_waited_for(
    instead: Callable[[Path], None], tmp_path: Path
) -> None:
    """After somebody looked whether it is a file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(8))
    source = LocalFile.of(path)
    instead(path)
    with pytest.raises(ExportError):
        source.open()
    with pytest.raises(SourceError):
        LocalFile.of(path)
    with pytest.raises(ValueError, match="no regular file"):
        read_json_object(path, limit=10)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "README.md"])
def test_a_link_out_of_an_adapter_is_not_followed(name: str, tmp_path: Path) -> None:
    """Whatever the file is for: all of the directory is the adapter."""
    make_adapter("gemma3_text", save_base("gemma3_text", tmp_path / "base"), tmp_path / "adapter")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "adapter" / name).unlink(missing_ok=True)
    (tmp_path / "adapter" / name).symlink_to(secret)
    with pytest.raises(SourceError) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert refused.value.error_code == "link_refused"


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "..", "", "x.bin", "a\0.safetensors"]
)
def test_an_index_leads_to_no_file_but_those_beside_it(file: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(SourceError) as refused:
        open_checkpoint(tmp_path)
    assert refused.value.error_code in ("base_index_invalid", "base_missing")


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"F32","shape":[0,9007199254740993],"data_offsets":[0,0]}}',
        b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[9223372036854775807,9223372036854775807]}}',
        b'{"a":' + b'{"a":' * 50_000,
    ],
    ids=lambda text: text[:40].decode(),
)
def test_a_header_of_absurd_values_is_refused(text: bytes) -> None:
    """Dimensions of nothing, half a character for a name, a field twice, offsets at the end of all numbers."""
    content = _header(text)
    with pytest.raises(SourceError) as refused:
        parse_header(lambda offset, length: content[offset : offset + length], len(content), "x")
    assert refused.value.error_code in ("safetensors_corrupt", "safetensors_truncated")
    assert len(refused.value.message) < 400
    assert MAX_EMPTY < 9007199254740993


def test_a_header_of_millions_of_entries_is_refused_in_seconds() -> None:
    """Before anything is made of them."""
    content = _header(b"{" + b",".join(b'"%d":{}' % number for number in range(3_300_000)) + b"}")
    started = time.monotonic()
    with pytest.raises(SourceError) as refused:
        parse_header(lambda offset, length: content[offset : offset + length], len(content), "x")
    assert refused.value.error_code == "safetensors_corrupt"
    assert time.monotonic() - started < 10


def test_names_by_the_thousand_are_not_compared_with_each_other(tmp_path: Path) -> None:
    """A megabyte of targets, each against each tensor, would take hours."""
    make_adapter("gemma3_text", save_base("gemma3_text", tmp_path / "base"), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", rank_pattern={f"a{number}": 4 for number in range(70_000)})
    content = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header |= {f"n{number}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for number in range(1000)}
    text = json.dumps(header).encode()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(_header(text) + content[8 + length :])
    with pytest.raises(SourceError) as refused:
        read_adapter(tmp_path / "adapter")
    assert refused.value.error_code == "adapter_too_complex"


def test_a_side_file_of_absurd_size_is_not_copied(tmp_path: Path) -> None:
    """A hole of a terabyte is a terabyte once it is published."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.model").touch()
    os.truncate(tmp_path / "base" / "tokenizer.model", MAX_SIDE_FILE_BYTES + 1)
    with pytest.raises(SourceError) as refused:
        side_files(tmp_path / "base", tmp_path / "adapter")
    assert refused.value.error_code == "side_file_too_large"


def test_an_adapter_of_absurd_size_is_not_read_for_its_checksum(tmp_path: Path) -> None:
    """A hole of an exabyte would be read to the end."""
    make_adapter("gemma3_text", save_base("gemma3_text", tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "adapter" / "more.bin").touch()
    os.truncate(tmp_path / "adapter" / "more.bin", 1 << 42)
    with pytest.raises(SourceError) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store")
    assert refused.value.error_code == "file_too_large"


@pytest.mark.parametrize("number", ["9" * 4300, "-1", "true", "1e3", "2147483648"])
def test_an_added_token_of_an_absurd_number_is_none(number: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(f'{{"added_tokens": [{{"id": {number}, "content": "x"}}, {{"id": 7}}]}}')
    assert highest_added_token({"tokenizer.json": path}) == 7


def test_a_config_that_no_reader_agrees_on_is_no_base(tmp_path: Path) -> None:
    save_base("gemma3_text", tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gemma3_text", "model_type": "llama"}')
    with pytest.raises(SourceError) as refused:
        open_base(str(tmp_path / "base"), None, lambda: None)
    assert refused.value.error_code == "base_config_invalid"
