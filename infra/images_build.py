"""Carries a Dockerfile's instructions out on this machine, in a directory that stands for the image's root.

Commands, environment and files are the Dockerfile's own. What differs: absolute places, which the Dockerfile has as
arguments, lie under that directory; apt's packages are looked for, not installed; and of the base image there is
nothing but this machine's system and Python.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.images_context import Context
from infra.images_dockerfile import Dockerfile, DockerfileError, Instruction, Stage, assignments, expanded, read, words
from infra.images_report import Report, StepFailed, say

_SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LISTS = "rm -rf /var/lib/apt/lists/*"
_ABSOLUTE = re.compile(r"(?<![\w$}).:/*-])/\w")
_PASSED_ON = re.compile(r"PIP_.*|SSL_CERT_.*|REQUESTS_CA_BUNDLE|(https?|no)_proxy", re.IGNORECASE)
"""How this machine's pip gets at its index, which a builder's may need too"""


@dataclass
class Image:
    """What a stage has become so far, and at the end what is run."""

    name: str
    root: Path
    environment: dict[str, str]
    workdir: Path
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)
    places: Mapping[str, str] = field(default_factory=dict)
    """The Dockerfile's absolute places, and where they are here"""


class Build:
    """One image's build."""

    def __init__(
        self,
        dockerfile: Path,
        context: Context,
        directory: Path,
        report: Report,
        *,
        arguments: Mapping[str, str] | None = None,
        kept: Mapping[str, Path] | None = None,
    ) -> None:
        """Read a Dockerfile.

        Args:
            dockerfile: Where it lies.
            context: What it may copy.
            directory: An empty one, for the image's root and its other stages.
            report: Where steps are told.
            arguments: As `--build-arg`.
            kept: Places that are this machine's own, by argument: a cache.

        Raises:
            DockerfileError: It is not of the subset that is read.
        """
        self.name = dockerfile.parent.name
        self._context, self._report = context, report
        self._stages, self._root = directory / "stages", directory / "root"
        self._kept = {name: str(path) for name, path in (kept or {}).items()}
        plain = read(dockerfile, arguments)
        self._standard = {name: value for name, value in plain.arguments.items() if value.startswith("/")}
        self.places = {name: f"{self._root}{value}" for name, value in self._standard.items()} | self._kept
        self._arguments = {**(arguments or {}), **self.places}
        self.file: Dockerfile = read(dockerfile, self._arguments)
        self._done: dict[str, Image] = {}
        self._current: Stage | None = None
        self._variables: dict[str, str] = {}

    def run(self) -> Image:
        """Carry all out that the last stage needs.

        Raises:
            StepFailed: An instruction went wrong.
            DockerfileError: One cannot be carried out here, or is wrong.
        """
        self._stages.mkdir(parents=True)
        for stage in self.file.needed():
            image = self._enter(stage)
            for one in stage.instructions:
                self._carry_out(one, stage, image)
        return image

    def _enter(self, stage: Stage) -> Image:
        if self._current:
            self._root.rename(self._stages / self._current.name)
        self._current, self._variables = stage, {}
        base = self._done.get(self.file.base_of(stage))
        if base:
            self._copy(self._stages / base.name, self._root)
            image = Image(stage.name, self._root, dict(base.environment), base.workdir, base.user, base.entrypoint)
        else:
            self._root.mkdir()
            python = Path(sys.base_prefix, "bin")
            image = Image(stage.name, self._root, {"PATH": f"{python}:{_SYSTEM}"}, self._root)
            for place in (value for name, value in self.places.items() if self._standard.get(name) == "/tmp"):  # noqa: S108  # as each image has it
                Path(place).mkdir(parents=True)
                Path(place).chmod(0o1777)
        image.places = self.places
        self._done[stage.name] = image
        return image

    def _carry_out(self, one: Instruction, stage: Stage, image: Image) -> None:
        variables = {**self._variables, **image.environment}
        match one.name:
            case "ARG":
                for name, default in assignments(one):
                    self._variables[name] = self._argument(name, default, variables, one)
            case "ENV":
                image.environment |= {
                    name: expanded(value or "", variables, one.where) for name, value in assignments(one)
                }
            case "WORKDIR":
                image.workdir = self._inside(expanded(one.value, variables, one.where), image, one)
                image.workdir.mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = expanded(one.value, variables, one.where)
            case "ENTRYPOINT":
                image.entrypoint = words(one)
            case _:
                with self._report.step(f"{self.name:10} {stage.name:13} {one.name} {one.value}"):
                    self._copies(one, image, variables) if one.name == "COPY" else self._runs(one, image, variables)

    def _argument(self, name: str, default: str | None, variables: Mapping[str, str], one: Instruction) -> str:
        """A build's own value first, then the stage's default, then that from before the first stage."""
        if name in self._arguments:
            return self._arguments[name]
        if default is None and name not in self.file.arguments:
            raise DockerfileError(f"{one.where}: ARG {name} has no value anywhere")
        return self.file.arguments[name] if default is None else expanded(default, variables, one.where)

    def _copies(self, one: Instruction, image: Image, variables: Mapping[str, str]) -> None:
        if one.options.keys() - {"from"}:
            raise DockerfileError(f"{one.where}: of COPY's options only --from is carried out here")
        *sources, last = [expanded(word, variables, one.where) for word in shlex.split(one.value)]
        target = self._inside(last, image, one)
        if stage := one.options.get("from"):
            (source,) = sources
            if source in self._kept.values():
                return
            place = self._stages / stage / Path(source).relative_to(self._root)
            if not place.exists():
                raise StepFailed(f"{one.where}: the stage {stage} has no {source}")
            self._copy(place, target)
            return
        for source in sources:
            files = self._context.matching(source)
            if not files:
                raise StepFailed(f"{one.where}: nothing is sent to the build that {source} names; see .dockerignore")
            for file in files:
                # Of a directory, what is in it is copied.
                inner = file.relative_to(source) if (self._context.root / source).is_dir() else Path(file.name)
                into = target / inner if last.endswith("/") or inner != Path(file.name) else target
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._context.root / file, into)

    def _runs(self, one: Instruction, image: Image, variables: Mapping[str, str]) -> None:
        commands = [command.strip() for command in one.value.split("&&")]
        if any(command.startswith("apt-get ") for command in commands):
            self._require_packages(commands, one)
            return
        if found := _ABSOLUTE.search(one.value):
            where = one.value[max(0, found.start() - 20) : found.end() + 20]
            raise DockerfileError(f"{one.where}: an absolute place that no ARG stands for, at {where!r}")
        machine = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
        environment = {"HOME": os.environ.get("HOME", "/"), **machine, **variables}
        # An image must not hold pip's cache; this machine has its own, and need not download everything each time.
        environment.pop("PIP_NO_CACHE_DIR", None)
        self._report.run(["/bin/sh", "-c", one.value], environment=environment, place=image.workdir)

    def _require_packages(self, commands: list[str], one: Instruction) -> None:
        """apt is not run: what it would install has to be on this machine."""
        for command in commands:
            _, action, *rest = [*shlex.split(command), ""]
            if command not in ("apt-get update", _LISTS) and action != "install":
                raise DockerfileError(f"{one.where}: {command!r} stands among apt's commands, which are not run")
            for package in (word for word in rest if word and not word.startswith("-") and action == "install"):
                version = installed(package)
                if version is None:
                    raise StepFailed(f"{one.where}: the package {package} is not on this machine: apt-get install it")
                say(f"         not installed, but here: {package} {version}")

    def _inside(self, place: str, image: Image, one: Instruction) -> Path:
        path = image.workdir / place
        if not path.is_relative_to(self._root) and place not in self._kept.values():
            raise DockerfileError(f"{one.where}: {place} is an absolute place that no ARG stands for")
        return path

    def _copy(self, source: Path, target: Path) -> None:
        """With modes, times and links as they are; `cp` shares blocks where the file system can."""
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["cp", "-a", "--reflink=auto", str(source), str(target)]
        self._report.run(command, environment={"PATH": _SYSTEM}, place=target.parent)


def installed(package: str) -> str | None:
    """The version of a Debian package on this machine."""
    dpkg = shutil.which("dpkg-query")
    if dpkg is None:
        return "for all that is known: there is no dpkg"
    command = [dpkg, "-W", "-f", "${db:Status-Status} ${Version}", package]
    status, _, version = subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition(" ")
    return version if status == "installed" else None
