"""Several tasks of one execution: what each is dealt, how they hold an export together, and who ends it."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.artifacts import ArtifactStore, publish
from dispatcher.contract import Artifact, ExportRecord, State, TrainingJob
from dispatcher.errors import SourceError, Unavailable
from dispatcher.lifecycle import Actor, reclaimed
from dispatcher.records import update
from exporter import job
from exporter.artifact import Result
from exporter.job import ExitCode
from exporter.lease import Hold, utc_now
from exporter.stopping import Stop
from exporter.tasks import Tasks
from tests.exporter.exporting import gguf_record
from tests.exporter.place import EXPORT, Place, expired
from tests.gemmas import make_adapter, save_base
from tests.waiting import until

PARTS = [f"part-{number}" for number in range(8)]
SIZES = st.lists(st.integers(0, 1 << 40), max_size=40)


class Parts:
    """A recipe whose artifact is eight small files: each task makes those that it is dealt.

    Attributes:
        made: Which files each task made, in order.
        interfere: Called with the task's index before each file.
    """

    def __init__(self) -> None:
        self.made: dict[int, list[str]] = {}
        self.interfere: Callable[[int], object] = lambda index: None

    def __call__(
        self,
        store: ArtifactStore,
        job: TrainingJob,
        record: ExportRecord,
        *,
        hold: Hold,
        tasks: Tasks,
        **_: Any,
    ) -> Result | None:
        for name in tasks.deal(PARTS, [1] * len(PARTS)):
            self.interfere(tasks.index)
            hold.report("merging", 0.1 * (tasks.index + 1))
            self.made.setdefault(tasks.index, []).append(name)
            publish(store, f"merged_models/{name}", lambda writer: writer.write(b"content"))
        if {file.name for file in store.list(store.uri("merged_models"))} < set(PARTS):
            return None
        uri = store.uri("merged_models")
        return Result(Artifact(kind=record.export_type, uri=uri, version="v", bytes=0, files=8, manifest=None), "f", {})


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """In the place of merging."""
    parts = Parts()
    monkeypatch.setattr(job, "export_merged", parts)
    return parts


def run(place: Place, index: int, **order: object) -> ExitCode:
    """One of four tasks of one execution."""
    return place.run(**{"execution": "e", "task_index": index, "task_count": 4, **order})


@given(SIZES, st.integers(1, 8))
def test_every_item_is_dealt_to_one_task_in_order(sizes: list[int], count: int) -> None:
    """Whatever the sizes, and more tasks than items too."""
    items = list(range(len(sizes)))
    hands = [Tasks(index, count).deal(items, sizes) for index in range(count)]
    assert sorted(item for hand in hands for item in hand) == items
    assert all(hand == sorted(hand) for hand in hands)
    assert hands == [Tasks(index, count).deal(items, sizes) for index in range(count)]


@given(SIZES.filter(bool), st.integers(1, 8))
def test_no_task_gets_far_more_than_its_share(sizes: list[int], count: int) -> None:
    """Less than a fair share and the largest item together."""
    loads = [sum(Tasks(index, count).deal(sizes, sizes)) for index in range(count)]
    assert max(loads) <= sum(sizes) / count + max(sizes)
    assert max(loads) - min(loads) <= max(sizes)


def test_the_largest_are_dealt_first() -> None:
    """Else the last and largest would come on top of a full hand."""
    sizes = [1, 1, 1, 1, 4]
    assert [Tasks(index, 2).deal("abcde", sizes) for index in range(2)] == [["e"], ["a", "b", "c", "d"]]
    assert Tasks().deal("abcde", sizes) == list("abcde")


def test_tasks_one_after_another_make_their_parts_and_the_last_publishes(place: Place, recipe: Parts) -> None:
    """A quota may run them so: each leaves a lease that lasts until the next has a machine, and no longer."""
    place.queue()
    for index in range(3):
        assert run(place, index) is ExitCode.DONE
        record = place.record()
        assert (record.state, record.attempt) == (State.RUNNING, 1)
        assert reclaimed(record, now=utc_now() + timedelta(minutes=14), max_attempts=3) is None
        assert reclaimed(record, now=utc_now() + timedelta(minutes=15), max_attempts=3) is not None
    update(place.records, EXPORT, expired)
    assert run(place, 3) is ExitCode.DONE
    assert (place.record().state, place.record().attempt) == (State.COMPLETED, 1)
    assert sorted(name for names in recipe.made.values() for name in names) == PARTS
    assert all(len(names) == 2 for names in recipe.made.values())


def test_tasks_at_once_share_one_lease_and_complete_once(place: Place, recipe: Parts) -> None:
    """All claim it at the same moment, and whoever sees every part records it."""
    place.queue()
    leases: set[str] = set()
    together = threading.Barrier(4)

    def look(index: int) -> None:
        together.wait(60)
        lease = place.record().lease
        assert lease is not None
        leases.add(lease.lease_id)
        together.wait(60)

    recipe.interfere = look
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda index: run(place, index), range(4)))
    assert codes == [ExitCode.DONE] * 4
    assert len(leases) == 1
    assert (place.record().state, place.record().attempt) == (State.COMPLETED, 1)


def test_a_real_merge_by_four_tasks_at_once_is_one_artifact(place: Place) -> None:
    """None withdraws, or clears away, what another of them is writing."""
    place.queue()
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda index: run(place, index), range(4)))
    assert codes == [ExitCode.DONE] * 4
    assert place.record().state is State.COMPLETED
    assert place.record().attempt == 1
    assert len(place.artifacts.list(place.record().artifacts[0].uri)) == place.record().artifacts[0].files + 1


@pytest.fixture
def in_shards(tmp_path: Path) -> Iterator[Place]:
    """A place whose base has a file for each of four tasks."""
    model = save_base("gemma3_text", tmp_path / "base", shard_bytes=2000)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) >= 4
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    place = Place(tmp_path, tmp_path)
    yield place
    place.records.close()


def retrain(place: Place) -> None:
    """Put another adapter of the same base in the place of the job's."""
    model = save_base("gemma3_text", place.root / "elsewhere")
    make_adapter("gemma3_text", model, place.root / "adapter", seed=7)


def test_tasks_that_plan_different_things_make_no_two_halves(in_shards: Place) -> None:
    """One that finds another adapter is tried again; if in vain, the export ends for now, and a new one begins anew."""
    place = in_shards
    place.queue()
    assert run(place, 0) is ExitCode.DONE
    retrain(place)
    assert run(place, 1) is ExitCode.TRY_AGAIN
    assert place.record().state is State.RUNNING
    assert run(place, 1, task_attempt=place.stores.max_attempts - 1) is ExitCode.FAILED
    error = place.record().error
    assert error is not None
    assert (error.code, error.retryable) == ("source_changed", True)
    assert not list((place.root / "artifacts").rglob("export.json"))
    place.requeue()
    assert [run(place, index, execution="f") for index in range(4)] == [ExitCode.DONE] * 4
    record = place.record()
    assert record.state is State.COMPLETED
    assert record.version == record.artifacts[0].version


def test_tasks_agree_on_what_takes_the_place_of_a_spoilt_version(in_shards: Place) -> None:
    """A part that is wrong spoils it for all: the next execution makes the other, of which some parts are there."""
    place = in_shards
    place.queue()
    assert run(place, 0) is ExitCode.DONE
    spoilt = place.record().version
    directory = place.root / "artifacts" / "merged_models" / "job-1" / str(spoilt)
    index = json.loads((place.root / "base" / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        if not (directory / name).exists():
            (directory / name).write_bytes(b"left by somebody")
    assert [run(place, index) for index in range(1, 4)] == [ExitCode.DONE] * 3
    version = place.record().version
    assert version not in (None, spoilt)
    assert place.record().state is State.RUNNING
    update(place.records, EXPORT, expired)
    place.record_change(State.QUEUED, Actor.SWEEP)
    assert [run(place, index, execution="f") for index in range(4)] == [ExitCode.DONE] * 4
    assert place.record().state is State.COMPLETED
    assert place.record().artifacts[0].version == version


@pytest.mark.parametrize("fault", ["passing", "shutdown"])
def test_a_passing_fault_of_one_task_is_its_own(place: Place, recipe: Parts, fault: str) -> None:
    """It asks to be started again, and the record stays as it is: the others go on."""
    place.queue()
    run(place, 0)
    before = place.record()

    def fail(index: int) -> None:
        if fault == "passing":
            raise Unavailable("the hub is away")
        place.stop.set()

    recipe.interfere = fail
    attempt = place.stores.max_attempts - 1 if fault == "shutdown" else 0
    update(place.records, EXPORT, expired)
    assert run(place, 1, task_attempt=attempt) is ExitCode.TRY_AGAIN
    is_last = attempt == place.stores.max_attempts - 1
    later = utc_now() + timedelta(minutes=14)
    assert (reclaimed(place.record(), now=later, max_attempts=3) is None) is not is_last
    assert place.record().model_copy(update={"lease": None, "revision": 0, "updated_at": before.updated_at}) == (
        before.model_copy(update={"lease": None, "revision": 0})
    )
    recipe.interfere = lambda index: None
    place.stop = Stop()
    assert [run(place, index, task_attempt=1) for index in (1, 2, 3)] == [ExitCode.DONE] * 3
    assert place.record().state is State.COMPLETED


def test_the_last_attempt_of_a_task_fails_the_export_for_now(place: Place, recipe: Parts) -> None:
    """Nobody would make its part; asking again may."""
    place.queue()
    run(place, 0)

    def fail(index: int) -> None:
        raise Unavailable("the hub is away")

    recipe.interfere = fail
    assert run(place, 1, task_attempt=place.stores.max_attempts - 2) is ExitCode.TRY_AGAIN
    assert run(place, 1, task_attempt=place.stores.max_attempts - 1) is ExitCode.FAILED
    record = place.record()
    assert record.state is State.FAILED
    assert record.error is not None
    assert record.error.retryable
    assert run(place, 2) is ExitCode.FAILED


def test_a_fault_for_good_fails_the_export_under_the_others(place: Place, recipe: Parts) -> None:
    """They see it at their next heartbeat, and end well; those that begin later say what the record says."""
    place.queue()
    begun, failed = threading.Event(), threading.Event()

    def act(index: int) -> None:
        if index == 0:
            raise SourceError("the adapter does not fit")
        begun.set()
        assert failed.wait(60)
        until(
            lambda: not any(thread.name == "heartbeat" for thread in threading.enumerate()), "the heartbeat to see it"
        )

    recipe.interfere = act
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(run, place, 1)
        assert begun.wait(60)
        assert run(place, 0) is ExitCode.FAILED
        failed.set()
        assert other.result(60) is ExitCode.DONE
    assert recipe.made == {}
    record = place.record()
    assert record.state is State.FAILED
    assert record.error is not None
    assert not record.error.retryable
    assert run(place, 2) is ExitCode.FAILED


@pytest.mark.parametrize("change", ["cancelled", "asked again", "launched again", "taken over", "completed"])
def test_a_task_that_comes_too_late_steps_back(place: Place, recipe: Parts, change: str) -> None:
    """Its siblings may be gone: what was asked for anew has an execution of its own."""
    place.queue()
    launched = {"export_id": EXPORT, "lease_id": "handed"}
    run(place, 0, **{**launched, "lease_id": None})
    if change in ("cancelled", "asked again", "launched again"):
        place.record_change(State.CANCELLED, Actor.CALLER)
        if change != "cancelled":
            place.record_change(State.QUEUED, Actor.CALLER)
        if change == "launched again":
            place.launched("theirs", -1)
    elif change == "completed":
        for index in range(1, 4):
            run(place, index)
    else:
        update(place.records, EXPORT, expired)
        place.leased("other", 60)
    before, made = place.record(), dict(recipe.made)
    assert run(place, 1, **launched) is ExitCode.DONE
    assert place.record() == before
    assert recipe.made == made


@pytest.mark.parametrize("meanwhile", ["queued again", "launched again"])
def test_an_execution_that_is_late_does_its_work(place: Place, recipe: Parts, meanwhile: str) -> None:
    """The sweep had taken it for lost; where the next is late too, nobody else would ever begin."""
    place.queue()
    place.launched("handed", -1)
    place.record_change(State.QUEUED, Actor.SWEEP)
    if meanwhile == "launched again":
        place.launched("theirs", -1)
    for index in range(4):
        assert run(place, index, export_id=EXPORT, lease_id="handed") is ExitCode.DONE
    assert (place.record().state, place.record().execution) == (State.COMPLETED, "e")


def test_of_two_executions_of_one_export_the_later_steps_back(place: Place, recipe: Parts) -> None:
    """Whichever was launched first: one holds it, and the other's tasks find it held."""
    place.queue()
    place.launched("first", -1)
    place.record_change(State.QUEUED, Actor.SWEEP)
    place.launched("second", -1)

    def task(number: int) -> ExitCode:
        execution, index = divmod(number, 4)
        lease_id = ("first", "second")[execution]
        return run(place, index, execution=f"e-{execution}", export_id=EXPORT, lease_id=lease_id)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(task, range(8))) == [ExitCode.DONE] * 8
    assert (place.record().state, place.record().attempt) == (State.COMPLETED, 1)
    assert sorted(name for names in recipe.made.values() for name in names) == PARTS


def test_a_task_goes_on_where_its_execution_came_to_a_stop(place: Place, recipe: Parts) -> None:
    """A quota held it back for longer than a lease: what the others made is there, and it makes the rest."""
    place.queue()
    for index in range(3):
        run(place, index)
    update(place.records, EXPORT, expired)
    place.record_change(State.QUEUED, Actor.SWEEP)
    assert run(place, 3, export_id=EXPORT, lease_id="handed") is ExitCode.DONE
    assert (place.record().state, place.record().attempt) == (State.COMPLETED, 2)


def test_tasks_of_the_trigger_do_its_export_alone(place: Place, recipe: Parts) -> None:
    """What is queued besides has a message of its own: tasks that begin at other times would not all see it."""
    place.queue()
    place.records.create_export(gguf_record("q8_0"))
    assert run(place, 0, export_id=EXPORT) is ExitCode.DONE
    assert place.record("job-1.gguf.q8_0").state is State.QUEUED
