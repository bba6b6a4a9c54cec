"""Scratch directories: gone with the process that made them, however it ended."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from exporter.scratch import scratch_directory

KILLED = """
import os, signal
from exporter.scratch import scratch_directory

with scratch_directory() as place:
    (place / "half").write_bytes(b"written")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_scratch_directory_is_empty_and_gone_afterwards(temporary: Path) -> None:
    """Whatever is in it."""
    with scratch_directory() as place:
        assert [*place.iterdir()] == []
        assert temporary in place.parents
        (place / "file").touch()
    assert [*temporary.iterdir()] == []


def test_what_a_killed_process_left_is_removed_by_the_next(temporary: Path) -> None:
    """What a living one has stays; and so does what is none of ours."""
    (temporary / "gemma-export-demo-1").mkdir()
    with scratch_directory() as living:
        subprocess.run([sys.executable, "-c", KILLED], check=False)
        assert len([*temporary.glob("*/content/half")]) == 1
        with scratch_directory():
            assert [*temporary.glob("*/content/half")] == []
            assert living.is_dir()
    assert [path.name for path in temporary.iterdir()] == ["gemma-export-demo-1"]
