"""`gemma-export doctor` as its user runs it: on a laptop, and pointed at a whole deployment."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.cloud import firestore

from dispatcher.cli import IDENTITIES, main
from dispatcher.permissions import Identity
from infra.local import servers
from infra.local.cloud import BUCKET, PROJECT, Cloud, local_cloud
from infra.local.hub import serving
from infra.local.hub_state import TOKEN, Hub
from tests.conftest import missing
from tests.end_to_end.laptop import CLI, Laptop

FIELDS = {
    *("check", "outcome", "code", "asked", "permission", "resource", "identities", "why", "message", "remedy"),
}
BLOCKED = "import sys; sys.modules['torch'] = None; from dispatcher.cli import main; main()"
"""A command line whose Python has no torch."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(Hub(tmp_path)) as found:
        yield found


@pytest.fixture
def laptop(tmp_path: Path, hub: Hub) -> Laptop:
    return Laptop(tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")


def faults(lines: list[dict[str, Any]]) -> dict[str, str]:
    return {line["check"]: line["code"] for line in lines if line["outcome"] in ("missing", "wrong")}


def test_a_laptop_is_sound_and_nothing_is_made_on_it(laptop: Laptop) -> None:
    """Not even the state directory, which the first export makes."""
    lines = laptop.lines("doctor")
    assert faults(lines) == {}
    assert {line["check"] for line in lines if line["check"].startswith("laptop.")} == {
        *("laptop.artifacts", "laptop.records", "laptop.exporter", "laptop.llama_cpp"),
    }
    assert list(laptop.root.iterdir()) == []


def test_a_laptop_is_sound_without_the_hub(laptop: Laptop) -> None:
    """Whether it is not reached, or meant not to be."""
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}):
        laptop.environment |= environment
        lines = laptop.lines("doctor")
        assert faults(lines) == {}
        assert {line["check"] for line in lines if line["outcome"] == "unknown"} == {"hub"}


def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(laptop: Laptop) -> None:
    """Before anything is asked with it."""
    token = "hf_tökenOfAnn"
    done = laptop.run("doctor", "--json", HF_TOKEN=token)
    assert done.returncode == 1
    (refusal,) = map(json.loads, done.stdout.splitlines())
    assert refusal["code"] == "misconfigured"
    assert "HF_TOKEN is no token: expected 1 to 512 printable ASCII characters" in refusal["detail"]
    assert token not in done.stdout + done.stderr


def test_a_laptop_without_a_place_for_its_state_is_said(laptop: Laptop) -> None:
    """A file is where the directory would be; or the records in it are none."""
    (laptop.root / "file").write_text("")
    laptop.environment["GEMMA_EXPORT_HOME"] = str(laptop.root / "file" / "home")
    found = faults(laptop.lines("doctor", code=1))
    assert found == dict.fromkeys(("laptop.artifacts", "laptop.records"), "state_not_writable")
    laptop.home.mkdir()
    (laptop.home / "records.db").write_bytes(b"no database" * 100)
    laptop.environment["GEMMA_EXPORT_HOME"] = str(laptop.home)
    assert faults(laptop.lines("doctor", code=1)).keys() == {"laptop.records"}


def test_a_laptop_without_the_exporter_is_said(laptop: Laptop) -> None:
    """Or without llama.cpp, which lies beside the Python that runs."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "doctor"],
        env=laptop.environment,
        cwd=laptop.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "MISSING      laptop.exporter" in done.stdout
    assert "not installed: torch (exporter_missing)" in done.stdout

    elsewhere = laptop.root / "venv"
    venv.create(elsewhere, with_pip=False)
    (packages,) = elsewhere.glob("lib/python*/site-packages")
    places = [path for path in sys.path if path.endswith("site-packages")] + [str(Path(__file__).parents[2])]
    (packages / "shared.pth").write_text("\n".join(places))
    command = [str(elsewhere / "bin" / "python"), *CLI[1:], "doctor", "--json"]
    done = subprocess.run(command, env=laptop.environment, cwd=laptop.root, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert faults([json.loads(line) for line in done.stdout.splitlines()]) == {"laptop.llama_cpp": "llama_cpp_missing"}


def test_the_command_knows_every_identity() -> None:
    """Which it spells out, since it imports nothing before it runs; and says how to ask as one of them."""
    assert set(IDENTITIES) == {identity.value for identity in Identity}
    told = CliRunner().invoke(main, ["doctor", "--help"]).output
    assert "--impersonate-service-account" in told


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    root = tmp_path_factory.mktemp("doctor")
    try:
        with serving(Hub(root)) as hub, local_cloud(root, settings={"HF_ENDPOINT": hub.url}) as cloud:
            yield cloud
    except servers.MissingServerError as error:
        missing(error)


def asked(cloud: Cloud, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, "doctor", *arguments],
        env=cloud.environment | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.xdist_group("cloud")
def test_a_whole_deployment_is_sound_and_nothing_is_left_in_it(cloud: Cloud) -> None:
    """As an operator asks, and as a program reads it."""
    arguments = ("--adapters", f"gs://{BUCKET}/adapters", "--adapters", f"gs://{BUCKET}/more")
    done = asked(cloud, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith("0 MISSING, 0 WRONG, 2 cannot tell")
    done = asked(cloud, *arguments, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert all(line.keys() == FIELDS for line in lines)
    assert len({line["check"] for line in lines}) == len(lines)
    unknown = {line["check"]: line["code"] for line in lines if line["outcome"] == "unknown"}
    assert unknown == {"signing": "emulated", "topic.publish": "emulated"}
    assert [file for file in cloud.objects.rglob("*") if file.is_file() and BUCKET in file.parts] == []
    assert cloud.secrets.payloads() == []
    assert cloud.run.executions == []
    client = firestore.Client(project=PROJECT)
    assert [each.id for name in ("exports", "training_jobs") for each in client.collection(name).list_documents()] == []
    client.close()


@pytest.mark.xdist_group("cloud")
def test_what_a_deployment_lacks_is_said_to_whom_it_concerns(cloud: Cloud) -> None:
    """The exit code too: one identity may lack what another does not need."""
    cloud.run.denied = {"run.executions.cancel"}
    cloud.secrets.denied = {"secretmanager.versions.access"}
    done = asked(cloud, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (1, "")
    assert faults(lines) == dict.fromkeys(("job.cancel", "tokens.access"), "permission_denied")
    done = asked(cloud, "--as", "exporter")
    assert done.returncode == 1
    assert "needs: secretmanager.versions.access on" in done.stdout
    assert "job.cancel" not in done.stdout
    assert asked(cloud, "--as", "trigger", "--as", "sweeper").returncode == 0
    cloud.run.denied, cloud.secrets.denied = set(), set()


@pytest.mark.xdist_group("cloud")
def test_no_token_of_a_deployment_is_shown(cloud: Cloud) -> None:
    """Neither a good one nor a bad one, in neither form."""
    for token, code in ((TOKEN, 0), ("hf_badTokenOfNobody", 1)):
        for form in ((), ("--json",)):
            done = asked(cloud, "--as", "exporter", *form, HF_TOKEN=token)
            assert done.returncode == code
            assert token not in done.stdout + done.stderr


@pytest.mark.xdist_group("cloud")
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(cloud: Cloud) -> None:
    """A setting, an identity, a place for adapters."""
    done = asked(cloud, "--json", "--adapters", os.devnull)
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == "uri_unsupported"
    done = asked(cloud, "--json", PROJECT_ID="")
    assert json.loads(done.stdout)["code"] == "misconfigured"
    assert asked(cloud, "--as", "nobody").returncode == 2
