"""A version's directory: what attempts share in it, what each may remove, and what is done with a spoilt one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dispatcher.artifacts import ArtifactWriter, StoredFile, path_of
from dispatcher.contract import State
from dispatcher.errors import StorageFull, Unavailable
from dispatcher.lifecycle import Actor
from dispatcher.local_artifacts import LocalArtifacts
from dispatcher.published import SPOILT_PREFIX
from exporter.job import ExitCode
from exporter.manifest import still_holds
from tests.exporter.exporting import merged_into
from tests.exporter.place import Interfering, Place

WEIGHTS = "model.safetensors"


def root_of(place: Place) -> Path:
    """Where all versions of the job lie."""
    return place.root / "artifacts" / "merged_models" / "job-1"


def made_elsewhere(place: Place) -> Path:
    """The version that the job's export makes, in a store of its own."""
    return merged_into(place.root / "base", place.root / "adapter", place.root / "elsewhere", engine="auto")


def leave(place: Place, version: str, name: str, content: bytes) -> Path:
    """A file in a version's directory, as another attempt would have it."""
    path = root_of(place) / version / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


class _Planning(LocalArtifacts):
    """A store that does something else while an export is planned."""

    interfere: Callable[[], object]

    def list(self, uri: str, *, checksums: bool = True) -> list[StoredFile]:
        interfere, self.interfere = self.interfere, lambda: None
        interfere()
        return super().list(uri, checksums=checksums)


@pytest.mark.parametrize("published", [False, True], ids=["at work", "done"])
def test_an_attempt_held_up_while_it_planned_takes_nothing_from_its_successor(place: Place, published: bool) -> None:
    """Cancelled and asked for again meanwhile, as during an hour of download."""
    elsewhere = made_elsewhere(place)
    place.queue()
    store = _Planning(place.root / "artifacts")
    theirs: dict[str, tuple[bytes, int]] = {}

    def succeeded() -> None:
        place.record_change(State.CANCELLED, Actor.CALLER)
        place.requeue()
        place.leased("successor", 60)
        for name in [WEIGHTS, "config.json", *(["export.json"] if published else [])]:
            leave(place, elsewhere.name, name, (elsewhere / name).read_bytes())
        theirs.update(contents(root_of(place)))

    store.interfere = succeeded
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.DONE
    assert place.record().state is State.RUNNING
    assert theirs
    assert theirs.items() <= contents(root_of(place)).items()


@pytest.mark.parametrize("moment", ["before the mark", "after it", "while files are removed"])
def test_another_that_begins_while_files_are_removed_does_not_count_on_them(place: Place, moment: str) -> None:
    """The process that removes them may be asleep for an hour between any two steps."""
    place.queue()
    begun: list[ExitCode] = []

    class Slow(LocalArtifacts):
        def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
            if SPOILT_PREFIX in path and moment == "before the mark":
                succeeded()
            if path.endswith("tokenizer_config.json"):
                place.record_change(State.CANCELLED, Actor.CALLER)
                raise Unavailable("the disk stalled")
            return super().create(path, size=size)

        def delete_prefix(self, path: str) -> int:
            in_parts = path.partition(".parts/")[2]
            if begun or in_parts.startswith(SPOILT_PREFIX):
                return super().delete_prefix(path)
            if moment == "after it" or (moment == "while files are removed" and in_parts):
                succeeded()
            return super().delete_prefix(path)

    def succeeded() -> None:
        place.requeue()
        place.stores = replace(place.stores, artifacts=place.artifacts)
        begun.append(place.run())

    place.stores = replace(place.stores, artifacts=Slow(place.root / "artifacts"))
    assert place.run() is ExitCode.DONE
    assert begun == [ExitCode.DONE]
    assert place.record().state is State.COMPLETED
    artifact = place.record().artifacts[0]
    manifest = json.loads(place.artifacts.read(str(artifact.manifest)))
    assert still_holds(place.artifacts, path_in(place, artifact.uri), manifest)
    assert not [name for name in place.files() if ".parts/" in name]


def test_without_room_for_its_mark_nothing_is_removed(place: Place) -> None:
    """Whoever goes on while this process sleeps would not know."""
    place.queue()

    class Full(LocalArtifacts):
        def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
            if SPOILT_PREFIX in path:
                raise StorageFull("no room left")
            if path.endswith("tokenizer_config.json"):
                place.record_change(State.CANCELLED, Actor.CALLER)
                raise Unavailable("the disk stalled")
            return super().create(path, size=size)

    place.stores = replace(place.stores, artifacts=Full(place.root / "artifacts"))
    assert place.run() is ExitCode.DONE
    assert any(name.endswith(WEIGHTS) for name in place.files())


def path_in(place: Place, uri: str) -> str:
    """A path inside the place's store."""
    return str(path_of(uri).relative_to(place.root / "artifacts"))


def test_after_a_passing_fault_everything_stays_for_the_next_attempt(place: Place) -> None:
    """Which finds the same bytes under the same names."""
    elsewhere = made_elsewhere(place)
    place.queue()
    leave(place, elsewhere.name, WEIGHTS, (elsewhere / WEIGHTS).read_bytes())
    assert place.run_on_stalling_disk() is ExitCode.TRY_AGAIN
    names = {Path(name).name for name in place.files()}
    assert {WEIGHTS, f"{WEIGHTS}.json", "tokenizer.json"} <= names
    assert place.run() is ExitCode.DONE
    assert {Path(name).parent.name for name in place.files()} == {elsewhere.name}


def test_what_a_killed_attempt_left_is_used_and_its_temporary_files_are_removed(place: Place) -> None:
    """Not one byte of a finished shard is written again."""
    elsewhere = made_elsewhere(place)
    place.queue()
    weights = leave(place, elsewhere.name, WEIGHTS, (elsewhere / WEIGHTS).read_bytes())
    half = leave(place, elsewhere.name, "additional_chat_templates/.tool.jinja.aa.partial", b"half")
    before = weights.stat()
    assert place.run() is ExitCode.DONE
    assert path_of(place.record().artifacts[0].uri) == weights.parent
    assert weights.stat().st_ino == before.st_ino
    assert not half.exists()


def test_what_is_not_of_this_version_is_left_alone(place: Place) -> None:
    """Other versions are the sweep's to collect; the rest is not ours, be it the adapter itself."""
    adapter = root_of(place) / "adapter"
    shutil.copytree(place.root / "adapter", adapter)
    for name in ("0123456789ab/config.json", "final/model.safetensors", "README.md", ".hidden.aa.partial"):
        leave(place, ".", name, b"theirs")
    before = contents(root_of(place))
    place.rewrite_job(artifacts={"raw": {"adapter": str(adapter)}})
    place.queue()
    assert place.run() is ExitCode.DONE
    assert before.items() <= contents(root_of(place)).items()


def test_a_file_that_vanishes_before_it_is_verified_is_made_again(place: Place) -> None:
    """Nothing is wrong with the merge."""
    place.queue()
    store = Interfering(place.root / "artifacts")

    def removed() -> None:
        for path in root_of(place).rglob(WEIGHTS):
            path.unlink()

    store.interfere = removed
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.TRY_AGAIN
    assert place.record().state is State.QUEUED
    store.interfere = lambda: None
    assert place.run() is ExitCode.DONE
    assert place.record().state is State.COMPLETED


def _without_weights(version: Path) -> None:
    (version / WEIGHTS).unlink()


def _manifest(text: str) -> Callable[[Path], object]:
    return lambda version: (version / "export.json").write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        _without_weights,
        *map(_manifest, ["", "{", "[]", "{}", '{"files": []}', '{"files": [{"name": 1}]}', "x" * 20_000_000]),
    ],
    ids=["a file is gone", "empty", "half", "array", "object", "no engine", "no size", "huge"],
)
def test_a_published_version_that_is_damaged_is_made_anew_beside_it(
    place: Place, damage: Callable[[Path], object]
) -> None:
    """No user has to know, though nothing published is ever overwritten; and the next run finds the new one."""
    place.queue()
    place.run()
    first = path_of(place.record().artifacts[0].uri)
    damage(first)
    spoilt = contents(first)
    place.requeue()
    assert place.run() is ExitCode.DONE
    second = path_of(place.record().artifacts[0].uri)
    assert second != first
    assert (second / WEIGHTS).is_file()
    assert contents(first) == spoilt
    before = contents(root_of(place))
    place.requeue()
    assert place.run() is ExitCode.DONE
    assert path_of(place.record().artifacts[0].uri) == second
    assert contents(root_of(place)) == before


def test_an_older_version_that_was_damaged_meanwhile_does_not_block_its_return(place: Place) -> None:
    """The adapter changes, and changes back."""
    place.queue()
    place.run()
    first = path_of(place.record().artifacts[0].uri)
    (place.root / "adapter" / "README.txt").write_text("new")
    place.requeue()
    place.run()
    (first / WEIGHTS).unlink()
    (place.root / "adapter" / "README.txt").unlink()
    place.requeue()
    assert place.run() is ExitCode.DONE
    assert place.record().artifacts[0].version != first.name


def test_what_a_killed_attempt_left_otherwise_rounded_is_removed_and_made_anew(place: Place) -> None:
    """On another kind of processor, say; it was never published, so nobody counts on it."""
    elsewhere = made_elsewhere(place)
    place.queue()
    weights = leave(place, elsewhere.name, WEIGHTS, b"rounded otherwise")
    leave(place, elsewhere.name, "another.safetensors", b"of no plan")
    assert place.run() is ExitCode.DONE
    assert path_of(place.record().artifacts[0].uri) == weights.parent
    assert weights.read_bytes() == (elsewhere / WEIGHTS).read_bytes()
    assert {Path(name).name for name in place.files()} == {path.name for path in elsewhere.iterdir()}


def test_a_version_that_another_publishes_first_is_recorded_as_it_is(place: Place) -> None:
    """With its manifest, which may name other libraries."""
    manifest = json.loads((made_elsewhere(place) / "export.json").read_text())
    place.queue()

    class Beaten(LocalArtifacts):
        def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
            if path.endswith("export.json"):
                manifest["libraries"]["peft"] = "another"
                leave(place, manifest["version"], "export.json", json.dumps(manifest).encode())
            return super().create(path, size=size)

    place.stores = replace(place.stores, artifacts=Beaten(place.root / "artifacts"))
    assert place.run() is ExitCode.DONE
    assert place.record().artifacts[0].version == manifest["version"]
    made = root_of(place) / manifest["version"]
    assert all((made / file["name"]).stat().st_size == file["bytes"] for file in manifest["files"])
