"""What every runner promises, shown with small real programs in the exporter's place."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dispatcher.artifacts import path_of
from dispatcher.errors import Misconfigured, Unavailable
from dispatcher.runner import Execution, ProcessRunner, open_runner
from tests.waiting import until

Make = Callable[[str], ProcessRunner]


@pytest.fixture
def runner(tmp_path: Path) -> Make:
    """A runner whose exporter is the given program."""

    def make(program: str) -> ProcessRunner:
        source = tmp_path / "program.py"
        source.write_text(program)
        return ProcessRunner(
            tmp_path / "logs", {"STORE": "here"}, retry_delay=0.001, program=(sys.executable, str(source))
        )

    return make


def log_of(execution: Execution) -> str:
    return path_of(execution.log_uri).read_text()


def test_an_execution_gets_its_argument_and_environment(runner: Make) -> None:
    """Job id, overrides, the stores, and what Cloud Run would set; both streams go to its log."""
    started = runner(
        "import os, sys\n"
        "names = 'STORE EXPORT_ID CLOUD_RUN_EXECUTION CLOUD_RUN_TASK_ATTEMPT'.split()\n"
        "print(sys.argv[1:], *[os.environ[name] for name in names], file=sys.stderr)"
    )
    execution = started.start("job", {"EXPORT_ID": "job.merged"})
    assert started.wait(execution.name, 60) == 0
    assert log_of(execution).strip() == f"['job'] here job.merged {execution.name} 0"


@pytest.mark.parametrize(("code", "attempts"), [(0, 1), (1, 1), (75, 4), (137, 4)])
def test_a_task_is_tried_again_unless_it_is_done_or_failed_for_good(runner: Make, code: int, attempts: int) -> None:
    """As Cloud Run does: the same execution, the next attempt, three retries at most."""
    started = runner(f"import os, sys; print(os.environ['CLOUD_RUN_TASK_ATTEMPT'], flush=True); sys.exit({code})")
    execution = started.start("job", {})
    assert started.wait(execution.name, 60) == code
    assert log_of(execution).split() == [str(number) for number in range(attempts)]
    assert not started.is_busy("job")


def test_a_killed_task_is_tried_again(runner: Make) -> None:
    """Out of memory, say."""
    started = runner(
        "import os, signal\nif os.environ['CLOUD_RUN_TASK_ATTEMPT'] == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    execution = started.start("job", {})
    assert started.wait(execution.name, 60) == 0


def test_a_cancelled_execution_is_asked_to_stop_and_not_retried(runner: Make) -> None:
    """SIGTERM, so that it can give back what it holds."""
    started = runner(
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('stopped', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    execution = started.start("job", {})
    until(lambda: "ready" in log_of(execution), "the program to be ready")
    assert started.is_busy("job")
    assert started.wait(execution.name, 0) is None
    started.cancel(execution.name)
    assert started.wait(execution.name, 60) == 75
    assert log_of(execution).split() == ["ready", "stopped"]
    started.cancel(execution.name)
    started.cancel("nobody")


def test_the_work_outlives_the_dispatcher(tmp_path: Path) -> None:
    """A dispatcher that is killed does not take its executions with it."""
    done, gate, child = tmp_path / "done", tmp_path / "gate", tmp_path / "child.py"
    os.mkfifo(gate)
    child.write_text(
        f"import os, pathlib\nos.read(os.open({str(gate)!r}, os.O_RDONLY), 1)\npathlib.Path({str(done)!r}).touch()"
    )
    parent = (
        "import os, sys, signal, pathlib\n"
        "from dispatcher.runner import ProcessRunner\n"
        f"program = (sys.executable, {str(child)!r})\n"
        f"ProcessRunner(pathlib.Path({str(tmp_path)!r}), {{}}, program=program).start('job', {{}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", parent], check=False)
    assert run.returncode == -signal.SIGKILL
    with gate.open("w") as opened:
        opened.write("go")
    until(done.exists, "the orphan to finish")


def test_what_cannot_be_started_is_unavailable(tmp_path: Path) -> None:
    """No such program, or no place for its log."""
    with pytest.raises(Unavailable):
        ProcessRunner(tmp_path, {}, program=("/nowhere/python",)).start("job", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        ProcessRunner(tmp_path / "file", {}).start("job", {})


@pytest.mark.parametrize("job_id", ["--force", "../job", "a b", ""])
def test_what_is_no_job_id_never_becomes_an_argument(tmp_path: Path, job_id: str) -> None:
    """Wherever it came from."""
    with pytest.raises(Misconfigured):
        ProcessRunner(tmp_path, {}).start(job_id, {})


def test_a_url_selects_the_runner(tmp_path: Path) -> None:
    """Cloud Run is named, and says that it is not there yet."""
    with pytest.raises(Misconfigured) as error:
        open_runner("run://project/region/job", log_dir=tmp_path, environment={})
    assert error.value.error_code == "not_available_yet"
    with pytest.raises(Misconfigured):
        open_runner("k8s://x", log_dir=tmp_path, environment={})
