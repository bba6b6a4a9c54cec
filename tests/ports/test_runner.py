"""What every runner promises, shown with small real programs in the exporter's place."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from dispatcher.artifacts import path_of
from dispatcher.errors import Misconfigured, Unavailable
from dispatcher.runner import Execution, JobRunner, ProcessRunner, open_runner
from infra.local.cloud_run import LocalCloudRun
from tests.waiting import until

SAYS_ITS_ATTEMPT = "import os, sys; print(os.environ['CLOUD_RUN_TASK_ATTEMPT'], flush=True); "


@dataclass
class Place:
    """A runner, and a way to see how its executions end."""

    runner: JobRunner
    wait: Callable[[str, float], int | None]


Make = Callable[[str], Place]


@pytest.fixture(params=["process", "cloud-run"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes a runner whose exporter is the given program."""
    with ExitStack() as stack:

        def made(program: str) -> Place:
            source, logs = tmp_path / "program.py", tmp_path / "logs"
            source.write_text(program)
            command, own = (sys.executable, str(source)), {"STORE": "here", "ENGINE": "auto"}
            if request.param == "process":
                processes = ProcessRunner(logs, own, retry_delay=0.001, program=command)
                stack.callback(processes.end, grace=10)
                return Place(processes, processes.wait)
            cloud = LocalCloudRun(
                "project", "region", "job", log_dir=logs, environment=own, program=command, retry_delay=0.001
            )
            address = stack.enter_context(cloud.serving())
            runner = open_runner(f"run://project/region/job?emulator={address}", log_dir=tmp_path, environment={})
            stack.callback(runner.close)
            return Place(runner, cloud.wait)

        yield made


def log_of(execution: Execution) -> str:
    return path_of(execution.log_uri).read_text()


def test_an_execution_gets_its_argument_and_environment(make: Make) -> None:
    """Job id, overrides before the job's own, and what Cloud Run sets; both streams go to its log."""
    place = make(
        "import os, sys\n"
        "names = 'STORE ENGINE EXPORT_ID CLOUD_RUN_EXECUTION CLOUD_RUN_TASK_ATTEMPT'.split()\n"
        "print(sys.argv[1:], *[os.environ[name] for name in names], file=sys.stderr)"
    )
    execution = place.runner.start("job", {"EXPORT_ID": "job.merged", "ENGINE": "peft"})
    assert place.wait(execution.name, 60) == 0
    assert log_of(execution).strip() == f"['job'] here peft job.merged {execution.name} 0"


@pytest.mark.parametrize(("code", "attempts"), [(0, 1), (75, 4), (137, 4)])
def test_a_task_that_is_not_done_is_tried_again(make: Make, code: int, attempts: int) -> None:
    """The same execution, the next attempt, three retries at most."""
    place = make(f"{SAYS_ITS_ATTEMPT} sys.exit({code})")
    execution = place.runner.start("job", {})
    assert place.wait(execution.name, 60) == code
    assert log_of(execution).split() == [str(number) for number in range(attempts)]


def test_a_killed_task_is_tried_again(make: Make) -> None:
    """Out of memory, say."""
    place = make(
        "import os, signal\nif os.environ['CLOUD_RUN_TASK_ATTEMPT'] == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert place.wait(place.runner.start("job", {}).name, 60) == 0


def test_a_cancelled_execution_is_asked_to_stop_and_not_retried(make: Make) -> None:
    """SIGTERM, so that it can give back what it holds; when it has ended, there is nothing left to ask."""
    place = make(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'stopped\\n'), sys.exit(75)))\n"
        "os.write(1, b'ready\\n')\n"
        "signal.pause()\n"
    )
    execution = place.runner.start("job", {})
    until(lambda: "ready" in log_of(execution), "the program to be ready")
    assert place.wait(execution.name, 0) is None
    place.runner.cancel(execution.name)
    assert place.wait(execution.name, 60) == 75
    assert log_of(execution).split() == ["ready", "stopped"]
    place.runner.cancel(execution.name)


def test_every_task_learns_its_number_and_is_tried_again_by_itself(make: Make) -> None:
    """The execution ends with the last of them, and well only if all did."""
    place = make(
        "import os, sys\n"
        "index, count, attempt = (os.environ[f'CLOUD_RUN_TASK_{what}'] for what in ('INDEX', 'COUNT', 'ATTEMPT'))\n"
        "os.write(1, f'{index}/{count}:{attempt}\\n'.encode())\n"
        "sys.exit(75 if (index, attempt) in (('1', '0'), ('2', '0'), ('2', '1')) else 0)"
    )
    execution = place.runner.start("job", {}, tasks=3)
    assert place.wait(execution.name, 60) == 0
    assert sorted(log_of(execution).split()) == ["0/3:0", "1/3:0", "1/3:1", "2/3:0", "2/3:1", "2/3:2"]


def test_one_task_that_fails_fails_the_execution(make: Make) -> None:
    """When the others have ended too."""
    place = make("import os, sys; sys.exit(os.environ['CLOUD_RUN_TASK_INDEX'] == '1')")
    execution = place.runner.start("job", {}, tasks=3)
    assert place.wait(execution.name, 60) == 1


def test_a_cancelled_execution_stops_all_its_tasks(make: Make) -> None:
    """Each gets the signal, and none is started again."""
    place = make(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'stopped\\n'), sys.exit(75)))\n"
        "os.write(1, b'ready\\n')\n"
        "signal.pause()\n"
    )
    execution = place.runner.start("job", {}, tasks=3)
    until(lambda: log_of(execution).count("ready") == 3, "all tasks to be ready")
    place.runner.cancel(execution.name)
    assert place.wait(execution.name, 60) == 75
    assert sorted(log_of(execution).split()) == ["ready"] * 3 + ["stopped"] * 3


def test_an_execution_that_is_not_known_is_left_alone(make: Make) -> None:
    """Somebody ran the exporter by hand, or the runner has forgotten it."""
    make("").runner.cancel("nobody")


@pytest.mark.parametrize("job_id", ["--force", "../job", "a b", ""])
def test_what_is_no_job_id_never_becomes_an_argument(make: Make, job_id: str) -> None:
    """Wherever it came from."""
    with pytest.raises(Misconfigured, match="no job id"):
        make("").runner.start(job_id, {})


class TestProcesses:
    """What only the embedded runner promises."""

    def test_a_verdict_is_final(self, tmp_path: Path) -> None:
        """The record says why it failed; another attempt would only say so again."""
        runner = ProcessRunner(
            tmp_path, {}, retry_delay=0.001, program=(sys.executable, "-c", f"{SAYS_ITS_ATTEMPT} sys.exit(1)")
        )
        execution = runner.start("job", {})
        assert runner.wait(execution.name, 60) == 1
        assert log_of(execution).split() == ["0"]

    def test_it_knows_whether_a_job_is_being_worked_on(self, tmp_path: Path) -> None:
        """Until its execution ends, and however it ends."""
        program = "import signal; print('ready', flush=True); signal.pause()"
        runner = ProcessRunner(tmp_path, {}, program=(sys.executable, "-c", program))
        execution = runner.start("job", {})
        until(lambda: "ready" in log_of(execution), "the program to be ready")
        assert runner.is_busy("job")
        assert not runner.is_busy("other")
        runner.end(grace=60)
        assert not runner.is_busy("job")

    def test_what_does_not_end_is_ended(self, tmp_path: Path) -> None:
        """SIGKILL for a task that ignores SIGTERM, and no retry."""
        program = (
            "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "print('ready', flush=True)\n"
            "while True: signal.pause()\n"
        )
        runner = ProcessRunner(tmp_path, {}, program=(sys.executable, "-c", program))
        execution = runner.start("job", {})
        until(lambda: "ready" in log_of(execution), "the program to be ready")
        runner.end(grace=0.1)
        assert runner.wait(execution.name, 0) == -signal.SIGKILL
        assert log_of(execution).split() == ["ready"]

    def test_tasks_beyond_the_parallelism_come_after_the_others(self, tmp_path: Path) -> None:
        """As a quota does it; one that was cancelled before it began never begins."""
        busy = tmp_path / "busy"
        program = f"import os\nos.mkdir({str(busy)!r})\nprint('ran', flush=True)\nos.rmdir({str(busy)!r})"
        runner = ProcessRunner(tmp_path, {}, program=(sys.executable, "-c", program), parallelism=1, max_retries=0)
        execution = runner.start("job", {}, tasks=4)
        assert runner.wait(execution.name, 60) == 0
        assert log_of(execution).split() == ["ran"] * 4
        waits = "import signal; print('ready', flush=True); signal.pause()"
        runner = ProcessRunner(tmp_path, {}, program=(sys.executable, "-c", waits), parallelism=1)
        execution = runner.start("job", {}, tasks=3)
        until(lambda: "ready" in log_of(execution), "the first task to be ready")
        assert runner.exit_codes(execution.name) == [None] * 3
        runner.cancel(execution.name)
        assert runner.wait(execution.name, 60) == -signal.SIGTERM
        assert runner.exit_codes(execution.name) == [-signal.SIGTERM, 127, 127]
        assert log_of(execution).split() == ["ready"]

    def test_the_work_outlives_the_dispatcher(self, tmp_path: Path) -> None:
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

    def test_what_cannot_be_started_is_unavailable(self, tmp_path: Path) -> None:
        """No such program, or no place for its log: surely not started."""
        (tmp_path / "file").write_text("")
        for runner in (
            ProcessRunner(tmp_path, {}, program=("/nowhere/python",)),
            ProcessRunner(tmp_path / "file", {}),
        ):
            with pytest.raises(Unavailable) as refusal:
                runner.start("job", {})
            assert refusal.value.error_code == "unavailable"

    def test_a_url_selects_it(self, tmp_path: Path) -> None:
        """And one that selects no runner is refused."""
        assert isinstance(open_runner("process:", log_dir=tmp_path, environment={}), ProcessRunner)
        with pytest.raises(Misconfigured, match="run://"):
            open_runner("k8s://x", log_dir=tmp_path, environment={})
