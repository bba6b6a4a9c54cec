"""The build: what it deploys, by what name, and that it is by digest."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.terraform.running import PROJECT, Resource, Terraform

FILE = Path(__file__).parents[2] / "cloudbuild.yaml"
TEXT = FILE.read_text()
BUILD: dict[str, Any] = yaml.safe_load(TEXT)
STEPS = {step["id"]: step for step in BUILD["steps"]}
DIGESTS = {"dispatcher": f"sha256:{'ab' * 32}", "exporter": f"sha256:{'cd' * 32}"}
REPOSITORY = "some-region-docker.pkg.dev/some-project/gemma-export"
# In the place of gcloud, which would deploy: it writes down what it was asked.
GCLOUD = '#!/bin/sh\nprintf "%s\\n" "$*" >> "$ASKED"\n'


@pytest.fixture
def deployed(tmp_path: Path) -> list[str]:
    """What gcloud was asked by the real script, after a build that pushed two images."""
    return deploy(tmp_path, DIGESTS)


def deploy(directory: Path, digests: dict[str, str]) -> list[str]:
    for name, digest in digests.items():
        (directory / f"{name}.json").write_text(json.dumps({"containerimage.digest": digest}))
    (directory / "gcloud").write_text(GCLOUD)
    (directory / "gcloud").chmod(0o755)
    script = STEPS["deploy"]["script"].replace("/workspace/", f"{directory}/")
    environment = {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "ASKED": str(directory / "asked"),
        "REPOSITORY": REPOSITORY,
        "REGION": "some-region",
    }
    command = ["/bin/bash", "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    asked = directory / "asked"
    if run.returncode:
        assert not asked.exists(), "something was deployed by a build that failed"
        raise ValueError(run.stderr)
    return asked.read_text().splitlines()


def test_job_and_functions_are_deployed_by_digest(deployed: list[str], plan: list[Resource]) -> None:
    """All that Terraform made for them, the job first, and nothing else."""
    form = re.compile(r"run (\w+) update ([\w-]+) --region=some-region --image=(\S+)")
    job, *services = (form.fullmatch(line) for line in deployed)
    assert job
    assert all(services)
    made = {each.values["name"] for each in plan if each.kind == "google_cloud_run_v2_service"}
    assert job.groups() == ("jobs", "gemma-exporter", f"{REPOSITORY}/exporter@{DIGESTS['exporter']}")
    told = [service.groups() for service in services if service]
    assert {name for _, name, _ in told} == made
    assert {(kind, image) for kind, _, image in told} == {
        ("services", f"{REPOSITORY}/dispatcher@{DIGESTS['dispatcher']}")
    }


@pytest.mark.parametrize("digest", ["", "latest", "sha256:ab", f"md5:{'ab' * 32}"])
def test_what_has_no_digest_is_not_deployed(tmp_path: Path, digest: str) -> None:
    """Neither it nor the image that has one."""
    with pytest.raises(ValueError, match=r"^"):
        deploy(tmp_path, {**DIGESTS, "dispatcher": digest})


def test_it_names_what_terraform_makes(plan: list[Resource], deployment: Terraform) -> None:
    """Account, repository and substitutions."""
    values = {each.address: each.values for each in plan}
    account = values["google_service_account.builder"]["email"]
    assert BUILD["serviceAccount"].replace("$PROJECT_ID", PROJECT).endswith(f"/{account}")
    repository = values["google_artifact_registry_repository.images"]["repository_id"]
    assert f"REPOSITORY=${{_REGION}}-docker.pkg.dev/$PROJECT_ID/{repository}" in BUILD["options"]["env"]
    said = re.findall(r"(_\w+)=", deployment.outputs()["build"])
    assert set(said) <= BUILD["substitutions"].keys()


def test_every_substitution_is_used_and_explained() -> None:
    """In the comment at the top."""
    comment = "\n".join(line for line in TEXT.splitlines() if line.startswith("#"))
    for name in BUILD["substitutions"]:
        assert f"${{{name}}}" in TEXT
        assert re.search(rf"^#   {name} ", comment, re.MULTILINE)


def test_every_step_is_of_a_pinned_image() -> None:
    """By an exact version."""
    for step in STEPS.values():
        assert re.fullmatch(r"[^:]+:\d+\.\d+\.\d+(-\w+)?", step["name"])
    assert ":latest" not in TEXT


def test_nothing_is_built_that_is_not_verified_nor_deployed_that_is_not_built() -> None:
    """Both images wait for the tests, and the deployment for both."""
    assert "verify" in STEPS["dispatcher"]["waitFor"]
    assert "verify" in STEPS["exporter"]["waitFor"]
    assert STEPS["deploy"]["waitFor"] == ["dispatcher", "exporter"]
    assert "bash .ci/run" in STEPS["verify"]["script"]


@pytest.mark.parametrize("step", [name for name, step in STEPS.items() if "script" in step])
def test_each_script_uses_what_it_is_given(step: str) -> None:
    """Variables of the options, and no substitution, which Cloud Build does not fill in there."""
    given = {line.partition("=")[0] for line in BUILD["options"]["env"]}
    used = set(re.findall(r"\$\{?([A-Z_]+)", STEPS[step]["script"]))
    assert used <= given | {"PATH"}
