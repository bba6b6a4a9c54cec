"""The dispatcher stays light: what its import loads, in a fresh interpreter."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "safetensors", "peft", "huggingface_hub", "exporter", "google.cloud", "rich")
# An empty `google.cloud` is there before anything is imported: a .pth file of a namespace package makes it.


@pytest.mark.parametrize("module", ["dispatcher.main", "dispatcher.cli", "dispatcher.client"])
def test_importing_the_dispatcher_loads_nothing_heavy(module: str) -> None:
    """Neither the exporter nor any of its libraries, nor a client of Google's."""
    program = (
        "import json, sys, time; before = set(sys.modules); began = time.perf_counter(); "
        f"import {module}; took = time.perf_counter() - began; "
        "print(json.dumps([took, sorted(set(sys.modules) - before)]))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(run.stdout)
    print(f"importing {module} took {seconds:.2f} s")  # noqa: T201  # a machine's load is no reason to fail
    assert [name for name in modules if name.startswith(HEAVY)] == []
