"""The real `terraform`, run on a copy of `infra/` with providers that stand in for Google's."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.local.servers import MissingServerError
from tests.terraform.provider import providers

INFRA = Path(__file__).parents[2] / "infra"
PROJECT = "some-project"
_LOCAL_STATE = 'terraform {\n  backend "local" {}\n}\n'
_SECONDS = 120


class TerraformError(Exception):
    """Terraform refused; the message is what it said."""


@dataclass(frozen=True)
class Resource:
    """A resource of a plan, with every value that it will have."""

    kind: str
    name: str
    key: str | int | None
    values: Mapping[str, Any]

    @property
    def address(self) -> str:
        """As in the configuration, without what tells several of it apart."""
        return f"{self.kind}.{self.name}"


@dataclass(frozen=True)
class Terraform:
    """A copy of the configuration, ready to be planned."""

    directory: Path
    environment: Mapping[str, str]

    def validate(self) -> None:
        """As `terraform validate`.

        Raises:
            TerraformError: Something is wrong with it.
        """
        self.run("validate")

    def plan(self, **variables: object) -> list[Resource]:
        """What would be made in a new project.

        Raises:
            TerraformError: A variable is refused, or something is wrong with the configuration.
        """
        return _resources(self._planned(variables)["planned_values"]["root_module"])

    def outputs(self, **variables: object) -> dict[str, Any]:
        """The outputs that there would be."""
        return {name: told["value"] for name, told in self._planned(variables)["planned_values"]["outputs"].items()}

    def run(self, *arguments: str) -> str:
        """One command of Terraform's; what it says."""
        command = ["terraform", *arguments, "-no-color"]
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode:
            raise TerraformError(done.stderr or done.stdout)
        return done.stdout

    def _planned(self, variables: Mapping[str, object]) -> Any:
        told = {"project_id": PROJECT, **variables}
        (self.directory / "terraform.tfvars.json").write_text(json.dumps(told))
        self.run("plan", "-input=false", "-out=plan")
        return json.loads(self.run("show", "-json", "plan"))


@contextmanager
def terraform(directory: Path) -> Iterator[Terraform]:
    """A copy of `infra/` under a directory, initialized.

    Raises:
        MissingServerError: Terraform is not on this machine.
    """
    if shutil.which("terraform") is None:
        raise MissingServerError("terraform: install Terraform, version 1.9 or newer")
    # Nothing of an operator's: values, state or plans may lie beside them.
    for path in [*INFRA.glob("*.tf"), INFRA / "openapi.yaml", INFRA / "firestore.indexes.json"]:
        shutil.copy(path, directory)
    # State goes to a bucket, which is not there.
    (directory / "backend_override.tf").write_text(_LOCAL_STATE)
    with providers() as attached:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        quiet = {"CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1", "TF_CLI_CONFIG_FILE": os.devnull}
        ready = Terraform(directory, {**kept, **quiet, "TF_REATTACH_PROVIDERS": attached})
        ready.run("init", "-input=false")
        yield ready


def _resources(module: Mapping[str, Any]) -> list[Resource]:
    return [
        Resource(found["type"], found["name"], found.get("index"), found["values"])
        for found in module["resources"]
        if found["mode"] == "managed"
    ]
