"""The alerts of a deployment look at lines that the code really logs."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dispatcher import logs
from dispatcher.contract import JobMessage
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.sweep import swept
from dispatcher.watched import export_failed
from tests.dispatcher.world import World
from tests.exporter.exporting import training_document
from tests.infra.conftest import Find
from tests.terraform.running import INFRA, Resource, Terraform

JOB, FUNCTION = "cloud_run_job", "cloud_run_revision"
USER = "logging.googleapis.com/user/gemma-export"
CHANNEL = "projects/other/notificationChannels/7"
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


def of_ours(name: str, kind: str, *more: str) -> str:
    return " AND ".join([f'metric.type="{USER}/{name}"', f'resource.type="{kind}"', *more])


SAID = -1
"""One less than `failed_exports_per_hour`, whatever that is."""
ABOVE, BELOW = "COMPARISON_GT", "COMPARISON_LT"
PASSING = 'metric.labels.retryable="true"'
DEAD_LETTERS = (
    'metric.type="pubsub.googleapis.com/subscription/dead_letter_message_count"'
    ' AND resource.type="pubsub_subscription" AND resource.labels.subscription_id="gemma-export-push"'
)
REFUSED = (
    'metric.type="logging.googleapis.com/log_entry_count" AND resource.type="cloud_scheduler_job"'
    ' AND resource.labels.job_id="gemma-export-sweep" AND metric.labels.severity="ERROR"'
)
WATCHED = {
    "failed_exports": [
        (of_ours("failed_exports", JOB, PASSING), ABOVE, 0, "3600s", "0s"),
        (of_ours("failed_exports", FUNCTION, PASSING), ABOVE, 0, "3600s", "0s"),
        (of_ours("failed_exports", JOB), ABOVE, SAID, "3600s", "0s"),
    ],
    "dead_letters": [(DEAD_LETTERS, ABOVE, 0, "600s", "0s")],
    "stuck_leases": [(of_ours("stuck_leases", FUNCTION), ABOVE, 0, "600s", "0s")],
    "oldest_queued": [(of_ours("oldest_queued", FUNCTION), ABOVE, 0, "600s", "0s")],
    "no_sweep": [
        (of_ours("sweeps", FUNCTION), BELOW, 1, "1800s", "300s"),
        (REFUSED, ABOVE, 2, "1800s", "0s"),
    ],
}
"""Of each alert, its conditions: what is counted, and how many of it in how long, for how long."""


def name_of(policy: Mapping[str, Any]) -> str:
    """The name under which an alert's text sends to the runbook."""
    (name,) = re.findall(r"`(\w+)`", policy["documentation"][0]["content"])
    return str(name)


@pytest.mark.parametrize("hourly", [1, 7])
def test_each_alert_fires_when_it_is_meant_to(deployment: Terraform, hourly: int) -> None:
    """At a failed export for a passing fault, at so many in an hour for whatever, at a dead letter; by mail."""
    plan = deployment.plan(
        failed_exports_per_hour=hourly, alert_emails=["a@example.com"], notification_channels=[CHANNEL]
    )
    policies = [each.values for each in plan if each.kind == "google_monitoring_alert_policy"]
    found: dict[str, list[tuple[Any, ...]]] = {}
    for policy in policies:
        conditions = found.setdefault(name_of(policy), [])
        for condition in policy["conditions"]:
            (told,) = condition["condition_threshold"]
            (how,) = told["aggregations"]
            assert (how["per_series_aligner"], how["cross_series_reducer"]) == ("ALIGN_DELTA", "REDUCE_SUM")
            window = (how["alignment_period"], told["duration"])
            conditions.append((told["filter"], told["comparison"], told["threshold_value"] or 0, *window))
            silent = "EVALUATION_MISSING_DATA_ACTIVE" if told["comparison"] == BELOW else None
            assert told["evaluation_missing_data"] == silent
        assert (policy["combiner"], policy["severity"]) == ("OR", "ERROR")
        assert policy["notification_channels"] == [CHANNEL, "projects/some-project/notificationChannels/1"]
    assert found.keys() == WATCHED.keys()
    for name, conditions in WATCHED.items():
        expected = [tuple(hourly - 1 if part == SAID else part for part in condition) for condition in conditions]
        assert sorted(found[name]) == sorted(expected)


def test_what_a_label_says_is_what_an_alert_asks_for(find: Find) -> None:
    """Cloud Logging writes what it extracts as JSON has it."""
    metric = find("google_logging_metric.failed_exports").values
    line = export_failed("unavailable", retryable=True)
    extracts = json.dumps(extracted(metric["label_extractors"]["retryable"], line))
    assert f'metric.labels.retryable="{extracts}"' == PASSING
    types = {label["key"]: label["value_type"] for label in metric["metric_descriptor"][0]["labels"]}
    assert types.keys() == metric["label_extractors"].keys()
    assert set(types.values()) <= {"STRING", None}  # which Google leaves out, being the default


def test_how_long_is_too_long_can_be_said(deployment: Terraform, world: World, logged: io.StringIO) -> None:
    """`oldest_queued_minutes`."""
    line = a_sweep(world, logged, launched=False, seconds=3000)
    counted = []
    for minutes in (49, 50):
        plan = deployment.plan(oldest_queued_minutes=minutes)
        (metric,) = (each.values for each in plan if (each.name, each.key) == ("sweeps", "oldest_queued"))
        counted.append(matches(metric["filter"], FUNCTION, line))
    assert counted == [True, False]


def test_each_alert_is_in_the_runbook(plan: list[Resource]) -> None:
    """Under the name that its text gives."""
    runbook = Path(INFRA, "README.md").read_text()
    names = {name_of(each.values) for each in plan if each.kind == "google_monitoring_alert_policy"}
    assert names == WATCHED.keys()
    assert all(f"| `{name}` |" in runbook for name in names)
