"""A file system with little room, where this machine lets us mount one: for what a full disk does."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest


def run_with_small_disk(
    command: Sequence[str], at: Path, options: str, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a program with a file system of its own mounted in a place; its output ends with the names of
    the files that it leaves there.

    Args:
        command: What to run.
        at: Where, an empty directory.
        options: Of the mount: `size=8m`.
        environment: All of its environment.
    """
    mount = f"mount -t tmpfs -o {options} tmpfs '{at}'"
    probe = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False)  # noqa: S607
    if probe.returncode != 0:
        assert not os.environ.get("CI"), f"CI must run this test: {probe.stderr.decode()}"
        pytest.skip("this machine allows no mount in a namespace of its own")
    script = f"{mount} && \"$@\"; code=$?; find '{at}' ! -type d; exit $code"
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command],  # noqa: S607
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
