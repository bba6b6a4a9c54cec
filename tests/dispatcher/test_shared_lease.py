"""How several tasks hold an export together: what each may do to its record, and when it must step back."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.contract import ExportRecord, State
from dispatcher.errors import LeaseLost, Unavailable
from dispatcher.lifecycle import Actor, transition
from dispatcher.shared_lease import agreed, asked_anew, joined, left_to_others
from tests.dispatcher.test_contract import records
from tests.dispatcher.test_lifecycle import LATER, lease, record
from tests.dispatcher.world import START


@given(records(), st.integers(-200, 200), st.integers(-200, 200))
def test_a_further_task_changes_nothing_but_the_lease(found: ExportRecord, left: int, wanted: int) -> None:
    """Live or run out: it stays the same, and is never shortened; it is no attempt of its own."""
    running = found.model_copy(update={"state": State.RUNNING, "lease": lease(seconds=left)})
    until = START + timedelta(seconds=wanted)
    after = joined(running, execution="me", expires_at=until, now=START)
    change = {"lease": lease(seconds=max(left, wanted)), "revision": found.revision + 1, "updated_at": START}
    assert after == running.model_copy(update=change)
    with pytest.raises(LeaseLost):
        joined(running, execution="other", expires_at=until, now=START)


@given(records(), st.integers(-200, 200), st.integers(-200, 200))
def test_a_lease_that_is_left_is_longer_or_as_it_was(found: ExportRecord, left: int, wanted: int) -> None:
    """It is the same lease; and whoever has lost it has none to leave."""
    running = found.model_copy(update={"state": State.RUNNING, "lease": lease(seconds=left)})
    until = START + timedelta(seconds=wanted)
    after = left_to_others(running, holding="mine", expires_at=until, now=START)
    change = {"lease": lease(seconds=wanted), "revision": found.revision + 1, "updated_at": START}
    assert after == (running.model_copy(update=change) if wanted > left else None)
    with pytest.raises(LeaseLost):
        left_to_others(running, holding="theirs", expires_at=until, now=START)
    with pytest.raises(LeaseLost):
        left_to_others(record(State.COMPLETED), holding="mine", expires_at=until, now=START)


def test_the_first_task_says_which_version_is_made() -> None:
    """The others make the same, or what takes its place where it is spoilt; a new claim begins anew."""

    def said(found: ExportRecord, version: str, instead_of: str | None = None) -> ExportRecord | None:
        return agreed(found, holding="mine", version=version, instead_of=instead_of, now=START)

    first = said(record(State.RUNNING), "v1", "nonce")
    assert first is not None
    assert said(first, "v1") is None
    assert joined(first, execution="me", expires_at=LATER, now=START).version == "v1"
    with pytest.raises(Unavailable) as refusal:
        said(first, "v2", "v0")
    assert (refusal.value.error_code, refusal.value.retryable) == ("source_changed", True)
    second = said(first, "v2", "v1")
    assert second is not None
    assert second.version == "v2"
    with pytest.raises(LeaseLost):
        agreed(first, holding="theirs", version="v1", instead_of=None, now=START)
    swept = transition(first, State.QUEUED, by=Actor.SWEEP, now=LATER)
    taken = transition(first, State.RUNNING, by=Actor.EXPORTER, now=LATER, lease=lease("new", "other"))
    assert (swept.version, taken.version) == (None, None)


@given(records())
def test_what_is_not_running_is_not_joined(found: ExportRecord) -> None:
    """Queued again, finished or cancelled: whoever begins now is no task of that claim."""
    if found.state is State.RUNNING:
        return
    owner = found.lease.owner if found.lease else "me"
    with pytest.raises(LeaseLost):
        joined(found, execution=owner, expires_at=LATER, now=START)


def test_only_who_asks_anew_forgets_the_launches_before() -> None:
    """The sweep, which takes an execution for lost, does not; nor is a launch asked anew under its own lease."""
    dead = lease("handed", "trigger", seconds=-1)
    launched = transition(record(State.QUEUED), State.STARTING, by=Actor.TRIGGER, now=START, lease=dead)
    swept = transition(launched, State.QUEUED, by=Actor.SWEEP, now=START)
    again = transition(swept, State.STARTING, by=Actor.TRIGGER, now=START, lease=lease("other", "trigger"))
    stopped = transition(record(State.RUNNING, attempt=1, lease=dead), State.QUEUED, by=Actor.SWEEP, now=START)
    assert not any(asked_anew(found, handed="handed") for found in (launched, swept, again, stopped))
    for ended in (again, record(State.RUNNING, attempt=1), record(State.FAILED, attempt=2)):
        given_up = (
            ended if ended.state is State.FAILED else transition(ended, State.CANCELLED, by=Actor.CALLER, now=START)
        )
        queued = transition(given_up, State.QUEUED, by=Actor.CALLER, now=START)
        other = transition(queued, State.STARTING, by=Actor.TRIGGER, now=START, lease=lease("other", "trigger"))
        assert asked_anew(queued, handed="handed")
        assert asked_anew(other, handed="handed")
        assert not asked_anew(other, handed="other")
