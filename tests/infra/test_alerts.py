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
from dispatcher.watched import Backlog
from tests.dispatcher.world import World
from tests.exporter.exporting import training_document
from tests.infra.conftest import Find
from tests.terraform.running import INFRA, Resource

JOB, FUNCTION = "cloud_run_job", "cloud_run_revision"
MESSAGE = JobMessage(job_id="job", export_id="job.merged")
_TERM = re.compile(r'(resource\.type|jsonPayload\.\w+)=(?:"(\w+)"|\(("\w+"(?: OR "\w+")*)\))')


def matches(filter: str, resource_type: str, line: dict[str, Any]) -> bool:
    """Whether Cloud Logging's filter takes a line; what is in none of ours is refused."""
    for term in filter.split(" AND "):
        match = _TERM.fullmatch(term)
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


@pytest.mark.parametrize(
    ("key", "seconds", "value"),
    [("unfinished", 0, 1), ("oldest_queued_seconds", 900, 900), ("stuck_leases", 3 * 3600, 1)],
)
def test_what_a_sweep_finds_is_measured(
    find: Find, world: World, logged: io.StringIO, key: str, seconds: int, value: int
) -> None:
    """One that waits, for how long, and one whose holder is long dead."""
    world.job()
    if key == "stuck_leases":
        world.launched()
    else:
        world.submit()
    world.clock.pass_seconds(seconds)
    swept(world.trigger, world.collector)
    metric = find(f'google_logging_metric.swept["{key}"]').values
    (line,) = (line for line in lines(logged) if matches(metric["filter"], FUNCTION, line))
    assert extracted(metric["value_extractor"], line) == value
    assert not matches(metric["filter"], JOB, line)


def test_each_number_of_a_sweep_is_a_metric(plan: list[Resource]) -> None:
    """And no other."""
    metrics = {each.key for each in plan if each.address == "google_logging_metric.swept"}
    assert metrics == vars(Backlog()).keys()


def test_each_alert_looks_at_what_there_is(plan: list[Resource]) -> None:
    """At a metric of ours, or at Pub/Sub's own of the subscription that starts exports."""
    ours = {
        f"logging.googleapis.com/user/{each.values['name']}" for each in plan if each.kind == "google_logging_metric"
    }
    policies = [each for each in plan if each.kind == "google_monitoring_alert_policy"]
    conditions = [condition for each in policies for condition in each.values["conditions"]]
    looked_at = []
    for condition in conditions:
        (told,) = condition["condition_threshold"] + condition["condition_absent"]
        match = re.match(r'metric\.type="([^"]+)" AND resource\.type="(\w+)"', told["filter"])
        assert match
        looked_at.append(match.groups())
    dead_letters = "pubsub.googleapis.com/subscription/dead_letter_message_count"
    assert {metric for metric, _ in looked_at} <= ours | {dead_letters}
    assert {metric for metric, _ in looked_at} >= {dead_letters, *(name for name in ours)}
    assert {kind for _, kind in looked_at} == {JOB, FUNCTION, "pubsub_subscription"}


def test_each_alert_is_in_the_runbook(plan: list[Resource]) -> None:
    """Under the name that its text gives."""
    runbook = Path(INFRA, "README.md").read_text()
    policies = [each.values for each in plan if each.kind == "google_monitoring_alert_policy"]
    named = [re.findall(r"`(\w+)`", policy["documentation"][0]["content"]) for policy in policies]
    assert len(named) == 5
    for (name,) in named:
        assert f"| `{name}` |" in runbook
