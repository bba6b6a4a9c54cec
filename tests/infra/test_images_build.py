"""Carrying out small Dockerfiles: what Docker would do is done, and what it would refuse is refused."""

import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from infra.images import main
from infra.images_build import Build, Image
from infra.images_context import Context
from infra.images_dockerfile import DockerfileError
from infra.images_report import Report, StepFailed
from infra.images_run import check_dispatcher, check_exporter
from infra.locks import ROOT

HEAD = "ARG PLACE=/place\nARG GREETING=hello\n"
# Two stages: what the second has not copied, it has not.
STAGES = """
FROM base:1.2.3 AS first
ARG PLACE
RUN mkdir -p "${PLACE}/kept" "${PLACE}/left" && echo one > "${PLACE}/kept/file"
FROM base:1.2.3
ARG PLACE
COPY --from=first ${PLACE}/kept ${PLACE}/kept
"""


class Repository:
    """A directory with a Dockerfile, and where it is carried out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "source" / "thing").mkdir(parents=True)
        self.times = 0

    def write(self, name: str, text: str) -> None:
        path = self.root / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build(
        self,
        dockerfile: str,
        *,
        seconds: float = 60,
        arguments: Mapping[str, str] | None = None,
        kept: Mapping[str, Path] | None = None,
    ) -> Image:
        self.times += 1
        self.write("thing/Dockerfile", dockerfile)
        report = Report(self.root / "log", seconds=seconds)
        place = self.root / f"build-{self.times}"
        path, context = self.root / "source" / "thing" / "Dockerfile", Context(self.root / "source")
        return Build(path, context, place, report, arguments=arguments, kept=kept).run()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_what_a_stage_does_not_copy_it_does_not_have(repository: Repository) -> None:
    image = repository.build(HEAD + STAGES)
    assert (image.root / "place" / "kept" / "file").read_text() == "one\n"
    assert not (image.root / "place" / "left").exists()


def test_a_stage_has_what_the_one_it_starts_from_has(repository: Repository) -> None:
    image = repository.build(
        HEAD + "FROM base:1.2.3 AS first\nARG PLACE\nENV A=1\nWORKDIR ${PLACE}\nRUN echo one > file\n"
        "FROM first\nRUN cat file > other && echo $A >> other\n"
    )
    assert (image.root / "place" / "other").read_text() == "one\n1\n"
    assert image.workdir == image.root / "place"


def test_stages_that_the_last_one_does_not_need_are_not_carried_out(repository: Repository) -> None:
    text = (
        HEAD + "ARG WHICH=good\nFROM base:1.2.3 AS bad\nRUN false\nFROM base:1.2.3 AS good\nFROM ${WHICH}\nRUN true\n"
    )
    repository.build(text)
    with pytest.raises(StepFailed, match=r"/bin/sh -c false: 1"):
        repository.build(text, arguments={"WHICH": "bad"})


def test_arguments_are_known_where_docker_knows_them(repository: Repository) -> None:
    """Before the first stage a default; in a stage once it is named there; the build's own before any default."""
    text = HEAD + 'FROM base:1.2.3\nARG PLACE\n{}\nWORKDIR ${{PLACE}}\nRUN echo "${{GREETING:-nothing}}" > said\n'

    def said(line: str, **arguments: str) -> str:
        image = repository.build(text.format(line), arguments=arguments)
        return (image.root / "place" / "said").read_text().strip()

    assert said("") == "nothing"
    assert said("ARG GREETING") == "hello"
    assert said("ARG GREETING=own") == "own"
    assert said("ARG GREETING=own", GREETING="told") == "told"
    assert said("ARG GREETING\nENV GREETING=${GREETING}-twice") == "hello-twice"


def test_an_unset_variable_is_refused_where_docker_would_take_it_for_empty(repository: Repository) -> None:
    with pytest.raises(DockerfileError, match=r"thing/Dockerfile:4: 'PLACE' is not set here"):
        repository.build(HEAD + "FROM base:1.2.3\nWORKDIR ${PLACE}\n")


def test_a_step_that_fails_says_the_last_that_it_said(repository: Repository) -> None:
    with pytest.raises(StepFailed, match=r"no such wheel"):
        repository.build("FROM base:1.2.3\nRUN echo no such wheel && exit 3\n")


def test_a_step_that_takes_too_long_is_ended_with_what_it_started(repository: Repository) -> None:
    began = time.monotonic()
    with pytest.raises(StepFailed, match="no end after"):
        repository.build(
            "ARG PLACE=/place\nFROM base:1.2.3\nARG PLACE\nWORKDIR ${PLACE}\nRUN sleep 300 & echo $! > pid; wait\n",
            seconds=1.5,
        )
    assert time.monotonic() - began < 30
    pid = int((repository.root / "build-1" / "root" / "place" / "pid").read_text())
    # Whoever reaps orphans here may take a moment.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and running(pid):
        time.sleep(0.05)
    assert not running(pid)


def running(pid: int) -> bool:
    """Whether a process is, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "line", ["RUN touch /etc/made", 'RUN echo > "/etc/made"', "WORKDIR /etc", "COPY file /etc/", "RUN cat </etc/passwd"]
)
def test_a_place_that_no_argument_stands_for_is_refused(repository: Repository, line: str) -> None:
    repository.write("file", "")
    with pytest.raises(DockerfileError, match="absolute place"):
        repository.build(f"FROM base:1.2.3\n{line}\n")
    assert not Path("/etc/made").exists()


def test_what_dockerignore_leaves_out_cannot_be_copied(repository: Repository) -> None:
    repository.write("a/file", "1")
    repository.write("a/secret", "2")
    repository.write(".dockerignore", "*\n!a\na/secret\n")
    text = HEAD + "FROM base:1.2.3\nARG PLACE\nWORKDIR ${{PLACE}}\nCOPY {} here/\n"
    image = repository.build(text.format("a"))
    assert sorted(path.name for path in (image.workdir / "here").iterdir()) == ["file"]
    with pytest.raises(StepFailed, match=r"\.dockerignore"):
        repository.build(text.format("a/secret"))


@pytest.mark.parametrize(
    "text",
    [
        "FROM a\nADD x y\n",
        "FROM a\nRUN <<EOF\ntrue\nEOF\n",
        "# escape=`\nFROM a\n",
        "FROM a\nRUN true \\\n",
        "RUN true\n",
    ],
)
def test_what_is_not_read_is_refused(repository: Repository, text: str) -> None:
    with pytest.raises(DockerfileError):
        repository.build(text)


def test_a_package_of_apts_has_to_be_on_this_machine(
    repository: Repository, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a dpkg of our own, since there may be none here."""
    dpkg = tmp_path / "bin" / "dpkg-query"
    dpkg.parent.mkdir()
    dpkg.write_text('#!/bin/sh\ncase "$4" in bash) printf "installed 5.2";; *) exit 1;; esac\n')
    dpkg.chmod(0o755)
    monkeypatch.setenv("PATH", f"{dpkg.parent}:{os.environ['PATH']}")
    text = "FROM base:1.2.3\nRUN apt-get update && apt-get install --yes {} && rm -rf /var/lib/apt/lists/*\n"
    repository.build(text.format("bash"))
    assert "bash 5.2" in capsys.readouterr().out
    with pytest.raises(StepFailed, match="no-such-package is not on this machine"):
        repository.build(text.format("bash no-such-package"))


def test_commands_among_apts_are_refused_for_they_would_not_be_run(repository: Repository) -> None:
    with pytest.raises(DockerfileError, match="are not run"):
        repository.build("FROM base:1.2.3\nRUN apt-get update && touch file\n")


def test_a_cache_of_this_machines_is_used_where_it_lies(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    image = repository.build(
        'ARG CACHE=/cache\nFROM base:1.2.3 AS first\nARG CACHE\nRUN echo built > "${CACHE}/wheel"\n'
        "FROM base:1.2.3\nARG CACHE\nCOPY --from=first ${CACHE} ${CACHE}\n",
        kept={"CACHE": tmp_path / "cache"},
    )
    assert (tmp_path / "cache" / "wheel").read_text() == "built\n"
    assert not (image.root / "cache").exists()


@pytest.fixture
def here(tmp_path: Path) -> Image:
    """This very environment, as if it were an image: it has everything of both, and development's too."""
    (tmp_path / "scratch").mkdir()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "LOGNAME": "somebody",
    }
    return Image("here", ROOT, environment, tmp_path, str(os.getuid()), ["python", "-m", "exporter"])


def test_a_dispatcher_with_torch_in_it_is_refused(here: Image, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"the image holds torch transformers .*pip"):
        check_dispatcher(here, Report(tmp_path / "log", seconds=60), ROOT)


def test_an_exporter_with_pip_in_it_is_refused(here: Image, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="the image holds pip"):
        check_exporter(here, Report(tmp_path / "log", seconds=60), ROOT)


def test_an_image_whose_user_has_no_name_is_refused(here: Image, tmp_path: Path) -> None:
    del here.environment["LOGNAME"]
    for check in (check_dispatcher, check_exporter):
        with pytest.raises(StepFailed, match=r"LOGNAME|getpwuid"):
            check(here, Report(tmp_path / "log", seconds=60), ROOT)


def test_a_machine_that_cannot_do_it_is_told_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and not by a step that fails."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main([]) == 1
    assert capsys.readouterr().out.startswith("images: root cannot become the images' user: install setpriv")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert main([]) == 1
    assert capsys.readouterr().out.startswith("images: this is Darwin: run it on Linux")


def test_an_image_whose_code_is_elsewhere_is_refused(here: Image, tmp_path: Path) -> None:
    here.root = tmp_path
    with pytest.raises(StepFailed, match=f"expected gemma-export .* under {tmp_path}"):
        check_exporter(here, Report(tmp_path / "log", seconds=60), ROOT)
