"""The build: its scripts are run, with programs in place of docker, gcloud and apt that write down what is asked."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml

from infra.images_dockerfile import read
from infra.locks import ROOT
from tests.terraform.running import PROJECT, Resource, Terraform

TEXT = (ROOT / "cloudbuild.yaml").read_text()
BUILD: dict[str, Any] = yaml.safe_load(TEXT)
STEPS = {step["id"]: step for step in BUILD["steps"]}
SUBSTITUTIONS = {**BUILD["substitutions"], "PROJECT_ID": PROJECT, "BUILD_ID": "some-build", "_REGION": "some-region"}
REPOSITORY = f"some-region-docker.pkg.dev/{PROJECT}/gemma-export"
DIGESTS = {"dispatcher": f"sha256:{'ab' * 32}", "exporter": f"sha256:{'cd' * 32}"}
EPOCHS = {name: read(ROOT / name / "Dockerfile").arguments["SOURCE_DATE_EPOCH"] for name in DIGESTS}
REPLACED = ("apt-get", "bash", "docker", "gcloud", "terraform")
# It leaves behind what buildx would, with the digest that the test says, and fails where the test says.
PROGRAM = """#!{python}
import json, os, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["ASKED"], "a") as asked:
    asked.write(json.dumps([name, arguments, dict(os.environ)]) + "\\n")
if "--metadata-file" in arguments:
    digest = os.environ["DIGEST"]
    told = {{"containerimage.descriptor": {{"digest": "sha256:00", "size": 1}}, "containerimage.digest": digest}}
    with open(arguments[arguments.index("--metadata-file") + 1], "w") as file:
        json.dump(told, file, indent=2)
sys.exit(name == os.environ.get("FAILS"))
"""


@dataclass(frozen=True)
class Asked:
    """What a program was asked."""

    program: str
    arguments: list[str]
    environment: Mapping[str, str]

    def options(self, *, after: int) -> dict[str, list[str]]:
        """What follows the words of a command, by option; as a shell splits them, `--a b` or `--a=b`."""
        found: dict[str, list[str]] = {}
        rest = iter(self.arguments[after:])
        for word in rest:
            name, sign, value = word.partition("=")
            assert name.startswith("--"), word
            found.setdefault(name, []).append(value if sign else next(rest, ""))
        return found


class Workspace:
    """A build's /workspace, from which one step after the other is run, in the checkout."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.programs, self._asked = directory, directory / "programs", directory / "asked"
        self.programs.mkdir()
        for name in REPLACED:
            (self.programs / name).write_text(PROGRAM.format(python=sys.executable))
            (self.programs / name).chmod(0o755)

    def run(self, step: str, *, digest: str = "", fails: str = "", **substitutions: str) -> list[Asked]:
        """A step's script, in the environment that Cloud Build would give it; what it asked of programs."""
        told = Template("\n".join([*BUILD["options"]["env"], *STEPS[step].get("env", [])]))
        lines = told.substitute({**SUBSTITUTIONS, **substitutions}).splitlines()
        environment = dict(line.split("=", 1) for line in lines) | {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "ASKED": str(self._asked),
            "DIGEST": digest,
            "FAILS": fails,
        }
        text = STEPS[step].get("script") or STEPS[step]["args"][1]
        # Of the two places that a build has, one is here and the other is an image's.
        text = text.replace("/workspace/", f"{self.directory}/").replace(" /bin/", f" {self.programs}/")
        interpreter = "/bin/bash" if "bash" in text.partition("\n")[0] else "/bin/sh"
        self._asked.write_text("")
        command = [interpreter, "-c", text]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(done.stderr)
        return self.asked()

    def asked(self) -> list[Asked]:
        """What the last step asked."""
        return [Asked(*json.loads(line)) for line in self._asked.read_text().splitlines()]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def build(workspace: Workspace, name: str, digest: str, **substitutions: str) -> dict[str, list[str]]:
    """The options of the one `docker buildx build .` that a step runs."""
    (asked,) = workspace.run(name, digest=digest, **substitutions)
    assert [asked.program, *asked.arguments[:3]] == ["docker", "buildx", "build", "."]
    return asked.options(after=3)


def test_the_suite_is_run_with_what_it_needs(workspace: Workspace) -> None:
    """As in any CI, with Terraform; on as many workers as there is memory for, and after all was installed."""
    workspace.run("terraform")
    *apt, suite = workspace.run("verify")
    assert (suite.program, suite.arguments) == ("bash", [".ci/run"])
    assert suite.environment["CI"] == "true"
    assert shutil.which("terraform", path=suite.environment["PATH"]) == str(workspace.directory / ".bin" / "terraform")
    assert [one.program for one in apt] == ["apt-get", "apt-get"]
    assert apt[0].arguments[0] == "update"
    assert {"install", "--no-install-recommends"} <= set(apt[1].arguments)
    assert {"g++", "gcc", "libgomp1", "make", "python3-dev", "python3-venv"} <= set(apt[1].arguments)
    assert [package for package in apt[1].arguments if re.fullmatch(r"(default|openjdk-\d+)-jre-headless", package)]
    workers, memory = suite.environment["PYTEST_XDIST_AUTO_NUM_WORKERS"], BUILD["options"]["machineType"]
    assert 3 * int(workers) <= int(memory.removeprefix("E2_HIGHCPU_"))  # GB, of which that machine has one for each CPU


def test_a_suite_that_fails_ends_the_build(workspace: Workspace) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        workspace.run("verify", fails="bash")
    assert workspace.asked()[-1].program == "bash"


def test_it_is_left_out_where_that_is_asked_for_and_nowhere_else(workspace: Workspace) -> None:
    """A word that means neither is no leave to deploy what nobody tested."""
    assert workspace.run("verify", _VERIFY="false") == []
    for unclear in ("", "True", "no"):
        with pytest.raises(ValueError, match="expected true or false"):
            workspace.run("verify", _VERIFY=unclear)


@pytest.mark.parametrize(
    ("name", "arguments", "cache"),
    [
        ("dispatcher", [], "cache"),
        ("exporter", ["VARIANT=v", "TORCH_INDEX=index"], "cache-v"),
    ],
)
def test_each_image_is_built_pushed_and_cached(
    workspace: Workspace, name: str, arguments: list[str], cache: str
) -> None:
    """From its own Dockerfile, under the build's id; its digest is left for the deployment."""
    options = build(workspace, name, DIGESTS[name], _VARIANT="v", _TORCH_INDEX="index")
    assert sorted(options.pop("--build-arg")) == sorted([f"SOURCE_DATE_EPOCH={EPOCHS[name]}", *arguments])
    (output,) = options.pop("--output")
    assert set(output.split(",")) == {
        "type=image",
        f"name={REPOSITORY}/{name}:some-build",
        "push=true",
        "rewrite-timestamp=true",
    }
    kept = f"type=registry,ref={REPOSITORY}/{name}:{cache}"
    assert options == {
        "--builder": ["builder"],
        "--file": [f"{name}/Dockerfile"],
        "--provenance": ["false"],
        "--cache-from": [kept],
        "--cache-to": [f"{kept},mode=max"],
        "--metadata-file": [str(workspace.directory / f"{name}.json")],
    }


def test_an_image_that_cannot_be_built_ends_the_build(workspace: Workspace) -> None:
    for name in DIGESTS:
        with pytest.raises(ValueError, match=r"^$"):
            workspace.run(name, fails="docker")


def test_there_is_one_time_for_all_files() -> None:
    """The Dockerfiles say it; a build that said another would compile with that."""
    assert len(set(EPOCHS.values())) == 1
    assert not re.search(r"EPOCH\W+\d", TEXT)


def test_the_builder_is_of_a_pinned_image() -> None:
    """Or buildx would pull whatever is called stable today."""
    asked = Asked("docker", STEPS["builder"]["args"], {})
    assert asked.arguments[:2] == ["buildx", "create"]
    options = {name: value for name, (value,) in asked.options(after=2).items()}
    assert (options["--name"], options["--driver"]) == ("builder", "docker-container")
    assert re.fullmatch(r"image=moby/buildkit:v\d+\.\d+\.\d+", options["--driver-opt"])


def test_job_and_functions_are_deployed_by_the_digests_that_were_built(
    workspace: Workspace, plan: list[Resource]
) -> None:
    """All that Terraform made for them, the job first, and nothing else; in the project and region of the build."""
    for name, digest in DIGESTS.items():
        build(workspace, name, digest)
    job, *services = workspace.run("deploy")
    assert job.arguments[:4] == ["run", "jobs", "update", "gemma-exporter"]
    made = [each.values["name"] for each in plan if each.kind == "google_cloud_run_v2_service"]
    told = [each.arguments[:4] for each in services]
    assert sorted(told) == sorted(["run", "services", "update", name] for name in made)
    for each, image in [(job, "exporter"), *((service, "dispatcher") for service in services)]:
        assert each.program == "gcloud"
        assert each.options(after=4) == {
            "--project": [PROJECT],
            "--region": ["some-region"],
            "--image": [f"{REPOSITORY}/{image}@{DIGESTS[image]}"],
        }


@pytest.mark.parametrize("digest", ["", "latest", "sha256:ab", f"md5:{'ab' * 32}"])
def test_what_has_no_digest_is_not_deployed(workspace: Workspace, digest: str) -> None:
    """Neither it nor the image that has one."""
    build(workspace, "exporter", DIGESTS["exporter"])
    build(workspace, "dispatcher", digest)
    with pytest.raises(ValueError, match=r"^$"):
        workspace.run("deploy")
    assert workspace.asked() == []


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


def test_every_step_is_of_a_pinned_image_but_for_googles_own_tools() -> None:
    """Those are deleted after a year, version by version: a pinned one would be gone on some day."""
    tools = "gcr.io/google.com/cloudsdktool/google-cloud-cli"
    floating = {name: step["name"] for name, step in STEPS.items() if step["name"].startswith(tools)}
    assert floating == {"verify": f"{tools}:emulators", "deploy": f"{tools}:slim"}
    for name in STEPS.keys() - floating.keys():
        assert re.fullmatch(r"(docker|hashicorp/terraform):\d+\.\d+\.\d+(-\w+)?", STEPS[name]["name"])
    assert ":latest" not in TEXT


def test_nothing_is_built_that_is_not_verified_nor_deployed_that_is_not_built() -> None:
    """Both images wait for the tests and for what builds them, and the deployment for both."""
    assert {name: step.get("waitFor") for name, step in STEPS.items()} == {
        "terraform": None,
        "verify": ["terraform"],
        "builder": ["-"],
        "dispatcher": ["verify", "builder"],
        "exporter": ["verify", "builder"],
        "deploy": ["dispatcher", "exporter"],
    }


@pytest.mark.parametrize("step", [name for name, step in STEPS.items() if "script" in step])
def test_each_script_uses_what_it_is_given(step: str) -> None:
    """Variables of the options, and no substitution, which Cloud Build does not fill in there."""
    given = {line.partition("=")[0] for line in BUILD["options"]["env"]}
    used = set(re.findall(r"\$\{?([A-Z_]+)", STEPS[step]["script"]))
    assert used <= given | {"PATH"}
