"""A hub on loopback for a test, and programs that speak to it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.local.hub import serving
from infra.local.hub_state import COMMIT, NARROW_TOKEN, OTHER_TOKEN, TOKEN, Fault, Hub

__all__ = [
    "COMMIT",
    "NARROW_TOKEN",
    "OTHER_TOKEN",
    "TOKEN",
    "Fault",
    "Hub",
    "hub_serving",
    "in_a_process",
    "pointing_at",
]


@contextmanager
def hub_serving(directory: Path) -> Iterator[Hub]:
    """Serve the files of `directory` as `google/tiny` until the block ends."""
    with serving(Hub(directory)) as hub:
        yield hub


def pointing_at(hub: Hub, patch: pytest.MonkeyPatch, cache: Path | None = None) -> None:
    """Let the client in this process speak to this hub: it has read HF_ENDPOINT and HF_HUB_OFFLINE when imported."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    if cache:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))


def in_a_process(hub: Hub, cache: Path, code: str, *arguments: str) -> list[str]:
    """What a program prints that speaks to this hub; a process of its own, as the client reads its settings once."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
