"""The dispatcher as a real process: over HTTP to a merged model, killed in between, stopped in peace."""

import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from dispatcher.artifacts import path_of
from dispatcher.contract import State
from tests.end_to_end.laptop import CLI, Laptop
from tests.gemmas import assert_same_tensors, load_model, make_adapter, model_tensors, peft_merged, save_base
from tests.waiting import until

MERGED = {"job_id": "job", "export_type": "merged"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Gemma 3 and an adapter for it."""
    directory = tmp_path_factory.mktemp("model")
    make_adapter("gemma3_text", save_base("gemma3_text", directory / "base"), directory / "adapter")
    return directory


@pytest.fixture
def laptop(tmp_path: Path, model: Path) -> Laptop:
    """With the model registered as job `job`."""
    laptop = Laptop(tmp_path)
    paths = ("--base", str(model / "base"), "--adapter", str(model / "adapter"))
    laptop.lines("register", *paths, "--job-id", "job")
    return laptop


def followed(http: httpx.Client, export_id: str = "job.merged") -> dict[str, object]:
    """The status of an export once it is finished."""

    def finished() -> dict[str, object] | None:
        status: dict[str, object] = http.get(f"/exports/{export_id}").json()
        return status if status["state"] in ("completed", "failed", "cancelled") else None

    return until(finished, f"{export_id} to finish")


def is_completed(laptop: Laptop) -> bool:
    with laptop.records() as records:
        record = records.get_export("job.merged")
    return record is not None and record.state is State.COMPLETED


def test_a_request_becomes_a_merged_model(laptop: Laptop, model: Path) -> None:
    """Over HTTP, through record, message, lease and process, to the very tensors that PEFT makes."""
    with laptop.serving() as (_, url), httpx.Client(base_url=url) as http:
        assert http.post("/export", json=MERGED).status_code == 202
        status = followed(http)
        assert status["state"] == "completed", status
        answer = http.post("/export", json=MERGED)
        assert answer.status_code == 200
        path = path_of(answer.json()["merged_path"])
    assert_same_tensors(model_tensors(load_model(path)), peft_merged(model / "base", model / "adapter"))
    assert (path / "export.json").is_file()
    with laptop.records() as records:
        job = records.get_job("job")
    assert job is not None


def test_the_command_line_follows_an_export_behind_a_url(laptop: Laptop) -> None:
    """The same words as without a URL; the path is printed at the end."""
    with laptop.serving() as (_, url):
        *_, last = laptop.lines("export", "job", "--type", "merged", "--url", url)
        assert (last["state"], last["progress"]) == ("completed", 1.0)
        again = laptop.run("export", "job", "--type", "merged", "--url", url)
        assert (again.returncode, again.stdout.strip()) == (0, str(path_of(last["merged_path"])))
        assert laptop.lines("list", "--url", url)[0]["export_id"] == "job.merged"
        (said,) = laptop.lines("cancel", "job.merged", "--url", url, code=1)
        assert said["code"] == "conflict"


def test_a_killed_dispatcher_loses_nothing(laptop: Laptop) -> None:
    """Accepted, not started, killed without warning: the next one starts what waits."""
    laptop.environment["LEASE_SECONDS"] = "15"  # so long the next one waits, if it was killed just in a launch
    blocker = laptop.home / "logs"  # no execution can be started while a file is where its log should go
    blocker.write_text("")
    with laptop.serving() as (process, url):
        assert httpx.post(f"{url}/export", json=MERGED).status_code == 202
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    with laptop.records() as records:
        waiting = records.get_export("job.merged")
    assert waiting is not None
    assert waiting.state in (State.QUEUED, State.STARTING)
    assert waiting.execution is None
    blocker.unlink()
    with laptop.serving() as (_, url), httpx.Client(base_url=url) as http:
        assert followed(http)["state"] == "completed"


def test_a_dispatcher_killed_during_the_work_does_not_end_it(laptop: Laptop) -> None:
    """The exporter is a process of its own."""
    with laptop.serving() as (process, url):
        httpx.post(f"{url}/export", json=MERGED)

        def launched() -> object:
            return httpx.get(f"{url}/exports/job.merged").json()["log_uri"]

        until(launched, "an execution")
        process.send_signal(signal.SIGKILL)
        process.wait(60)

    until(lambda: is_completed(laptop), "the orphaned exporter to complete")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_dispatcher_stops_in_peace(laptop: Laptop, number: signal.Signals) -> None:
    """With exit code 0, and its port free again."""
    with laptop.serving() as (process, url):
        assert httpx.get(f"{url}/health").json()["status"] == "healthy"
        process.send_signal(number)
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_port_that_is_taken_is_said(laptop: Laptop) -> None:
    """Not with a traceback."""
    with laptop.serving() as (_, url):
        done = laptop.run("serve", "--port", url.rpartition(":")[2])
    assert done.returncode == 1
    assert "port_taken" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_started_without_waiting_is_finished_by_its_own_process(laptop: Laptop) -> None:
    """`--no-wait`: the command ends, the exporter goes on."""
    (said,) = laptop.lines("export", "job", "--type", "merged", "--no-wait")
    assert said["status"] in ("queued", "starting", "running")
    until(lambda: is_completed(laptop), "the exporter to complete")


def test_two_command_lines_make_one_artifact(laptop: Laptop) -> None:
    """Started together on the same job, both print the same path."""
    with laptop.records() as records:
        processes = [
            subprocess.Popen(
                [*CLI, "export", "job", "--type", "merged"],
                env=laptop.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        said = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        assert said[0][0] == said[1][0]
        record = records.get_export("job.merged")
    assert record is not None
    assert record.attempt == 1
    assert len(list((laptop.home / "artifacts" / "merged_models" / "job").iterdir())) == 1
