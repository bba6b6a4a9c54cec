"""The bench measures what it says: inputs that the libraries accept, and the largest process of a whole family."""

import math
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import safetensors.torch

from tests.bench import killed, tasks
from tests.bench.deployment import BUCKET
from tests.bench.disk import written_to
from tests.bench.inputs import Size, prepare, shards_of
from tests.bench.measure import measured
from tests.bench.servers import noted_servers
from tests.buckets import bucket_named
from tests.gemmas import file_tensors, load_model, peft_merged, same_bits
from tests.waiting import until

LARGE = 9 << 20
"""Bytes that the client does not send in one request"""
MINI = Size("mini", 2, 32, 64, 2, 1, 320, shard_bytes=30_000, head_dim=16)


def test_the_inputs_are_a_model_and_an_adapter_that_fit(tmp_path: Path) -> None:
    base, adapter = prepare(MINI, tmp_path)
    stored = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    before, after = load_model(base).state_dict(), peft_merged(base, adapter)
    changed = {name for name, tensor in after.items() if not same_bits(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in MINI.linears()}
    assert len(stored) == 2 * len(changed)
    assert len(list(base.glob("*.safetensors"))) > 1
    assert sum(tensor.nbytes for tensor in file_tensors(base).values()) == round(MINI.gigabytes * 1e9)


def test_inputs_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    base, _ = prepare(MINI, tmp_path)
    written = base.stat().st_mtime_ns
    assert prepare(MINI, tmp_path)[0].stat().st_mtime_ns == written


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is read from /proc")
def test_the_peak_is_that_of_the_largest_process_below() -> None:
    large = "import time; held = bytes(200_000_000) + b'1'; time.sleep(0.3)"
    small = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {large!r}], check=True); print('done')"
    result = measured([sys.executable, "-c", small], dict(os.environ))
    assert result.output == "done\n"
    assert 190_000_000 < result.peak_bytes < 500_000_000
    assert result.seconds > 0.3


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what was written is read from /proc")
def test_what_was_written_counts_even_when_it_is_gone(tmp_path: Path) -> None:
    """And a hole in a file does not."""
    child = (
        "import os, time\n"
        "with open('gone', 'wb') as file: file.write(bytes(30_000_000))\n"
        "os.remove('gone')\n"
        "with open('hole', 'wb') as file: file.truncate(10**9)\n"
        "time.sleep(0.3)\n"
    )
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], cwd={str(tmp_path)!r})"
    result = measured([sys.executable, "-c", command], dict(os.environ))
    assert 30_000_000 <= result.written_bytes < 40_000_000


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        measured([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ))


def test_files_that_are_removed_again_were_on_the_disk(tmp_path: Path) -> None:
    """With the size they had at most."""
    with written_to(tmp_path) as found:
        (tmp_path / "folder").mkdir()
        gone, stays = tmp_path / "folder" / "gone", tmp_path / "stays"
        gone.write_bytes(bytes(1000))
        until(lambda: found.get("folder/gone"), "the file to be seen")
        gone.unlink()
        stays.write_bytes(bytes(10))
    assert found == {"folder/gone": 1000, "stays": 10}


@pytest.mark.parametrize("size", [killed.BASE, tasks.BASE])
def test_the_bases_that_are_dealt_out_have_eight_shards_of_one_size(size: Size) -> None:
    sizes = [sum(math.prod(shape) * 2 for shape in shard.values()) for shard in shards_of(size)]
    assert len(sizes) == 8
    assert max(sizes) < 1.03 * min(sizes)


def test_what_is_uploaded_is_noted_by_object_even_if_its_sender_dies(
    tmp_path: Path, storage_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a request is bytes sent, and nothing that the service acts on."""
    del storage_server  # that fake-gcs-server is here
    name, secret = "merged_models/a/1/model.safetensors", "hf_secretOfAnn"
    with noted_servers(tmp_path, tmp_path / "objects", secret=secret) as servers:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", servers.storage.url)
        bucket_named(BUCKET).blob(name).upload_from_string(secret.encode() + bytes(LARGE))
        url = urlsplit(servers.storage.url)
        with socket.create_connection((url.hostname, url.port)) as dying:
            path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=multipart&name=dying"
            dying.sendall(f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{'x' * 40}".encode())
        until(lambda: servers.storage.uploaded["dying"], "the half request")
        assert servers.storage.uploaded == {name: len(secret) + LARGE, "dying": 40}
        assert servers.storage.begun == {name: 1, "dying": 1}
        assert servers.storage.at_once == 1
        assert len(servers.storage.bodies_with) == 1
        assert [found.name for found in bucket_named(BUCKET).list_blobs()] == [name]
        servers.storage.forget()
        assert not servers.storage.uploaded
