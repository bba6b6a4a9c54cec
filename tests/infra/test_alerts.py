"""The alerts of a deployment look at lines that the code really logs."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher import logs
from dispatcher.contract import JobMessage
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.sweep import swept
from tests.dispatcher.world import World
from tests.exporter.exporting import training_document
from tests.infra.conftest import Find
from tests.terraform.running import INFRA, Resource

JOB, FUNCTION = "cloud_run_job", "cloud_run_revision"
GOOGLES = {
    "pubsub.googleapis.com/subscription/dead_letter_message_count": "pubsub_subscription",
    "logging.googleapis.com/log_entry_count": "cloud_scheduler_job",
}
"""Metrics that are there by themselves, and what they are of."""
MESSAGE = JobMessage(job_id="job", export_id="job.merged")
_EQUALS = re.compile(r'(resource\.type|jsonPayload\.\w+)=(?:"(\w+)"|\(("\w+"(?: OR "\w+")*)\))')
_EXCEEDS = re.compile(r"jsonPayload\.(\w+)>(\d+)")


def matches(filter: str, resource_type: str, line: dict[str, Any]) -> bool:
    """Whether Cloud Logging's filter takes a line; what is in none of ours is refused."""
    for term in filter.split(" AND "):
        if exceeds := _EXCEEDS.fullmatch(term):
            if not line[exceeds[1]] > int(exceeds[2]):
                return False
            continue
        match = _EQUALS.fullmatch(term)
        assert match, f"an unknown term: {term}"
        field, one, several = match.groups()
        found = resource_type if field == "resource.type" else line.get(field.removeprefix("jsonPayload."))
        if found not in ([one] if one else re.findall(r'"(\w+)"', several)):
            return False
    return True


def extracted(extractor: str, line: dict[str, Any]) -> Any:
    match = re.fullmatch(r"EXTRACT\(jsonPayload\.(\w+)\)", extractor)
    assert match
    return line[match[1]]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def logged() -> io.StringIO:
    """What this process logs, as a function does, one JSON object a line."""
    stream = io.StringIO()
    logs.configure(stream, {"service": "dispatcher"})
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_export_that_its_exporter_fails_is_counted(find: Find, tmp_path: Path) -> None:
    """Once, with the code that its record has, as a fault of the model's."""
    home = tmp_path / "home"
    records = SqliteRecords(home / "records.db")
    assert records.put_job("job-1", training_document(tmp_path / "no-base", tmp_path / "no-adapter"))
    records.close()
    run = subprocess.run(
        [sys.executable, "-m", "exporter", "job-1", "--export-type", "merged"],
        env={**os.environ, "GEMMA_EXPORT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    metric = find("google_logging_metric.failed_exports").values
    counted = [line for line in map(json.loads, run.stderr.splitlines()) if matches(metric["filter"], JOB, line)]
    labels = [{name: extracted(how, line) for name, how in metric["label_extractors"].items()} for line in counted]
    assert labels == [{"code": "base_missing", "retryable": False}]


def test_an_export_that_the_dispatcher_gives_up_is_counted(find: Find, world: World, logged: io.StringIO) -> None:
    """As a fault that passes, which always raises the alert."""
    world.job()
    world.submit()
    world.trigger.give_up(MESSAGE)
    metric = find("google_logging_metric.failed_exports").values
    counted = [line for line in lines(logged) if matches(metric["filter"], FUNCTION, line)]
    labels = [{name: extracted(how, line) for name, how in metric["label_extractors"].items()} for line in counted]
    assert labels == [{"code": "could_not_start", "retryable": True}]


def a_sweep(world: World, logged: io.StringIO, *, launched: bool, seconds: int) -> dict[str, Any]:
    """What a sweep logs of an export that waits, or whose launch has come to nothing, for so many seconds."""
    world.job()
    if launched:
        world.launched()
    else:
        world.submit()
    world.clock.pass_seconds(seconds)
    swept(world.trigger, world.collector)
    (line,) = (line for line in lines(logged) if line.get("event") == "swept")
    return line


@pytest.mark.parametrize(
    ("launched", "seconds", "counted"),
    [
        (False, 1800, {"sweeps"}),
        (False, 1801, {"sweeps", "oldest_queued"}),
        (True, 120 + 1799, {"sweeps"}),
        (True, 120 + 1800, {"sweeps", "stuck_leases"}),
    ],
)
def test_a_sweep_is_counted_and_what_it_finds_too_late(
    plan: list[Resource], world: World, logged: io.StringIO, launched: bool, seconds: int, counted: set[str]
) -> None:
    """An export that has waited for half an hour, or whose holder died then."""
    line = a_sweep(world, logged, launched=launched, seconds=seconds)
    metrics = {each.key: each.values["filter"] for each in plan if each.address == "google_logging_metric.sweeps"}
    assert {key for key, filter in metrics.items() if matches(filter, FUNCTION, line)} == counted
    assert not any(matches(filter, JOB, line) for filter in metrics.values())


def test_the_backlog_is_measured(plan: list[Resource], world: World, logged: io.StringIO) -> None:
    """How many exports wait, and for how long."""
    line = a_sweep(world, logged, launched=False, seconds=900)
    metrics = {each.key: each.values for each in plan if each.address == "google_logging_metric.backlog"}
    assert all(matches(metric["filter"], FUNCTION, line) for metric in metrics.values())
    found = {key: extracted(metric["value_extractor"], line) for key, metric in metrics.items()}
    assert found == {"unfinished": 1, "oldest_queued_seconds": 900}


def test_each_alert_looks_at_what_there_is(plan: list[Resource]) -> None:
    """Every count of ours, Pub/Sub's of dead letters, and what Cloud Scheduler is refused."""
    counting = ("google_logging_metric.failed_exports", "google_logging_metric.sweeps")
    counted = {f"logging.googleapis.com/user/{each.values['name']}" for each in plan if each.address in counting}
    policies = [each for each in plan if each.kind == "google_monitoring_alert_policy"]
    conditions = [condition for each in policies for condition in each.values["conditions"]]
    looked_at = []
    for condition in conditions:
        (told,) = condition["condition_threshold"]
        match = re.match(r'metric\.type="([^"]+)" AND resource\.type="(\w+)"', told["filter"])
        assert match
        looked_at.append(match.groups())
    assert {metric for metric, _ in looked_at} == counted | GOOGLES.keys()
    assert {(metric, kind) for metric, kind in looked_at if metric in GOOGLES} == set(GOOGLES.items())
    assert {kind for metric, kind in looked_at if metric in counted} == {JOB, FUNCTION}


def test_each_alert_is_in_the_runbook(plan: list[Resource]) -> None:
    """Under the name that its text gives."""
    runbook = Path(INFRA, "README.md").read_text()
    policies = [each.values for each in plan if each.kind == "google_monitoring_alert_policy"]
    named = [re.findall(r"`(\w+)`", policy["documentation"][0]["content"]) for policy in policies]
    assert len(named) == 5
    for (name,) in named:
        assert f"| `{name}` |" in runbook
