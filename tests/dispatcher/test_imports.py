"""The dispatcher stays light: what its import loads, in a fresh interpreter."""

import json
import os
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


def test_a_cold_start_on_google_cloud_loads_only_what_every_request_needs() -> None:
    """What starts jobs, publishes messages and keeps tokens is loaded by the first request that does."""
    program = (
        "import json, sys, time; began = time.perf_counter(); import dispatcher.main; "
        "from dispatcher import bootstrap; bootstrap.current(); took = time.perf_counter() - began; "
        "print(json.dumps([took, sorted(sys.modules)]))"
    )
    nowhere = "127.0.0.1:1"
    emulated = dict.fromkeys(("FIRESTORE_EMULATOR_HOST", "PUBSUB_EMULATOR_HOST"), nowhere)
    environment = {**os.environ, **emulated, "STORAGE_EMULATOR_HOST": f"http://{nowhere}", "PROJECT_ID": "p"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    seconds, modules = json.loads(run.stdout)
    print(f"a cold start took {seconds:.2f} s")  # noqa: T201  # a machine's load is no reason to fail
    later = ("google.cloud.run_v2", "google.cloud.pubsub_v1", "google.cloud.secretmanager", "jwt")
    heavy = (*later, "torch", "transformers", "safetensors", "peft", "huggingface_hub", "exporter")
    assert "google.cloud.firestore" in modules
    assert [name for name in modules if name in heavy] == []
