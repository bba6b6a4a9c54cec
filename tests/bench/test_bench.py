"""The bench measures what it says: inputs that the libraries accept, and the largest process of a whole family."""

import os
import sys
from pathlib import Path

import pytest
import safetensors.torch

from tests.bench.inputs import Size, prepare
from tests.bench.measure import measured
from tests.gemmas import file_tensors, load_model, peft_merged, same_bits

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
