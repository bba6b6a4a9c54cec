"""The exporter as the process that the platform starts: arguments, exit codes, signals, and death."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher.contract import ExportRecord, State
from dispatcher.settings import Settings
from dispatcher.sqlite_records import SqliteRecords
from exporter.checkpoint import Tensor, header_bytes, read_tensor_file
from tests.exporter.exporting import merged_record, training_document
from tests.exporter.small_disk import run_with_small_disk
from tests.gemmas import make_adapter, save_base
from tests.waiting import until

PADDING = 400_000_000


class Machine:
    """A state directory with one completed training job, and the exporter started on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "GEMMA_EXPORT_HOME": str(root / "home"), "LEASE_SECONDS": "60"}
        self.records = SqliteRecords(root / "home" / "records.db")
        model = save_base("gemma3_text", root / "base")
        make_adapter("gemma3_text", model, root / "adapter")
        assert self.records.put_job("job-1", training_document(root / "base", root / "adapter"))

    def start(self, *arguments: str, execution: str = "e1") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "exporter", *arguments],
            env={**self.environment, "CLOUD_RUN_EXECUTION": execution},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, execution: str = "e1") -> tuple[int, str]:
        with self.start(*arguments, execution=execution) as process:
            _, errors = process.communicate(timeout=120)
        return process.returncode, errors

    def record(self) -> ExportRecord:
        record = self.records.get_export("job-1.merged")
        assert record is not None
        return record

    def partials(self) -> list[Path]:
        return list((self.root / "home").rglob("*.partial"))

    def enlarge_base(self) -> None:
        """Give the base a large tensor of zeros (a hole in the file), so that copying it takes a moment."""
        path = self.root / "base" / "model.safetensors"
        file = read_tensor_file(path)
        data = path.read_bytes()[-sum(tensor.nbytes for tensor in file.tensors) :]
        padding = Tensor("model.padding", "U8", (PADDING,), 0, PADDING)
        with path.open("wb") as output:
            output.write(header_bytes([*file.tensors, padding], file.metadata) + data)
            output.truncate(output.tell() + PADDING)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.records.close()


def test_the_operators_command_exports_and_ends_with_0(machine: Machine) -> None:
    code, errors = machine.run("job-1", "--export-type", "merged")
    assert code == 0, errors
    assert machine.record().state is State.COMPLETED
    lines = [json.loads(line) for line in errors.splitlines()]
    assert {line["job_id"] for line in lines} == {"job-1"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nobody",), 1, "job_not_found"),
        (("--", "--force"), 1, "job_id_invalid"),
        (("a/b",), 1, "job_id_invalid"),
        (("..",), 1, "job_id_invalid"),
        (("a,b",), 1, "job_id_invalid"),
        (("x" * 300,), 1, "job_id_invalid"),
        (("job-1", "--quantization", "q8_0"), 1, "invalid_request"),
        (("--force",), 2, "JOB_ID"),
    ],
)
def test_an_order_that_cannot_be_followed_is_refused(
    arguments: tuple[str, ...], code: int, said: str, machine: Machine
) -> None:
    found, errors = machine.run(*arguments)
    assert found == code
    assert said in errors


def test_a_misspelt_setting_is_named(machine: Machine) -> None:
    machine.environment["LEASE_SECONDS"] = "soon"
    code, errors = machine.run("job-1")
    assert code == 1
    assert "LEASE_SECONDS" in errors


def test_killed_while_writing_the_next_attempt_finishes_and_cleans_up(machine: Machine) -> None:
    """SIGKILL runs no handler: the half-written file stays until the same execution's next attempt."""
    machine.enlarge_base()
    assert machine.records.create_export(merged_record())
    with machine.start("job-1") as process:
        until(machine.partials, "the first bytes")
        process.kill()
    assert machine.record().state is State.RUNNING
    assert len(machine.partials()) == 1
    code, errors = machine.run("job-1")
    assert code == 0, errors
    assert machine.record().state is State.COMPLETED
    assert machine.record().attempt == 2
    assert machine.partials() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_writing_gives_the_export_back_and_says_75(machine: Machine, number: signal.Signals) -> None:
    machine.enlarge_base()
    assert machine.records.create_export(merged_record())
    with machine.start("job-1") as process:
        until(machine.partials, "the first bytes")
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 75, errors
    assert machine.record().state is State.QUEUED
    assert machine.record().lease is None
    assert not [path for path in (machine.root / "home" / "artifacts").rglob("*") if path.is_file()]


def test_a_disk_that_fills_up_while_writing_leaves_nothing(machine: Machine) -> None:
    """The real thing: a file system of 8 MiB, where this machine lets us mount one."""
    artifacts = machine.root / "home" / "artifacts"
    artifacts.mkdir(parents=True)
    machine.enlarge_base()
    assert machine.records.create_export(merged_record())
    command = [sys.executable, "-m", "exporter", "job-1"]
    done = run_with_small_disk(command, artifacts, "size=8m", machine.environment)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    error = machine.record().error
    assert error is not None
    assert error.code == "storage_full"


def test_settings_for_a_child_open_the_same_stores(machine: Machine) -> None:
    settings = Settings.from_env(machine.environment)
    assert Settings.from_env(settings.to_environment()).records_url == settings.records_url


def test_every_attempt_of_a_forced_rerun_makes_the_same_version(machine: Machine) -> None:
    """Or a retried task could not go on with what the one before it left."""
    machine.records.put_job("job-2", training_document("google/nowhere", machine.root / "adapter"))
    nonces = []
    for execution in ("e1", "e1", "e2"):
        run = machine.start("job-2", "--export-type", "merged", "--force", execution=execution)
        run.communicate(timeout=60)
        assert run.returncode == 75
        record = machine.records.get_export("job-2.merged")
        assert record is not None
        nonces.append(record.force_nonce)
    assert nonces[0] == nonces[1] != nonces[2]


def test_a_setting_that_cannot_be_meant_is_one_line_of_json(machine: Machine) -> None:
    """As whatever else goes wrong before the work."""
    machine.environment["LEASE_SECONDS"] = "soon"
    run = machine.start("job-1")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    (line,) = said.splitlines()
    assert "LEASE_SECONDS" in json.loads(line)["message"]
