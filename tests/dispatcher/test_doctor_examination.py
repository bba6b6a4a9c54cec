"""How `gemma-export doctor` asks: nothing that hangs, breaks or is interrupted keeps it from ending and clearing up."""

import json
import subprocess
import sys
import threading
import time
from http import HTTPStatus

import pytest

from dispatcher.doctor import told
from dispatcher.doctor_examination import Examination
from dispatcher.doctor_findings import FINE, Check, Finding, Group, Verdict, summary
from dispatcher.errors import Misconfigured
from tests.dispatcher.deployed import Deployed, examined

HANGING = """
import threading
from dispatcher.doctor_examination import Examination
from dispatcher.doctor_findings import Check, Group

examination = Examination([Group([Check("a", "ask", threading.Event().wait)])])
print([finding.verdict.code for finding in examination.findings(0.1)], examination.end(0.1))
"""


def codes(findings: list[Finding]) -> list[str]:
    return [finding.verdict.code for finding in findings]


def test_what_never_ends_is_said_to_be_late_and_everything_else_is_told_in_order() -> None:
    """Even what comes after it, of other groups; of its own, nothing is known."""
    never = threading.Event()
    closed = threading.Event()

    def hang() -> Verdict:
        never.wait(30)
        return FINE

    stuck = Group([Check("a", "", lambda: FINE), Check("b", "", hang), Check("c", "", lambda: FINE)], closed.set)
    other = Group([Check("d", "", lambda: FINE)])
    began = time.monotonic()
    found = examined([stuck, other], limit=0.3, ending=0.3)
    assert time.monotonic() - began < 5
    assert [finding.check.name for finding in found] == ["a", "b", "c", "d"]
    assert codes(found) == ["ok", "timed_out", "not_asked", "ok"]
    assert [finding.is_fault for finding in found] == [False, True, False, False]
    never.set()
    assert closed.wait(5)


class Panic(BaseException):
    """What a library that is written in Rust raises when it gives up: no Exception."""


@pytest.mark.parametrize("fault", [ZeroDivisionError, Panic])
def test_a_probe_that_breaks_never_looks_like_a_sound_deployment_and_ends_nothing(fault: type[BaseException]) -> None:
    """A fault of doctor's own is one too, and the connection is closed all the same."""

    def broken() -> Verdict:
        raise fault("nothing by nothing")

    def refused() -> Verdict:
        raise Misconfigured("not with this account", code="permission_denied")

    closed: list[bool] = []
    checks = [Check("a", "ask", broken), Check("b", "ask", refused), Check("c", "ask", lambda: FINE, requires=("b",))]
    found = examined([Group(checks, lambda: closed.append(True))])
    assert codes(found) == ["check_failed", "permission_denied", "not_asked"]
    assert "nothing by nothing" in found[0].told()
    assert [finding.is_fault for finding in found] == [True, True, False]
    assert summary(found) == "0 ok, 1 MISSING, 1 WRONG, 1 cannot tell"


def test_what_hangs_for_good_does_not_keep_the_command_from_its_end() -> None:
    """Its thread ends with the process."""
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['timed_out'] []"


def test_clearing_up_is_waited_for() -> None:
    """It comes after the last verdict, and would end with the process."""
    cleared = threading.Event()

    def close() -> None:
        time.sleep(0.5)
        cleared.set()

    assert codes(examined([Group([Check("a", "ask", lambda: FINE)], close)])) == ["ok"]
    assert cleared.is_set()


def test_what_may_be_left_is_named_where_clearing_up_does_not_end() -> None:
    """After a time, whatever hangs; and it is no fault of the deployment's."""
    never = threading.Event()
    groups = [
        Group([Check("a", "ask", lambda: FINE)], lambda: never.wait(30), lambda: ["gs://bucket/probe"]),
        Group([Check("b", "ask", lambda: FINE)]),
    ]
    began = time.monotonic()
    found = examined(groups, ending=0.3)
    never.set()
    assert time.monotonic() - began < 5
    assert codes(found) == ["ok", "ok", "left_behind"]
    assert not found[-1].is_fault
    assert "there may be still: gs://bucket/probe" in found[-1].told()
    assert "gcloud storage rm gs://bucket/probe" in found[-1].told()


def test_nothing_more_is_asked_after_an_interruption() -> None:
    """What is being asked is waited for, and its group clears up."""
    asked, cleared, going = threading.Event(), threading.Event(), threading.Event()

    def first() -> Verdict:
        going.wait(30)
        return FINE

    def second() -> Verdict:
        asked.set()
        return FINE

    examination = Examination([Group([Check("a", "ask", first), Check("b", "ask", second)], cleared.set)])
    threading.Timer(0.2, going.set).start()
    assert examination.end() == []
    assert cleared.is_set()
    assert not asked.is_set()


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("removable", [True, False])
def test_whoever_interrupts_is_told_what_may_be_left(deployment: Deployed, as_json: bool, removable: bool) -> None:
    """While objects lie in the bucket to be looked at: they go, or are named."""
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if "merged_models.create" in line:
            raise KeyboardInterrupt

    if not removable:
        deployment.storage.fail(HTTPStatus.SERVICE_UNAVAILABLE, "DELETE", "/o/merged_models%2F", times=50)
    with pytest.raises(KeyboardInterrupt):
        told(deployment.settings(), ("exporter",), (), as_json=as_json, say=say)
    left = deployment.objects()
    assert len(left) == (0 if removable else 1)
    names = [f"gs://{deployment.bucket}/{name}" for name in left]
    if removable:
        assert "merged_models.create" in lines[-1]
    elif as_json:
        assert json.loads(lines[-1])["message"] == f"there may be still: {names[0]}"
    else:
        assert f"found: there may be still: {names[0]} (left_behind)" in lines[-1]
