"""The table of states: every legal move works, everything else is an error, and no walk breaks a record."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.contract import UNFINISHED, Artifact, ExportRecord, ExportType, Failure, Lease, State
from dispatcher.errors import IllegalTransition, LeaseHeld, LeaseLost
from dispatcher.lifecycle import (
    MOVES,
    Actor,
    completed,
    delivered,
    failed,
    needs_token,
    noted,
    reclaimed,
    renewed,
    transition,
)
from tests.dispatcher.test_contract import records
from tests.dispatcher.world import START

LATER = START + timedelta(hours=1)
LEASED = frozenset({State.STARTING, State.RUNNING})
states, actors = st.sampled_from(State), st.sampled_from(Actor)


def lease(lease_id: str = "mine", owner: str = "me", *, seconds: float = 120) -> Lease:
    return Lease(lease_id=lease_id, owner=owner, expires_at=START + timedelta(seconds=seconds))


def record(state: State, **fields: object) -> ExportRecord:
    held = lease() if state in LEASED else None
    document = {
        "export_id": "job.merged",
        "job_id": "job",
        "user_id": "ann",
        "export_type": "merged",
        "state": state,
        "lease": held,
        "adapter_fingerprint": "f",
        "created_at": START,
        "updated_at": START,
        **fields,
    }
    return ExportRecord.model_validate(document)


@given(records(), states, actors)
def test_a_move_that_the_table_lacks_fails(found: ExportRecord, to: State, by: Actor) -> None:
    """For every record, whatever its lease."""
    if by in MOVES.get((found.state, to), frozenset()):
        return
    with pytest.raises(IllegalTransition):
        transition(found, to, by=by, now=START, holding="mine", lease=lease())


@given(records(), states, actors, st.booleans())
def test_a_legal_move_is_one_revision_on_and_leaves_a_whole_record(
    found: ExportRecord, to: State, by: Actor, holds: bool
) -> None:
    """Leased states have a lease, others none; identity and fingerprint stay."""
    holding = found.lease.lease_id if holds and found.lease else "another"
    try:
        moved = transition(found, to, by=by, now=START, holding=holding, lease=lease() if to in LEASED else None)
    except IllegalTransition:
        return
    assert (moved.state, moved.revision) == (to, found.revision + 1)
    assert (moved.lease is not None) is (to in LEASED)
    assert moved.export_id == found.export_id
    assert (moved.error is None) or to in (State.FAILED, State.CANCELLED, State.STARTING, State.QUEUED)
    assert ExportRecord.model_validate_json(moved.model_dump_json()) == moved


@given(st.lists(st.tuples(states, actors, st.sampled_from(["a", "b"]), st.integers(0, 200)), max_size=40))
def test_no_walk_gives_one_export_to_two_holders(steps: list[tuple[State, Actor, str, int]]) -> None:
    """Whatever is tried in whatever order, a live lease changes hands only by its holder's or owner's own move."""
    now, current = START, record(State.QUEUED)
    for to, by, who, seconds in steps:
        now += timedelta(seconds=seconds)
        wanted = Lease(lease_id=f"{who}-{now}", owner=who, expires_at=now + timedelta(seconds=120))
        before = current
        holding = before.lease.lease_id if before.lease and before.lease.owner == who else None
        try:
            current = transition(before, to, by=by, now=now, holding=holding, lease=wanted if to in LEASED else None)
        except IllegalTransition:
            assert current is before
            continue
        live = before.lease is not None and before.lease.expires_at > now
        if live and to is not State.CANCELLED:
            assert before.lease is not None
            assert before.lease.owner == who
        assert current.attempt >= 0


def test_a_live_lease_of_someone_else_is_respected_and_a_dead_one_is_not() -> None:
    """The same owner's next attempt takes over at once, others after the end of the lease."""
    running = record(State.RUNNING)
    with pytest.raises(LeaseHeld):
        transition(running, State.RUNNING, by=Actor.EXPORTER, now=START, lease=lease("new", "other"))
    mine = transition(running, State.RUNNING, by=Actor.EXPORTER, now=START, lease=lease("new", "me"))
    assert mine.attempt == 1
    taken = transition(running, State.RUNNING, by=Actor.EXPORTER, now=LATER, lease=lease("new", "other"))
    assert taken.lease == lease("new", "other")


def test_who_lost_the_lease_writes_nothing_more() -> None:
    """Neither a heartbeat nor a verdict."""
    running = record(State.RUNNING, lease=lease("theirs"))
    with pytest.raises(LeaseLost):
        renewed(running, holding="mine", expires_at=LATER, stage="merge", progress=0.5, now=START)
    with pytest.raises(LeaseLost):
        completed(running, holding="mine", artifacts=(), now=START)
    with pytest.raises(LeaseLost):
        failed(running, by=Actor.EXPORTER, error=Failure(code="c", message="m", retryable=False), now=START)
    with pytest.raises(LeaseLost):
        renewed(record(State.CANCELLED), holding="mine", expires_at=LATER, stage="s", progress=0, now=START)


@pytest.mark.parametrize("retryable", [True, False])
def test_a_token_is_kept_while_a_retry_can_use_it(retryable: bool) -> None:
    """After a failure for good the record only says where whoever deletes it finds it."""
    error = Failure(code="c", message="m", retryable=retryable)
    running = record(State.RUNNING, token_ref="ref")
    ended = failed(running, by=Actor.EXPORTER, error=error, now=START, holding="mine")
    assert ended.token_ref == "ref"
    assert needs_token(ended) is retryable


def test_stage_and_progress_never_go_back_under_one_lease() -> None:
    """Of several tasks, each reports its own: one that begins late does not hide how far the others are."""
    running = renewed(record(State.RUNNING), holding="mine", expires_at=LATER, stage="merging", progress=0.6, now=START)
    other = renewed(running, holding="mine", expires_at=LATER, stage="planning", progress=0.1, now=START)
    assert (other.stage, other.progress) == ("merging", 0.6)
    level = renewed(other, holding="mine", expires_at=LATER, stage="verifying", progress=0.6, now=START)
    assert (level.stage, level.progress) == ("verifying", 0.6)
    again = transition(other, State.RUNNING, by=Actor.EXPORTER, now=START, lease=lease("new", "me"))
    assert (again.stage, again.progress) == ("claimed", 0.0)


def test_the_dead_letter_leaves_what_has_an_execution() -> None:
    """Only an export that never got a machine fails with its message."""
    dead = record(State.STARTING, execution="e")
    with pytest.raises(LeaseHeld):
        transition(dead, State.FAILED, by=Actor.DEAD_LETTER, now=LATER)
    assert transition(record(State.QUEUED), State.FAILED, by=Actor.DEAD_LETTER, now=LATER).state is State.FAILED


@given(records())
def test_only_what_is_dead_is_reclaimed(found: ExportRecord) -> None:
    """Never under a live lease, never what is finished."""
    back = reclaimed(found, now=LATER, max_attempts=3)
    dead = found.state in LEASED and found.lease is not None and found.lease.expires_at <= LATER
    assert (back is not None) is dead
    if back is not None:
        tried = found.launches if found.state is State.STARTING else found.attempt
        assert back.state is (State.FAILED if tried >= 3 else State.QUEUED)
        assert back.lease is None


@given(st.lists(st.booleans(), max_size=30))
def test_every_walk_of_launches_and_claims_ends(claims: list[bool]) -> None:
    """Whichever launches claim before they die, the export is given up within max_attempts squared of them."""
    now, current, launches = START, record(State.QUEUED), 0
    for claimed in [*claims, *[False] * 3]:
        holding = lease(seconds=(now - START).total_seconds() + 60)
        current = transition(current, State.STARTING, by=Actor.TRIGGER, now=now, lease=holding)
        launches += 1
        if claimed:
            current = transition(
                current, State.RUNNING, by=Actor.EXPORTER, now=now, lease=holding, holding=holding.lease_id
            )
            assert current.launches == 0
        with pytest.raises(LeaseHeld):
            transition(current, State.FAILED, by=Actor.SWEEP, now=now)
        now += timedelta(seconds=61)
        back = reclaimed(current, now=now, max_attempts=3)
        assert back is not None
        current = back
        if current.state is State.FAILED:
            break
    assert current.state is State.FAILED
    assert launches <= 9
    again = transition(current, State.QUEUED, by=Actor.CALLER, now=now)
    assert (again.launches, again.attempt) == (0, 0)


def test_only_facts_are_noted() -> None:
    """A state cannot be slipped in beside the table."""
    with pytest.raises(IllegalTransition):
        noted(record(State.QUEUED), START, state=State.COMPLETED)
    assert noted(record(State.QUEUED), START, published_at=START).published_at == START


def test_only_an_adapter_is_delivered_without_an_exporter() -> None:
    """A merged model takes one."""
    artifact = Artifact(kind=ExportType.ADAPTER, uri="/a", version="v", bytes=1, files=1, manifest=None)
    with pytest.raises(IllegalTransition):
        delivered(record(State.QUEUED), adapter=artifact, adapter_fingerprint="f", now=START)
    adapter = record(State.QUEUED, export_type="adapter", export_id="job.adapter")
    assert delivered(adapter, adapter=artifact, adapter_fingerprint="f", now=START).path == "/a"


def test_every_state_can_be_left_or_is_asked_for_again() -> None:
    """No export is ever stuck: from each state some actor moves on."""
    assert {start for start, _ in MOVES} == set(State)
    assert all(any(end in UNFINISHED for start, end in MOVES if start is state) for state in State)
