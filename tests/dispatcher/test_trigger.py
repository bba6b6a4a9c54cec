"""One execution per export, however often its message is delivered and whatever dies on the way."""

import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from dispatcher.contract import JobMessage, State
from dispatcher.errors import LaunchInDoubt, SweepIncomplete, Unavailable
from tests.dispatcher.world import World

MESSAGE = JobMessage(job_id="job", export_id="job.merged")


def test_a_message_starts_an_execution_and_notes_it(world: World) -> None:
    """The job id is the argument; export and lease come as the environment."""
    world.job()
    record = world.launched()
    assert (record.state, record.execution) == (State.STARTING, "execution-1")
    assert record.log_uri == "file:///logs/execution-1.log"
    assert record.lease is not None
    job_id, environment = world.machines.started["execution-1"]
    assert job_id == "job"
    assert environment == {"EXPORT_ID": "job.merged", "LEASE_ID": record.lease.lease_id}


@pytest.mark.parametrize(("base", "tasks"), [("google/gemma-3-27b-it", 4), ("google/gemma-3-1b-it", 1), (None, 1)])
def test_an_execution_has_the_tasks_that_its_base_is_worth(world: World, base: str | None, tasks: int) -> None:
    """One where the training job is damaged: enough to say so."""
    world.job(base_model_id="google/gemma-3-4b-it")
    world.submit()
    with sqlite3.connect(world.home / "records.db") as database:
        change = "UPDATE training_jobs SET document = json_set(document, '$.base_model_id', ?)"
        database.execute(change, (base,))
    database.close()
    world.trigger.start(MESSAGE)
    assert world.machines.tasks == {"execution-1": tasks}


def test_one_machine_has_one_task_whatever_the_base(tmp_path: Path) -> None:
    """Its cores and its disk are one task's already."""
    world = World(tmp_path, several_tasks=False)
    world.job(base_model_id="google/gemma-3-27b-it")
    world.submit()
    world.trigger.start(MESSAGE)
    assert world.machines.tasks == {"execution-1": 1}


def test_a_hundred_deliveries_at_once_start_one_execution(world: World) -> None:
    """Each of the others is acknowledged, or refused while the launch is under way."""
    world.job()
    world.submit()
    ready = threading.Barrier(100)
    surprises: list[BaseException] = []

    def deliver() -> None:
        ready.wait()
        try:
            world.trigger.start(MESSAGE)
        except Unavailable as refusal:
            if refusal.error_code != "launch_in_progress":
                surprises.append(refusal)
        except BaseException as surprise:  # noqa: BLE001  # a thread's exception is otherwise lost
            surprises.append(surprise)

    threads = [threading.Thread(target=deliver) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert surprises == []
    assert len(world.machines.started) == 1
    assert world.record().execution == "execution-1"


@pytest.mark.parametrize("ending", ["complete", "fail", "cancel", "run"])
def test_a_redelivered_message_of_settled_work_is_acknowledged(world: World, ending: str) -> None:
    """Finished, failed for good, cancelled or running: nothing is started and nothing changes."""
    world.job()
    world.launched()
    world.claim()
    if ending == "cancel":
        world.service.cancel("job.merged", "ann")
    elif ending != "run":
        getattr(world, ending)()
    before = world.record()
    world.trigger.start(MESSAGE)
    assert world.record() == before
    assert len(world.machines.started) == 1


def test_a_replay_runs_a_retryable_failure_again(world: World) -> None:
    """A day of messages can be replayed after an outage."""
    world.job()
    world.launched()
    world.claim()
    world.fail(retryable=True)
    world.trigger.start(MESSAGE)
    assert (world.record().state, world.record().execution) == (State.STARTING, "execution-2")


def test_a_runner_that_refuses_gets_the_message_again(world: World) -> None:
    """The lease is given back at once, so that the next delivery need not wait for it."""
    world.job()
    world.submit()
    world.machines.down = True
    with pytest.raises(Unavailable):
        world.trigger.start(MESSAGE)
    assert (world.record().state, world.record().lease) == (State.QUEUED, None)
    world.machines.down = False
    world.trigger.start(MESSAGE)
    assert world.record().execution == "execution-1"


def test_a_launch_in_doubt_keeps_its_lease(world: World) -> None:
    """It may be at work: only when the lease has run out unclaimed is another one started."""
    world.job()
    world.submit()
    world.machines.in_doubt = True
    with pytest.raises(LaunchInDoubt):
        world.trigger.start(MESSAGE)
    world.machines.in_doubt = False
    doubtful = world.record()
    assert (doubtful.state, doubtful.execution) == (State.STARTING, None)
    assert doubtful.lease is not None
    assert doubtful.lease.lease_id == world.machines.started["execution-1"][1]["LEASE_ID"]
    with pytest.raises(Unavailable) as refusal:
        world.trigger.start(MESSAGE)
    assert refusal.value.error_code == "launch_in_progress"
    world.clock.pass_seconds(121)
    world.trigger.start(MESSAGE)
    assert world.record().execution == "execution-2"


def test_a_launch_that_died_is_tried_again_after_its_lease(world: World) -> None:
    """Until then its message is refused, so that it comes back."""

    class Dies(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Dies

    world.job()
    world.submit()
    start, world.machines.start = world.machines.start, die  # type: ignore[method-assign, assignment]
    with pytest.raises(Dies):
        world.trigger.start(MESSAGE)
    world.machines.start = start  # type: ignore[method-assign]
    with pytest.raises(Unavailable) as refusal:
        world.trigger.start(MESSAGE)
    assert refusal.value.error_code == "launch_in_progress"
    world.clock.pass_seconds(121)
    world.trigger.start(MESSAGE)
    assert world.record().execution == "execution-1"


def test_running_work_that_died_is_started_again(world: World) -> None:
    """A dead lease is taken back by the next delivery."""
    world.job()
    world.launched()
    world.claim()
    world.clock.pass_seconds(121)
    world.trigger.start(MESSAGE)
    assert (world.record().state, world.record().execution) == (State.STARTING, "execution-2")
    assert world.record().attempt == 1


def test_an_execution_may_wait_for_its_machine(world: World) -> None:
    """Launched but not claimed: with a grace, its lease running out starts no second one."""
    patient = World(world.home / "patient", launch_grace_seconds=900)
    patient.job()
    patient.launched()
    patient.clock.pass_seconds(300)
    patient.trigger.start(MESSAGE)
    assert patient.trigger.sweep() == {"requeued": 0, "failed": 0, "published": 0}
    patient.clock.pass_seconds(900)
    patient.trigger.start(MESSAGE)
    assert len(patient.machines.started) == 2
    patient.close()


@pytest.mark.parametrize("ending", ["run", "complete"])
def test_an_exporter_faster_than_the_note_keeps_its_claim_and_gets_its_log(world: World, ending: str) -> None:
    """It knows its own name; where its log lies only the runner's answer says."""
    world.job()
    world.submit()
    start = world.machines.start

    def claimed_at_once(job_id: str, environment: dict[str, str], *, tasks: int) -> object:
        execution = start(job_id, environment, tasks=tasks)
        world.claim(execution=execution.name)
        if ending == "complete":
            world.complete()
        return execution

    world.machines.start = claimed_at_once  # type: ignore[method-assign, assignment]
    world.trigger.start(MESSAGE)
    record = world.record()
    assert record.state is (State.COMPLETED if ending == "complete" else State.RUNNING)
    assert (record.execution, record.log_uri) == ("execution-1", "file:///logs/execution-1.log")


def test_an_execution_that_was_too_late_is_not_noted(world: World) -> None:
    """Somebody ran the job by hand meanwhile: the record names the execution that is at work."""
    world.job()
    world.submit()
    start = world.machines.start

    def overtaken(job_id: str, environment: dict[str, str], *, tasks: int) -> object:
        execution = start(job_id, environment, tasks=tasks)
        world.claim(execution="by-hand")
        return execution

    world.machines.start = overtaken  # type: ignore[method-assign, assignment]
    world.trigger.start(MESSAGE)
    assert (world.record().execution, world.record().log_uri) == ("by-hand", None)


def test_an_execution_that_gave_its_work_back_at_once_is_not_noted(world: World) -> None:
    """A queued record that names an execution would never be started again."""
    world.job()
    world.submit()
    start = world.machines.start

    def gave_back(job_id: str, environment: dict[str, str], *, tasks: int) -> object:
        execution = start(job_id, environment, tasks=tasks)
        world.claim(execution=execution.name)
        world.give_back()
        return execution

    world.machines.start = gave_back  # type: ignore[method-assign, assignment]
    world.trigger.start(MESSAGE)
    assert (world.record().state, world.record().execution) == (State.QUEUED, None)
    world.machines.start = start  # type: ignore[method-assign]
    world.trigger.start(MESSAGE)
    assert world.record().execution == "execution-2"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"schema_version": 2, "job_id": "job", "export_id": "job.merged"}',
        b'{"job_id": "job", "export_id": "other.merged"}',
        b'{"job_id": "../job", "export_id": "../job.merged"}',
        b'{"job_id": "job", "export_id": "job.merged", "hf_token": "hf_x"}',
        b"[" * 100_000,
    ],
)
def test_a_message_nobody_can_read_is_acknowledged(world: World, body: bytes) -> None:
    """It would never read better; refusing it would only bring it back."""
    world.trigger.deliver(body, {})
    assert world.machines.started == {}


def test_a_message_for_an_export_that_is_not_there_is_acknowledged(world: World) -> None:
    """Its record was deleted; there is nothing to do."""
    world.trigger.start(MESSAGE)
    assert world.machines.started == {}


def test_the_trace_travels_with_the_message_to_the_execution(world: World) -> None:
    """From the request through the queue into the environment."""
    from dispatcher.contract import ExportRequest

    world.job()
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    request = ExportRequest.model_validate({"job_id": "job", "export_type": "merged"})
    world.service.submit(request, "ann", traceparent=trace)
    world.queue.deliver_all(world.trigger)
    assert world.machines.started["execution-1"][1]["TRACEPARENT"] == trace


def test_a_sweep_requeues_the_dead_and_leaves_the_living(world: World) -> None:
    """Only leases that ran out are taken back."""
    for name in ("dead", "alive"):
        world.job(name)
        world.launched(name)
    world.claim("dead.merged", seconds=10)
    world.claim("alive.merged", seconds=1000)
    world.clock.pass_seconds(11)
    assert world.trigger.sweep() == {"requeued": 1, "failed": 0, "published": 1}
    assert world.record("dead.merged").state is State.QUEUED
    assert world.record("alive.merged").state is State.RUNNING


def test_a_sweep_fails_what_has_no_attempt_left(world: World) -> None:
    """`attempts_exhausted`, which a new request may start over."""
    world.job()
    world.submit()
    for _ in range(5):
        world.queue.deliver_all(world.trigger)
        world.claim()
        world.clock.pass_seconds(121)
        done = world.trigger.sweep()
    assert done == {"requeued": 0, "failed": 1, "published": 0}
    error = world.record().error
    assert error is not None
    assert (error.code, error.retryable) == ("attempts_exhausted", True)
    assert world.submit().state is State.QUEUED


@pytest.mark.parametrize("finder", ["sweep", "message"])
def test_an_execution_that_never_claims_is_not_started_for_ever(world: World, finder: str) -> None:
    """After max_attempts launches it is failed, `could_not_start`, whoever finds the last one dead."""
    world.job()
    world.submit()
    for _ in range(13):
        if finder == "message":
            world.trigger.start(MESSAGE)
        else:
            world.queue.deliver_all(world.trigger)
        world.clock.pass_seconds(121)
        if finder == "sweep":
            world.trigger.sweep()
        if world.record().state is State.FAILED:
            break
    assert len(world.machines.started) == 5
    error = world.record().error
    assert error is not None
    assert (error.code, error.retryable) == ("could_not_start", True)
    assert world.submit().launches == 0


def test_work_without_an_attempt_left_is_not_replayed_by_the_message_that_finds_it(world: World) -> None:
    """The verdict acknowledges the message; only a new request or a replay starts over."""
    world.job()
    world.submit()
    for _ in range(5):
        world.trigger.start(MESSAGE)
        world.claim()
        world.clock.pass_seconds(121)
    world.trigger.start(MESSAGE)
    assert world.record().state is State.FAILED
    assert len(world.machines.started) == 5


def test_a_launch_that_was_refused_is_not_counted(world: World) -> None:
    """An outage of the machines must not use up the launches."""
    world.job()
    world.submit()
    world.machines.down = True
    for _ in range(9):
        with pytest.raises(Unavailable):
            world.trigger.start(MESSAGE)
    assert world.record().launches == 0


def test_a_rescan_publishes_what_the_last_process_had_in_its_queue(world: World) -> None:
    """However recently it was published: that queue is gone."""
    world.job()
    world.submit()
    world.queue.held.clear()
    assert world.trigger.sweep()["published"] == 0
    assert world.trigger.sweep(lost_messages=True)["published"] == 1
    world.queue.deliver_all(world.trigger)
    assert world.record().execution == "execution-1"


class Partly:
    """A queue that refuses the messages of some jobs."""

    def __init__(self, world: World, refused: set[str]) -> None:
        self.refused = refused
        self.tried = 0
        self._publish = world.queue.publish
        world.queue.publish = self.publish  # type: ignore[method-assign]

    def publish(self, message: JobMessage, attributes: Mapping[str, str]) -> None:
        self.tried += 1
        if message.job_id in self.refused:
            raise Unavailable("the queue is down")
        self._publish(message, attributes)


def test_one_that_cannot_be_tended_keeps_no_other_from_it(world: World) -> None:
    """And in the end the sweep says which, and what it did."""
    for name in ("a", "b", "c"):
        world.job(name)
        world.submit(name)
    world.queue.held.clear()
    world.clock.pass_seconds(300)
    Partly(world, {"a", "b"})
    with pytest.raises(SweepIncomplete) as error:
        world.trigger.sweep()
    assert error.value.done == {"requeued": 0, "failed": 0, "published": 1}
    assert [missed.partition(":")[0] for missed in error.value.missed] == ["a.merged", "b.merged"]
    assert "a.merged: the queue is down" in error.value.message
    assert [attributes["job_id"] for _, attributes in world.queue.held] == ["c"]


def test_a_sweep_does_not_wait_for_a_queue_that_is_gone(tmp_path: Path) -> None:
    """Each attempt takes seconds there; what lies between is no sign of life."""
    world = World(tmp_path, max_unfinished_per_user=30)
    for number in range(30):
        name = f"job{number:02}"
        world.job(name)
        world.submit(name)
        if number % 3 == 2:
            world.queue.deliver_all(world.trigger)
            world.claim(f"{name}.merged", seconds=10_000)
        world.queue.held.clear()
    world.clock.pass_seconds(300)
    queue = Partly(world, {f"job{number:02}" for number in range(30)})
    with pytest.raises(SweepIncomplete) as error:
        world.trigger.sweep()
    assert queue.tried == len(error.value.missed) == 10
    queue.refused.clear()
    assert world.trigger.sweep()["published"] == 20


def test_a_dead_lease_is_taken_back_even_while_the_queue_is_down(world: World) -> None:
    """The next sweep sends its message; but what was queued just now is left to whoever did that."""
    world.job()
    world.launched()
    world.claim()
    world.clock.pass_seconds(121)
    queue = Partly(world, {"job"})
    with pytest.raises(SweepIncomplete) as error:
        world.trigger.sweep()
    assert error.value.done == {"requeued": 1, "failed": 0, "published": 0}
    assert world.record().state is State.QUEUED
    queue.refused.clear()
    assert not any(world.trigger.sweep().values())
    world.clock.pass_seconds(60)
    assert world.trigger.sweep() == {"requeued": 0, "failed": 0, "published": 1}


def sweep_for_an_hour(world: World) -> list[dict[str, int]]:
    """A sweep every five minutes."""
    done = []
    for _ in range(12):
        world.clock.pass_seconds(300)
        done.append(world.trigger.sweep())
    return done


def test_messages_of_which_none_is_delivered_end_after_an_hour(world: World) -> None:
    """`not_delivered`, which says where to look; twelve were sent."""
    world.job()
    world.submit()
    *before, last = sweep_for_an_hour(world)
    assert before == [{"requeued": 0, "failed": 0, "published": 1}] * 11
    assert last == {"requeued": 0, "failed": 1, "published": 0}
    assert len(world.queue.held) == 12
    error = world.record().error
    assert error is not None
    assert (error.code, error.retryable) == ("not_delivered", True)
    assert "12 messages" in error.message
    assert world.submit().publications == 1


def test_a_message_that_comes_after_all_runs_what_was_given_up(world: World) -> None:
    """The subscription was mended: what it kept is delivered."""
    world.job()
    world.submit()
    sweep_for_an_hour(world)
    assert world.record().state is State.FAILED
    world.queue.deliver_all(world.trigger)
    assert (world.record().state, world.record().publications) == (State.STARTING, 0)
    assert len(world.machines.started) == 1


def test_deliveries_that_no_machine_takes_are_deliveries(world: World) -> None:
    """An outage of the machines gives nothing up: only its dead letter does."""
    world.job()
    world.submit()
    world.machines.down = True
    for _ in range(30):
        world.clock.pass_seconds(300)
        assert world.trigger.sweep() == {"requeued": 0, "failed": 0, "published": 1}
        with pytest.raises(Unavailable):
            world.trigger.start(MESSAGE)
    assert world.record().publications == 0


def test_a_message_that_the_queue_refused_was_not_sent(world: World) -> None:
    """Nor does an outage of the queue use anything up, nor a process that starts anew with an empty queue."""
    world.job()
    world.queue.down = True
    with pytest.raises(Unavailable):
        world.submit()
    for _ in range(20):
        world.clock.pass_seconds(300)
        with pytest.raises(SweepIncomplete):
            world.trigger.sweep()
    world.queue.down = False
    for _ in range(20):
        world.clock.pass_seconds(300)
        assert world.trigger.sweep(lost_messages=True)["published"] == 1
    assert world.record().state is State.QUEUED
