"""A GGUF written in parts is the file that is written at once, whoever wrote which part and however often they died."""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.artifacts import ArtifactReader, ArtifactStore, ArtifactWriter, StoredFile
from dispatcher.contract import TrainingJob
from dispatcher.errors import ExportError, SourceError, StorageFull, Unavailable
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.local_artifacts import LocalArtifacts
from dispatcher.published import SPOILT_PREFIX
from exporter.artifact import Result
from exporter.gguf_file import GgufFile, GgufTensor
from exporter.gguf_write import READERS
from exporter.pipeline import worker_count
from exporter.shared_pass import SharedPass
from exporter.tasks import Tasks
from tests.buckets import bucket_named, new_bucket
from tests.exporter.exporting import export_gguf_of, file_of, gguf_of, training_job
from tests.gemmas.llama import llama_adapter, llama_base
from tests.waiting import until

Whole = tuple[LocalArtifacts, dict[str, Result]]
"""A store, and the export of each quantization in it"""
PART_WEIGHTS = 150_000
"""So that the tiny model has `PARTS` parts"""
PARTS = 11
BOTH = ("q8_0", "q4_k_m")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and adapter."""
    directory = tmp_path_factory.mktemp("models")
    llama_adapter("gemma3_text", llama_base("gemma3_text", directory / "base"), directory / "adapter")
    return directory


@pytest.fixture(scope="module")
def job(models: Path, storage_server: str) -> TrainingJob:
    """With its adapter in a bucket of the training service's."""
    return training_job(models / "base", uploaded(models / "adapter"))


def uploaded(directory: Path) -> str:
    """The URI of a copy of a directory in a bucket of its own."""
    name = new_bucket()
    for path in directory.iterdir():
        bucket_named(name).blob(f"jobs/1/{path.name}").upload_from_filename(path)
    return f"gs://{name}/jobs/1"


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What one task writes at once into a directory."""
    store = LocalArtifacts(tmp_path_factory.mktemp("whole"))
    made = export_gguf_of(models / "base", models / "adapter", store, BOTH)
    return store, dict(zip(BOTH, made, strict=True))


class Noted:
    """What is done to a store, in its words.

    Attributes:
        created: The files that were begun, by the last part of their paths.
        composed: Of each file that was put together, how many parts.
        before: Called with the name of every file that is begun.
        read_seconds: How long every read takes.
        most_reading: How many there were at once.
    """

    def __init__(self) -> None:
        self.read_seconds = 0.0
        self.most_reading = 0
        self.created: list[str] = []
        self.composed: dict[str, int] = {}
        self.before: Callable[[str], object] = lambda name: None
        self._lock, self._reading = threading.Lock(), 0

    @property
    def parts(self) -> list[str]:
        """The parts among the created."""
        return [name for name in self.created if ".gguf." in name and not name.endswith(".json")]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A read that takes its time."""
        with self._lock:
            self._reading += 1
            self.most_reading = max(self.most_reading, self._reading)
        time.sleep(self.read_seconds)
        yield
        with self._lock:
            self._reading -= 1

    def begin(self, path: str) -> None:
        name = path.rpartition("/")[2]
        self.before(name)
        self.created.append(name)


class NotedBucket(GcsArtifacts):
    """A bucket, and what is done to it."""

    def __init__(self, bucket: str) -> None:
        super().__init__(bucket)
        self.bucket = bucket
        self.noted = Noted()
        self.before_composing: Callable[[], object] = lambda: None

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        self.noted.begin(path)
        return super().create(path, size=size)

    def compose(self, path: str, parts: Sequence[str], *, scratch: str | None = None) -> StoredFile:
        self.before_composing()
        self.noted.composed[path] = len(parts)
        return super().compose(path, parts, scratch=scratch)

    def open(self, uri: str) -> ArtifactReader:
        return _NotedReader(super().open(uri), self.noted)


class _NotedReader:
    """A reader that takes its time."""

    def __init__(self, reader: ArtifactReader, noted: Noted) -> None:
        self._reader, self._noted = reader, noted
        self.size = reader.size

    def read(self, offset: int, length: int) -> bytes:
        with self._noted.reading():
            return self._reader.read(offset, length)

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(self, *exit: object) -> None:
        self._reader.__exit__(*exit)


class NotedDirectory(LocalArtifacts):
    """A directory, and what is done to it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.noted = Noted()

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        self.noted.begin(path)
        return super().create(path, size=size)


@pytest.fixture
def bucket(storage_server: str) -> NotedBucket:
    return NotedBucket(new_bucket())


def failing_after(count: int, error: ExportError) -> Callable[[str], None]:
    """Raises the error in the place of one part more than `count`."""
    begun = 0

    def before(name: str) -> None:
        nonlocal begun
        begun += ".gguf." in name and not name.endswith(".json")
        if begun > count and SPOILT_PREFIX not in name:
            raise error

    return before


def run(store: ArtifactStore, job: TrainingJob, quantization: str = "q8_0", **how: Any) -> Result | None:
    """As `gguf_of`, in parts of the test's size."""
    return gguf_of(store, job, quantization, part_weights=PART_WEIGHTS, **how)


def content(store: ArtifactStore, result: Result | None) -> bytes:
    """The bytes of a finished export's file."""
    assert result is not None
    assert result.artifact.file is not None
    with store.open(result.artifact.file) as reader:
        return reader.read(0, reader.size)


def proof(store: ArtifactStore, result: Result | None) -> dict[str, Any]:
    """What the manifest says, but for what differs from run to run."""
    assert result is not None
    manifest = json.loads(store.read(f"{result.artifact.uri}/export.json"))
    del manifest["run"], manifest["adapter"]["uri"]
    return dict(manifest)


def left(store: ArtifactStore) -> list[str]:
    """All that is in a store, by the last parts of the paths."""
    return [file.name.rpartition("/")[2] for file in store.list(store.uri("gguf_models"))]


@pytest.mark.parametrize("order", [[0], [0, 1], [1, 0], [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("quantization", BOTH)
def test_a_bucket_has_the_file_that_one_task_writes_into_a_directory(
    quantization: str, order: list[int], job: TrainingJob, whole: Whole, bucket: NotedBucket
) -> None:
    """However many tasks write its parts, one after another in any order; the last publishes, with the same proof."""
    *others, last = [run(bucket, job, quantization, tasks=Tasks(index, len(order))) for index in order]
    assert others == [None] * (len(order) - 1)
    store, alone = whole
    assert content(bucket, last) == content(store, alone[quantization])
    assert proof(bucket, last) == proof(store, alone[quantization])
    assert len(bucket.noted.parts) == len(set(bucket.noted.parts)) == PARTS
    assert [*bucket.noted.composed.values()] == [PARTS]
    assert left(bucket) == sorted(path.name for path in file_of(alone[quantization]).parent.iterdir())


def test_tasks_without_a_bucket_write_parts_too(models: Path, whole: Whole, tmp_path: Path) -> None:
    """Of an adapter in a directory."""
    store, job = NotedDirectory(tmp_path), training_job(models / "base", models / "adapter")
    made = [run(store, job, tasks=Tasks(index, 3)) for index in range(3)]
    assert made[:2] == [None, None]
    assert content(store, made[2]) == content(whole[0], whole[1]["q8_0"])
    assert len(store.noted.parts) == PARTS
    assert not list(tmp_path.rglob("*.parts"))


def test_what_is_small_enough_is_published_as_it_is(job: TrainingJob, whole: Whole, bucket: NotedBucket) -> None:
    """In a bucket as anywhere; the task that it is dealt to does all of it."""
    made = {index: gguf_of(bucket, job, "q8_0", tasks=Tasks(index, 2)) for index in (1, 0)}
    assert made[1] is None
    assert content(bucket, made[0]) == content(whole[0], whole[1]["q8_0"])
    assert (bucket.noted.parts, bucket.noted.composed) == ([], {})


@pytest.mark.parametrize("died", [1, 4, PARTS - 1])
def test_an_attempt_makes_only_the_parts_that_the_one_before_it_did_not_finish(
    died: int, job: TrainingJob, whole: Whole, bucket: NotedBucket
) -> None:
    """After a passing fault, of which parts and markers stay."""
    bucket.noted.before = failing_after(died, Unavailable("the bucket is away"))
    with pytest.raises(Unavailable):
        run(bucket, job)
    finished = [*bucket.noted.parts]
    assert len(finished) == died
    assert left(bucket) == sorted([*finished, *(f"{name}.json" for name in finished)])
    again = NotedBucket(bucket.bucket)
    made = run(again, job)
    assert content(again, made) == content(whole[0], whole[1]["q8_0"])
    assert proof(again, made) == proof(whole[0], whole[1]["q8_0"])
    assert len(again.noted.parts) == PARTS - died
    assert not {*again.noted.parts} & {*finished}


def test_a_marker_without_its_part_counts_for_nothing(job: TrainingJob, whole: Whole, bucket: NotedBucket) -> None:
    """The part is made again, and the others are not."""
    bucket.noted.before = failing_after(3, Unavailable("the bucket is away"))
    with pytest.raises(Unavailable):
        run(bucket, job)
    _, gone, _ = bucket.noted.parts
    (path,) = {file.name for file in bucket.list(bucket.uri("gguf_models")) if file.name.endswith(gone)}
    marker = json.loads(bucket.read(bucket.uri(f"gguf_models/{path}.json")))
    for name in (path, f"{path}.json"):
        bucket.delete_prefix(f"gguf_models/{name}")
    marker["deltas"] = dict(reversed(marker["deltas"].items()))  # of blocks that were done in another order
    bucket_named(bucket.bucket).blob(f"gguf_models/{path}.json").upload_from_string(json.dumps(marker))
    again = NotedBucket(bucket.bucket)
    assert content(again, run(again, job)) == content(whole[0], whole[1]["q8_0"])
    assert len(again.noted.parts) == PARTS - 2
    assert gone in again.noted.parts


def test_a_part_that_is_another_than_its_marker_says_is_made_again(
    job: TrainingJob, whole: Whole, bucket: NotedBucket
) -> None:
    """With all the others: nobody knows what else is wrong there."""
    bucket.noted.before = failing_after(3, Unavailable("the bucket is away"))
    with pytest.raises(Unavailable):
        run(bucket, job)
    _, other, _ = bucket.noted.parts
    (path,) = {file.name for file in bucket.list(bucket.uri("gguf_models")) if file.name.endswith(other)}
    bucket.delete_prefix(f"gguf_models/{path}")
    begin, end = map(int, other.rpartition(".")[2].split("-"))
    bucket_named(bucket.bucket).blob(f"gguf_models/{path}").upload_from_string(bytes(end - begin))
    made = run(bucket_again := NotedBucket(bucket.bucket), job)
    assert made is not None
    assert len(bucket_again.noted.parts) >= PARTS
    assert content(bucket_again, made) == content(whole[0], whole[1]["q8_0"])


def test_a_fault_that_stays_takes_its_parts_along(job: TrainingJob, bucket: NotedBucket) -> None:
    """Nobody will go on from them."""
    bucket.noted.before = failing_after(4, SourceError("the base is damaged"))
    with pytest.raises(SourceError):
        run(bucket, job)
    assert len(bucket.noted.parts) == 4
    assert left(bucket) == []


def test_a_file_that_was_written_at_once_is_not_written_again(models: Path, whole: Whole, tmp_path: Path) -> None:
    """By one task, where an attempt died later on."""
    job = training_job(models / "base", models / "adapter")
    first, second = NotedDirectory(tmp_path), NotedDirectory(tmp_path)

    def die(name: str) -> None:
        if name == "Modelfile":
            raise Unavailable("the disk is away")

    first.noted.before = die
    with pytest.raises(Unavailable):
        run(first, job)
    made = run(second, job)
    assert content(second, made) == content(whole[0], whole[1]["q8_0"])
    assert proof(second, made) == proof(whole[0], whole[1]["q8_0"])
    assert [name for name in second.noted.created if ".gguf" in name] == []
    assert not list(tmp_path.rglob("*.parts"))


def test_parts_that_go_while_they_are_put_together_are_a_passing_fault(job: TrainingJob, bucket: NotedBucket) -> None:
    """As when another task has published the file, and removed its parts, between our look and our request."""
    bucket.before_composing = lambda: bucket.delete_prefix("gguf_models")
    with pytest.raises(Unavailable) as error:
        run(bucket, job)
    assert error.value.error_code == "artifact_vanished"


def both(store: ArtifactStore, job: TrainingJob, shared: SharedPass) -> list[Future[Result | None]]:
    """Two quantizations at once, when both have ended."""
    with ThreadPoolExecutor(2) as pool:
        return [pool.submit(run, store, job, quantization, shared=shared) for quantization in BOTH]


def test_quantizations_that_miss_the_same_parts_share_every_pass(
    job: TrainingJob, whole: Whole, bucket: NotedBucket
) -> None:
    """One part after another."""
    shared = SharedPass(2)
    made = [future.result() for future in both(bucket, job, shared)]
    assert [content(bucket, one) for one in made] == [content(whole[0], whole[1][kind]) for kind in BOTH]
    assert [proof(bucket, one) for one in made] == [proof(whole[0], whole[1][kind]) for kind in BOTH]
    assert shared.passes == PARTS


def test_quantizations_that_miss_other_parts_share_what_they_can(
    job: TrainingJob, whole: Whole, bucket: NotedBucket
) -> None:
    """No part of the base is read twice: whoever is ahead waits."""
    bucket.noted.before = failing_after(4, Unavailable("the bucket is away"))
    with pytest.raises(Unavailable):
        run(bucket, job)
    bucket.noted.before = lambda name: None
    assert run(bucket, job, "q4_k_m", tasks=Tasks(1, 3)) is None
    before = [*bucket.noted.parts]
    shared = SharedPass(2)
    made = [future.result() for future in both(bucket, job, shared)]
    assert [content(bucket, one) for one in made] == [content(whole[0], whole[1][kind]) for kind in BOTH]
    assert [proof(bucket, one) for one in made] == [proof(whole[0], whole[1][kind]) for kind in BOTH]
    finished = [before.count(name) for name in sorted(bucket.noted.parts, key=lambda n: (n.split(".")[0], begin_of(n)))]
    missing = [not (first and second) for first, second in zip(finished[:PARTS], finished[PARTS:], strict=True)]
    assert 4 < finished.count(1) < 2 * PARTS
    assert shared.passes == missing.count(True)


def begin_of(part: str) -> int:
    """Where a part's bytes begin in its file."""
    return int(part.rpartition(".")[2].partition("-")[0])


def test_nobody_waits_until_another_is_verified(job: TrainingJob, whole: Whole, bucket: NotedBucket) -> None:
    """One whose parts were all finished before has nothing to do with the others' rounds."""

    def die(name: str) -> None:
        if name == "Modelfile":
            raise Unavailable("the bucket is away")

    bucket.noted.before = die
    with pytest.raises(Unavailable):
        run(bucket, job)
    again = NotedBucket(bucket.bucket)

    def wait(name: str) -> None:
        if name == "Modelfile":
            until(lambda: len(again.noted.parts) == PARTS, "the other's parts")

    again.noted.before = wait
    made = [future.result() for future in both(again, job, SharedPass(2))]
    assert [content(again, one) for one in made] == [content(whole[0], whole[1][kind]) for kind in BOTH]


@pytest.mark.parametrize("count", [0, 3, PARTS - 1])
def test_one_that_fails_between_two_rounds_ends_alone(
    count: int, job: TrainingJob, whole: Whole, bucket: NotedBucket
) -> None:
    """The other goes on by itself."""
    fail = failing_after(count, StorageFull("no room left"))
    bucket.noted.before = lambda name: fail(name) if "Q8_0" in name else None
    first, second = both(bucket, job, SharedPass(2))
    assert isinstance(first.exception(), StorageFull)
    assert content(bucket, second.result()) == content(whole[0], whole[1]["q4_k_m"])


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def test_no_weights_of_a_whole_model_in_a_bucket_touch_the_disk(
    models: Path, scratch: Path, tmp_path: Path, bucket: NotedBucket
) -> None:
    """Of what lies beside them there is a copy; the file is the one that is made of a directory."""
    (local,) = export_gguf_of("/nowhere/tiny", models / "base", tmp_path / "store")
    weights = (models / "base" / "model.safetensors").stat().st_size
    seen: dict[str, int] = {}

    def look(_: str) -> None:
        for path in scratch.rglob("*"):
            if path.is_file():
                seen[path.name] = max(seen.get(path.name, 0), 512 * path.stat().st_blocks)

    bucket.noted.before = look
    made = run(bucket, training_job("/nowhere/tiny", uploaded(models / "base")))
    assert content(bucket, made) == file_of(local).read_bytes()
    assert len(bucket.noted.parts) == PARTS
    assert {"config.json", "tokenizer.json"} <= seen.keys()
    assert not [name for name in seen if name.endswith(".safetensors")]
    assert sum(seen.values()) < weights / 2
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("budget", [512 << 20, 1])
def test_what_is_far_away_is_read_by_more_threads_than_there_are_cores(
    budget: int, models: Path, bucket: NotedBucket
) -> None:
    """They wait for the network; each takes a share of the memory budget, and there is always one."""
    job = training_job("/nowhere/tiny", uploaded(models / "base"))
    bucket.noted.read_seconds = 0.02
    gguf_of(bucket, job, "q8_0", shared=SharedPass(1, memory_budget=budget))
    wanted = max(READERS, worker_count()) if budget > 1 else 1
    assert bucket.noted.most_reading == wanted


@given(weights=st.lists(st.integers(1, 100), max_size=20), limit=st.integers(1, 200))
def test_a_file_is_cut_between_tensors_without_hole_or_overlap(weights: list[int], limit: int) -> None:
    """Whatever the sizes; a part is never empty, and has one tensor where it has too many weights."""
    infos = [SimpleNamespace(shape=(count,)) for count in weights]
    tensors, start = [], 64
    for number, info in enumerate(infos):
        tensors.append(GgufTensor(f"t{number}", 0, start, 3 * info.shape[0], info))
        start += -(-3 * info.shape[0] // 32) * 32
    file = GgufFile("f.gguf", bytes(64), tuple(tensors))
    parts = file.parts(limit)
    assert [tensor for part in parts for tensor in part.tensors] == tensors
    assert (parts[0].begin, parts[-1].end) == (0, file.size)
    assert all(before.end == after.begin == after.tensors[0].start for before, after in pairwise(parts))
    assert all(part.weights <= limit or len(part.tensors) == 1 for part in parts)
    assert b"".join(part.head for part in parts) == file.head
    assert file.parts(sum(weights) + 1) == [file.whole]
