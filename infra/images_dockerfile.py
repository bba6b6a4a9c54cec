"""Reads a Dockerfile into stages of instructions, and works out what its variables stand for.

A subset, so that what is read is what Docker does: no heredocs, no `escape` directive, no shell form of ENTRYPOINT.
What is not in it is refused. https://docs.docker.com/reference/dockerfile/ says what it means.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

KNOWN = ("FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})|(\$)")


class DockerfileError(Exception):
    """A Dockerfile is wrong, or beyond what is read here; the message names file and line."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    name: str
    value: str
    """Without its options"""
    options: Mapping[str, str]
    """`--from=llama` is `{"from": "llama"}`"""
    where: str
    """File and line"""


@dataclass(frozen=True)
class Stage:
    """A `FROM`, and what follows it."""

    name: str
    """As it is called, or its number"""
    base: str
    """As it is written: with variables in it"""
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Dockerfile:
    """A whole one."""

    arguments: Mapping[str, str]
    """What `ARG`s before the first stage say, expanded, and overridden by the build's own."""
    stages: tuple[Stage, ...]

    def base_of(self, stage: Stage) -> str:
        """What a stage starts from: another one's name, or an image."""
        return expanded(stage.base, self.arguments, f"FROM {stage.base}")

    def stage(self, name: str) -> Stage | None:
        """The stage of a name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def needed(self) -> list[Stage]:
        """The stages that the last one is made of, in the order of the file, and it: all that BuildKit builds."""
        names, wanted = {self.stages[-1].name}, list[Stage]()
        for stage in reversed(self.stages):
            if stage.name in names:
                wanted.append(stage)
                names |= {self.base_of(stage), *(one.options.get("from", "") for one in stage.instructions)}
        return wanted[::-1]


def read(path: Path, build_arguments: Mapping[str, str] | None = None) -> Dockerfile:
    """Read a Dockerfile.

    Args:
        path: Where it lies.
        build_arguments: What `--build-arg` would say.

    Raises:
        DockerfileError: It is not of the subset, or no Dockerfile.
    """
    overrides = build_arguments or {}
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for one in _instructions(path):
        if one.name == "FROM":
            base, _, name = re.sub(r"\s+AS\s+", " ", one.value, flags=re.IGNORECASE).partition(" ")
            stages.append(Stage(name or str(len(stages)), base, ()))
        elif stages:
            last = stages.pop()
            stages.append(Stage(last.name, last.base, (*last.instructions, one)))
        elif one.name == "ARG":
            for name, default in assignments(one):
                arguments[name] = overrides.get(name, expanded(default or "", arguments, one.where))
        else:
            raise DockerfileError(f"{one.where}: {one.name} stands before the first FROM")
    if not stages:
        raise DockerfileError(f"{path.name} has no FROM")
    return Dockerfile(arguments, tuple(stages))


def assignments(one: Instruction) -> list[tuple[str, str | None]]:
    """The names and values of an `ARG` or `ENV`, quotes taken off, variables left in."""
    if "'" in one.value:
        raise DockerfileError(f"{one.where}: single quotes, which would keep variables from being expanded")
    parts = [word.partition("=") for word in shlex.split(one.value)]
    if one.name == "ENV" and not all(sign for _, sign, _ in parts):
        raise DockerfileError(f"{one.where}: ENV without an equals sign")
    return [(name, value if sign else None) for name, sign, value in parts]


def expanded(text: str, variables: Mapping[str, str], where: str) -> str:
    """A text with `$NAME` and `${NAME}` replaced.

    Raises:
        DockerfileError: A variable is not set, which Docker would take for an empty one; or has a modifier.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise DockerfileError(f"{where}: {name or text!r} is not set here")
        return variables[name]

    return _VARIABLE.sub(value, text)


def words(one: Instruction) -> list[str]:
    """What an instruction in its exec form runs.

    Raises:
        DockerfileError: It is in the shell form, which would leave signals to a shell.
    """
    try:
        found = json.loads(one.value)
    except ValueError as error:
        raise DockerfileError(f"{one.where}: {one.name} is not in the exec form") from error
    return [str(word) for word in found]


def _instructions(path: Path) -> Iterator[Instruction]:
    joined, began = "", 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if text.startswith("#"):
            if re.match(r"#\s*(escape|syntax)\s*=", text):
                raise DockerfileError(f"{path.name}:{number}: directives are not read")
            continue
        if not text and not joined:
            continue
        began = began if joined else number
        joined = f"{joined} {text.removesuffix(chr(92)).strip()}".strip()
        if not text.endswith("\\"):
            yield _instruction(joined, f"{path.parent.name}/{path.name}:{began}")
            joined = ""
    if joined:
        raise DockerfileError(f"{path.name} ends within an instruction")


def _instruction(text: str, where: str) -> Instruction:
    name, _, value = text.partition(" ")
    options: dict[str, str] = {}
    while (match := re.match(r"--([a-z]+)=(\S+)\s+", value)) and name != "RUN":
        options[match[1]] = match[2]
        value = value[match.end() :]
    if name not in KNOWN or "<<" in value or value.startswith("--"):
        raise DockerfileError(f"{where}: {text[:60]!r} is more than is read here")
    return Instruction(name, value, options, where)
