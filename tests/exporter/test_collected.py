"""The collector beside real exports: what they recorded is whole, whenever it sleeps, wakes or dies."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from dispatcher.artifacts import path_of
from dispatcher.collector import Collector
from dispatcher.contract import State
from dispatcher.errors import SweepIncomplete, Unavailable
from dispatcher.lifecycle import Actor
from dispatcher.local_artifacts import LocalArtifacts
from dispatcher.published import is_whole
from exporter.job import ExitCode
from exporter.lease import utc_now
from tests.exporter.place import Place

GRACE = timedelta(days=7)


class Sleepy(LocalArtifacts):
    """A store in which something else happens while a collector is about to look for versions, or to delete."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.before_looking: Callable[[], object] = lambda: None
        self.before_deleting: Callable[[], object] = lambda: None

    def children(self, path: str) -> list[str]:
        happen, self.before_looking = self.before_looking, lambda: None
        happen()
        return super().children(path)

    def delete_prefix(self, path: str) -> int:
        self.before_deleting()
        return super().delete_prefix(path)


def collector_of(place: Place, store: LocalArtifacts | None = None, *, later: timedelta = GRACE) -> Collector:
    return Collector(place.records, store or place.artifacts, after=GRACE, clock=lambda: utc_now() + later)


def version_of(place: Place) -> str:
    """The version that the record names, which has to be whole."""
    (artifact,) = place.record().artifacts
    assert artifact.manifest is not None
    assert is_whole(place.artifacts, artifact.manifest)
    return artifact.version


def change_adapter(place: Place) -> None:
    """Another fingerprint, and the same weights; done twice, it is the first again."""
    note = place.root / "adapter" / "README.txt"
    note.unlink() if note.exists() else note.write_text("new")


def export_again(place: Place) -> str:
    """Change the adapter and export; the version."""
    change_adapter(place)
    place.requeue()
    assert place.run() is ExitCode.DONE
    return version_of(place)


def two_versions(place: Place) -> tuple[str, str]:
    """Export, change the adapter, export: the older and the newer version."""
    place.queue()
    assert place.run() is ExitCode.DONE
    older = version_of(place)
    return older, export_again(place)


def test_an_older_version_is_gone_without_a_trace(place: Place) -> None:
    """And the next export of the older adapter makes it anew."""
    older, newer = two_versions(place)
    assert collector_of(place).collect() == {"collected": 1}
    assert version_of(place) == newer
    assert {name.split("/")[2] for name in place.files()} == {newer}
    assert export_again(place) == older


def test_a_collector_that_sleeps_before_it_deletes_harms_no_export_made_meanwhile(place: Place) -> None:
    """The adapter is the older one again, so that the very version which is about to go would be found finished."""
    older, newer = two_versions(place)
    store = Sleepy(place.root / "artifacts")

    def meanwhile() -> None:
        store.before_deleting = lambda: None
        made.append(export_again(place))

    made: list[str] = []
    store.before_deleting = meanwhile
    assert collector_of(place, store).collect() == {"collected": 1}
    assert made == [version_of(place)]
    assert made[0] not in (older, newer)
    assert path_of(place.artifacts.uri(f"merged_models/job-1/{older}")).exists() is False


def test_a_version_found_finished_just_before_it_was_marked_stays(place: Place) -> None:
    """The collector had seen it as the older one; its last look into the records says otherwise."""
    older, _ = two_versions(place)
    store = Sleepy(place.root / "artifacts")
    store.before_looking = lambda: export_again(place)
    collector = collector_of(place, store)
    assert collector.collect() == {"collected": 0}
    assert version_of(place) == older
    assert not any(".parts/" in name for name in place.files())
    assert collector.collect() == {"collected": 1}
    assert version_of(place) == older


@pytest.mark.parametrize(("at", "is_made_again"), [(1, False), (2, True), (3, True)])
def test_a_version_collected_by_half_is_not_found_finished(place: Place, at: int, is_made_again: bool) -> None:
    """With its manifest another is made in its place; without, it is made again from what is left, and is whole."""
    older, _ = two_versions(place)
    store = Sleepy(place.root / "artifacts")
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            (place.root / "artifacts" / "merged_models" / "job-1" / older / "model.safetensors").unlink(missing_ok=True)
            raise Unavailable("the disk is away")

    place.artifacts.create(f"merged_models/job-1/{older}.parts/model.safetensors.json").commit()
    store.before_deleting = fail
    with pytest.raises(SweepIncomplete):
        collector_of(place, store).collect()
    assert (export_again(place) == older) is is_made_again
    assert collector_of(place).collect() == {"collected": 1 if is_made_again else 2}
    assert {name.split("/")[2] for name in place.files()} == {version_of(place)}


def test_an_attempt_abandoned_by_its_caller_leaves_nothing(place: Place) -> None:
    """A machine stopped in the middle of it, and before the next began it was cancelled."""
    place.queue()
    assert place.run_on_stalling_disk() is ExitCode.TRY_AGAIN
    place.record_change(State.CANCELLED, Actor.CALLER)
    assert any(name.endswith("model.safetensors") for name in place.files())
    assert collector_of(place, later=timedelta(hours=1)).collect() == {"collected": 1}
    assert place.files() == []
    place.requeue()
    assert place.run() is ExitCode.DONE
    version_of(place)
