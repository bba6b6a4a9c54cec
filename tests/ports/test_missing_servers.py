"""Where a server is not on the machine: a laptop skips its tests and says so loudly, CI fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_tests_without_their_server_are_skipped_loudly_and_fail_in_ci(ci: str, code: int, tmp_path: Path) -> None:
    """The emulators and Java are found by PATH, which is empty here."""
    environment = {**os.environ, "PATH": str(tmp_path), "CI": ci}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/ports/test_jobqueue.py",
        "-k",
        "arrives",
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stdout
    loud = [line for line in run.stdout.splitlines() if "WERE SKIPPED" in line]
    assert [line.startswith("1 TESTS AGAINST GOOGLE'S SERVERS") for line in loud] == ([] if ci else [True])
    assert "MISSING SERVER" in run.stdout
    assert "1 passed" in run.stdout
