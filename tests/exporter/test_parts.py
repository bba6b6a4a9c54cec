"""A merged export in parts: what attempts and tasks go on from, and that none of it shows in the result."""

import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest

from dispatcher.artifacts import ArtifactWriter, path_of
from dispatcher.errors import ExportError, Unavailable
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.local_artifacts import LocalArtifacts
from exporter.attempt import Attempt
from exporter.lora import Delta
from exporter.parts import Parts
from exporter.side_by_side import Progress, side_by_side
from exporter.tasks import Tasks
from tests.buckets import bucket_named, new_bucket
from tests.exporter.exporting import Undisturbed, export, export_part
from tests.gemmas import make_adapter, save_base


class Recording(LocalArtifacts):
    """A store that notes what is begun in it, and does something before."""

    def __init__(self, root: Path, before: Callable[[str], object] = lambda path: None) -> None:
        super().__init__(root)
        self.begun: list[str] = []
        self._before = before

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        self._before(path)
        self.begun.append(path.rpartition("/")[2])
        return super().create(path, size=size)

    def weights(self) -> list[str]:
        """The weight files that were begun."""
        return sorted(name for name in self.begun if name.endswith(".safetensors"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of several shards, and an adapter."""
    directory = tmp_path_factory.mktemp("models")
    model = save_base("gemma3_text", directory / "base", shard_bytes=2000)
    make_adapter("gemma3_text", model, directory / "adapter")
    return directory


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one task makes in one go."""
    result = export(models / "base", models / "adapter", tmp_path_factory.mktemp("whole"))
    return contents(path_of(result.artifact.uri))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the manifest, which has figures of the run."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "export.json")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def shards_of(contents: dict[str, bytes]) -> list[str]:
    return sorted(name for name in contents if name.endswith(".safetensors"))


def left(root: Path) -> list[str]:
    """The folders of the job, and what is in those of parts."""
    job = root / "merged_models" / "job-1"
    folders = sorted(path.name for path in job.iterdir()) if job.is_dir() else []
    return [name for name in folders if name.endswith(".parts") and any((job / name).iterdir())]


def test_what_an_attempt_finished_before_a_passing_fault_is_not_made_again(
    models: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """Each shard is written once, whichever attempt does it, and the result is the same."""
    shards = shards_of(whole)
    assert len(shards) >= 5
    begun: list[str] = []

    def stall(path: str) -> None:
        if path.endswith(".safetensors"):
            begun.append(path)
            if len(begun) == 4:
                raise Unavailable("the disk stalled")

    with pytest.raises(Unavailable):
        export(models / "base", models / "adapter", Recording(tmp_path, stall))
    finished = {path.name.removesuffix(".json") for path in tmp_path.rglob("*.parts/*.json")}
    assert 1 <= len(finished) < len(shards)
    again = Recording(tmp_path)
    result = export(models / "base", models / "adapter", again)
    assert again.weights() == sorted(set(shards) - finished)
    assert contents(path_of(result.artifact.uri)) == whole
    assert left(tmp_path) == []


def test_nothing_is_left_of_an_export_that_fails_for_good(models: Path, tmp_path: Path) -> None:
    """Not even the parts that an earlier attempt had finished."""
    with pytest.raises(Unavailable):
        export(models / "base", models / "adapter", Recording(tmp_path, _refusing("tokenizer.json", Unavailable("no"))))
    assert left(tmp_path)
    with pytest.raises(ExportError):
        export(models / "base", models / "adapter", Recording(tmp_path, _refusing("tokenizer.json", ExportError("no"))))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def _refusing(name: str, error: ExportError) -> Callable[[str], None]:
    def before(path: str) -> None:
        if path.endswith(name):
            raise error

    return before


def test_an_attempt_that_is_refused_removes_what_others_had_finished(models: Path, tmp_path: Path) -> None:
    """At whatever moment: nobody goes on from a version that failed for good."""
    begun: list[str] = []

    def stall(path: str, error: ExportError, after: int) -> None:
        if path.endswith(".safetensors"):
            begun.append(path)
            if len(begun) == after:
                raise error

    with pytest.raises(Unavailable):
        export(
            models / "base", models / "adapter", Recording(tmp_path, partial(stall, error=Unavailable("no"), after=4))
        )
    assert left(tmp_path)
    begun.clear()
    with pytest.raises(ExportError):
        export(
            models / "base", models / "adapter", Recording(tmp_path, partial(stall, error=ExportError("no"), after=1))
        )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_tasks_that_find_something_wrong_make_another_version_when_they_are_asked_again(
    models: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """No task may remove what others count on; and none trusts it any more."""
    store = LocalArtifacts(tmp_path)
    assert export_part(models / "base", models / "adapter", store, Tasks(0, 2)) is None
    (marker, *_) = sorted(tmp_path.rglob("*.parts/*.json"))
    shard = marker.parent.with_suffix("") / marker.name.removesuffix(".json")
    content = bytearray(shard.read_bytes())
    content[-4:] = bytes(4)
    shard.write_bytes(content)
    with pytest.raises(ExportError) as error:
        export_part(models / "base", models / "adapter", store, Tasks(1, 2))
    assert error.value.error_code == "checksum_differs"
    assert export_part(models / "base", models / "adapter", store, Tasks(0, 2)) is None
    result = export_part(models / "base", models / "adapter", store, Tasks(1, 2))
    assert result is not None
    assert path_of(result.artifact.uri) != shard.parent
    assert {name: data for name, data in contents(path_of(result.artifact.uri)).items() if name != "README.md"} == {
        name: data for name, data in whole.items() if name != "README.md"
    }


@pytest.mark.parametrize("order", [order for order in permutations(range(3)) if order[0] != 0])
def test_tasks_in_any_order_make_what_one_makes(
    models: Path, tmp_path: Path, whole: dict[str, bytes], order: tuple[int, ...]
) -> None:
    """One after another, as a quota may let them run: the last one publishes, and each shard was written once."""
    store = Recording(tmp_path)
    results = [export_part(models / "base", models / "adapter", store, Tasks(index, 3)) for index in order]
    assert [result is None for result in results] == [True, True, False]
    assert results[-1] is not None
    assert contents(path_of(results[-1].artifact.uri)) == whole
    assert store.weights() == shards_of(whole)
    assert left(tmp_path) == []


def test_tasks_at_once_make_what_one_makes(models: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Whoever sees that all is there publishes; that two do is no harm."""
    results: list[object] = []

    def run(index: int) -> None:
        results.append(export_part(models / "base", models / "adapter", LocalArtifacts(tmp_path), Tasks(index, 4)))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert any(results)
    (version,) = [path for path in (tmp_path / "merged_models" / "job-1").iterdir() if path.suffix != ".parts"]
    assert (version / "export.json").is_file()
    assert contents(version) == whole


def test_one_task_finishes_what_several_began(models: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """As when an operator runs the job again after an execution that was stopped."""
    for index in (1, 3):
        assert export_part(models / "base", models / "adapter", LocalArtifacts(tmp_path), Tasks(index, 4)) is None
    store = Recording(tmp_path)
    result = export(models / "base", models / "adapter", store)
    assert 0 < len(store.weights()) < len(shards_of(whole))
    assert contents(path_of(result.artifact.uri)) == whole


def test_an_engine_that_holds_the_model_is_run_by_the_first_task(models: Path, tmp_path: Path) -> None:
    """The others have nothing to do, whenever they come."""
    store = LocalArtifacts(tmp_path)
    args = (models / "base", models / "adapter", store)
    assert export_part(*args, Tasks(1, 2), engine="peft") is None
    assert export_part(*args, Tasks(0, 2), engine="peft") is not None
    assert export_part(*args, Tasks(1, 2), engine="peft") is not None  # found finished


@pytest.mark.parametrize("content", [b"", b"{}", b'{"bytes": 8, "crc32c": "AAAAAA==", "deltas": {"w": [1]}}'])
def test_a_marker_that_is_none_counts_for_nothing(tmp_path: Path, content: bytes) -> None:
    """The part is made again, and found to be the same."""
    attempt = Attempt(LocalArtifacts(tmp_path), "v")
    parts = Parts(attempt, "v")
    parts.write("a", _eight_bytes, 8)
    assert parts.finished({"a": 8, "b": 8}).keys() == {"a"}
    assert parts.finished({"a": 9}) == {}
    (tmp_path / "v.parts" / "a.json").write_bytes(content)
    assert parts.finished({"a": 8}) == {}


def test_a_part_that_is_gone_is_not_finished(tmp_path: Path) -> None:
    """Whatever its marker says."""
    attempt = Attempt(LocalArtifacts(tmp_path), "v")
    Parts(attempt, "v").write("a", _eight_bytes, 8)
    (tmp_path / "v" / "a").unlink()
    assert Parts(attempt, "v").finished({"a": 8}) == {}
    attempt.withdraw(Undisturbed())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_part_whose_checksum_the_bucket_tells_otherwise_is_not_finished(storage_server: str) -> None:
    """Of the same size: the listing says it, without a byte being read."""
    store = GcsArtifacts(new_bucket())
    Parts(Attempt(store, "v"), "v").write("a", _eight_bytes, 8)
    assert Parts(Attempt(store, "v"), "v").finished({"a": 8}).keys() == {"a"}
    bucket_named(store.uri("v").split("/")[2]).blob("v/a").upload_from_string(b"?" * 8)
    assert Parts(Attempt(store, "v"), "v").finished({"a": 8}) == {}


def _eight_bytes(writer: ArtifactWriter) -> dict[str, Delta]:
    writer.write(bytes(8))
    return {}


def test_the_first_fault_stops_the_files_beside_it() -> None:
    """Else a machine goes on for minutes with what nobody will have."""
    progress = Progress(lambda stage, fraction: None, "merging", 100)
    started, failed = threading.Event(), threading.Event()
    added: list[int] = []

    def make(item: int) -> None:
        with progress.watching():
            if item == 0:
                assert started.wait(10)
                failed.set()
                raise ExportError("broken")
            started.set()
            assert failed.wait(10)
            while True:
                progress.add(1)
                added.append(item)

    with pytest.raises(ExportError, match="broken"):
        side_by_side(make, [0, 1, 2], 2)
    assert 2 not in added


def test_the_fault_that_came_first_is_the_one_that_is_told() -> None:
    """A passing fault of a file beside it would hide that the export cannot succeed."""
    first = threading.Event()

    def make(item: int) -> None:
        if item == 1:
            try:
                raise ExportError("for good")
            finally:
                first.set()
        assert first.wait(10)
        time.sleep(0.1)
        raise Unavailable("passing")

    begun: list[int] = []

    def noted(item: int) -> None:
        begun.append(item)
        make(item)

    with pytest.raises(ExportError, match="for good"):
        side_by_side(noted, [0, 1, 2, 3], 2)
    assert sorted(begun) == [0, 1]


def test_progress_of_what_was_done_before_counts() -> None:
    """An attempt that goes on from others' parts begins where they ended."""
    told: list[float] = []
    progress = Progress(lambda stage, fraction: told.append(fraction), "merging", 100, 60)
    progress.add(20)
    progress.add(20)
    assert told == pytest.approx([0.05 + 0.85 * 0.8, 0.9])
