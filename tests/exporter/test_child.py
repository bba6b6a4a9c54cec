"""Programs in a process of their own: their environment, their end, and what they leave."""

import sys
import time
from pathlib import Path

import pytest

from exporter.child import environment, run_child


def _run(place: Path, code: str, *, seconds: float | None = None, while_waiting=lambda: None) -> int | None:  # type: ignore[no-untyped-def]  # a callable
    command = (sys.executable, "-P", "-c", code)
    return run_child(command, place, environment=environment(), while_waiting=while_waiting, seconds=seconds)


def test_a_program_inherits_what_it_needs_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hugging Face token in this process's environment is not in the child's."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert _run(tmp_path, "import os; print(sorted(os.environ))") == 0
    names = (tmp_path / "log").read_text()
    assert "HF_TOKEN" not in names
    assert "PATH" in names


def test_what_a_program_prints_and_how_it_ends_are_told(tmp_path: Path) -> None:
    """Both streams are in the log; a signal is a negative status."""
    assert _run(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)") == 3
    assert {*(tmp_path / "log").read_text().split()} == {"out", "err"}
    assert _run(tmp_path, "import os; os.abort()") == -6


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """None is its status, and it is gone."""
    started = time.monotonic()
    assert _run(tmp_path, "import time; time.sleep(60)", seconds=0.2) is None
    assert time.monotonic() - started < 30


def test_what_is_raised_while_waiting_ends_the_program(tmp_path: Path) -> None:
    """A lost lease, say."""

    def stop() -> None:
        raise KeyError("stop")

    code = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'left')!r}).touch()"
    with pytest.raises(KeyError):
        _run(tmp_path, code, while_waiting=stop)
    time.sleep(4)
    assert not (tmp_path / "left").exists()
