"""What is collected and what never is, on this machine's stores and on Google's."""

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dispatcher import collector as module
from dispatcher.artifacts import ArtifactStore, open_artifacts, publish
from dispatcher.collector import Collector
from dispatcher.contract import Artifact, ExportRecord, ExportType, State, export_id_of
from dispatcher.errors import SweepIncomplete, Unavailable
from dispatcher.lifecycle import Actor, transition, withdrawn
from dispatcher.published import COLLECTED_PREFIX
from dispatcher.records import RecordStore, open_records, update
from tests.buckets import new_bucket
from tests.dispatcher.test_lifecycle import record
from tests.dispatcher.world import START, Clock

WEEK = timedelta(days=7)
OLD, NEW, HALF, THIRD = (digit * 12 for digit in "abcd")


class Stores:
    """Records and versions of some jobs, and their collector."""

    def __init__(self, records: RecordStore, artifacts: ArtifactStore) -> None:
        self.records = records
        self.artifacts = artifacts
        self.clock = Clock()
        self.collector = Collector(records, artifacts, after=WEEK, clock=self.clock)

    def ended(
        self,
        state: State = State.COMPLETED,
        *,
        job_id: str = "job",
        quantization: str | None = None,
        export_type: ExportType = ExportType.MERGED,
        version: str | None = None,
        at: datetime = START,
    ) -> str:
        """An export that ended; its id."""
        kind = ExportType.GGUF if quantization else export_type
        export_id = export_id_of(job_id, kind, quantization)
        made = [Artifact(kind=kind, uri="u", version=version, bytes=1, files=1, manifest="m")] if version else []
        facts: dict[str, Any] = {"export_id": export_id, "job_id": job_id, "export_type": kind, "artifacts": made}
        facts |= {"quantization": quantization, "updated_at": at, "uncollected_since": at}
        assert self.records.create_export(record(state, **facts))
        return export_id

    def version(self, version: str, *, root: str = "merged_models/job", manifest: str | None = None) -> None:
        """A version's files and what lies beside them; published with a manifest."""
        files = {f"{version}/model.safetensors": "weights", f"{version}.parts/model.safetensors.json": "{}"}
        if manifest is not None:
            files[f"{version}/export.json"] = manifest
        for name, text in files.items():
            self.put(f"{root}/{name}", text)

    def put(self, path: str, text: str = "theirs") -> None:
        publish(self.artifacts, path, lambda writer: writer.write(text.encode()))

    def files(self, root: str = "merged_models/job") -> set[str]:
        """All published files under a root."""
        return {file.name for file in self.artifacts.list(self.artifacts.uri(root))}

    def whole(self, version: str) -> set[str]:
        return {f"{version}/model.safetensors", f"{version}/export.json"}

    def requeue(self, export_id: str = "job.merged") -> ExportRecord:
        """What a POST does that finds another adapter."""
        return update(
            self.records,
            export_id,
            lambda found: transition(found, State.QUEUED, by=Actor.CALLER, now=self.clock()),
        )

    def record(self, export_id: str = "job.merged") -> ExportRecord:
        found = self.records.get_export(export_id)
        assert found is not None
        return found


def manifest(quantization: str | None = None) -> str:
    return json.dumps({"quantization": quantization, "files": [{"name": "model.safetensors", "bytes": 7}]})


@pytest.fixture(params=["embedded", "google"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    if request.param == "embedded":
        records = open_records(f"sqlite://{tmp_path / 'records.db'}")
        yield Stores(records, open_artifacts((tmp_path / "artifacts").as_uri()))
    else:
        request.getfixturevalue("firestore_server")
        request.getfixturevalue("storage_server")
        records = open_records(f"firestore://project-{secrets.token_hex(6)}/(default)")
        yield Stores(records, open_artifacts(f"gs://{new_bucket()}"))
    records.close()


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Stores]:
    """This machine's, where the store makes no difference."""
    records = open_records(f"sqlite://{tmp_path / 'records.db'}")
    yield Stores(records, open_artifacts((tmp_path / "artifacts").as_uri()))
    records.close()


def test_older_versions_and_abandoned_attempts_go_when_the_grace_is_over(stores: Stores) -> None:
    """A moment before, all is there; the version in use stays, without the parts beside it, and when it ended too."""
    stores.ended(version=NEW)
    stores.version(OLD, manifest=manifest())
    stores.version(NEW, manifest=manifest())
    stores.version(HALF)
    before = stores.files()
    stores.clock.now += WEEK - timedelta(seconds=1)
    assert stores.collector.collect() == {"collected": 0}
    assert stores.files() == before
    stores.clock.now += timedelta(seconds=1)
    assert stores.collector.collect() == {"collected": 2}
    assert stores.files() == stores.whole(NEW)
    assert (stores.record().uncollected_since, stores.record().updated_at) == (None, START)
    assert stores.collector.collect() == {"collected": 0}


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
def test_the_last_good_version_of_an_export_that_is_not_completed_stays(stores: Stores, state: State) -> None:
    """The training job still names it; what was never published goes."""
    stores.ended(state)
    stores.version(OLD, manifest=manifest())
    stores.version(HALF)
    stores.clock.now += WEEK
    assert stores.collector.collect() == {"collected": 1}
    assert stores.whole(OLD) <= stores.files()
    assert not any(name.startswith(HALF) for name in stores.files())


def test_what_a_cancelled_export_left_goes_after_an_hour(embedded: Stores) -> None:
    """Nobody goes on from it."""
    embedded.ended(State.CANCELLED)
    embedded.version(HALF)
    embedded.clock.now += timedelta(minutes=59)
    assert embedded.collector.collect() == {"collected": 0}
    embedded.clock.now += timedelta(minutes=1)
    assert embedded.collector.collect() == {"collected": 1}
    assert embedded.files() == set()


def test_what_a_completed_export_left_waits_for_the_download_urls_even_if_its_sibling_was_cancelled(
    embedded: Stores,
) -> None:
    """The last of the quantizations to end, or whose grace is longest, collects for all."""
    root = "gguf_models/job"
    embedded.ended(quantization="q8_0", version=NEW)
    embedded.ended(State.CANCELLED, quantization="q4_k_m")
    embedded.version(OLD, root=root, manifest=manifest("q8_0"))
    embedded.version(HALF, root=root)
    embedded.clock.now += timedelta(hours=2)
    assert embedded.collector.collect() == {"collected": 0}
    assert embedded.record("job.gguf.q4_k_m").uncollected_since is None
    embedded.clock.now += WEEK
    assert embedded.collector.collect() == {"collected": 2}


def test_an_unfinished_quantization_keeps_what_lies_beside_it(stores: Stores) -> None:
    """Which directory is its own nobody can tell; when it has ended, it collects for the others too."""
    root = "gguf_models/job"
    stores.ended(quantization="q8_0", version=NEW)
    stores.ended(quantization="q4_k_m", version=OLD)
    for version in (NEW, OLD, THIRD):
        stores.version(version, root=root, manifest=manifest("q8_0"))
    stores.version(HALF, root=root)
    stores.clock.now += WEEK
    stores.requeue("job.gguf.q4_k_m")
    before = stores.files(root)
    assert stores.collector.collect() == {"collected": 0}
    assert stores.files(root) == before
    assert stores.collector.collect() == {"collected": 0}
    moved = stores.record("job.gguf.q4_k_m")
    again = transition(moved, State.CANCELLED, by=Actor.CALLER, now=stores.clock())
    assert stores.records.replace_export(moved, again)
    stores.clock.now += timedelta(hours=1)
    assert stores.collector.collect() == {"collected": 3}
    assert stores.files(root) == stores.whole(NEW)


def test_a_request_that_was_taken_back_does_not_put_off_the_collection(embedded: Stores) -> None:
    """One too many for its user; the record is what it was before, and when it ended has not changed."""
    embedded.ended(version=NEW)
    embedded.version(OLD, manifest=manifest())
    embedded.clock.now += WEEK
    before = embedded.record()
    queued = embedded.requeue()
    assert embedded.records.replace_export(queued, withdrawn(queued, before=before, now=embedded.clock()))
    assert embedded.collector.collect() == {"collected": 1}


def test_quantizations_that_ended_are_collected_together(embedded: Stores) -> None:
    """Looking once; what another type's export is at does not matter, nor does the adapter's, which has no versions."""
    root = "gguf_models/job"
    for quantization, version in (("q8_0", NEW), ("q4_k_m", OLD)):
        embedded.ended(quantization=quantization, version=version)
        embedded.version(version, root=root, manifest=manifest(quantization))
    embedded.version(HALF, root=root)
    embedded.ended(State.QUEUED)
    embedded.ended(State.COMPLETED, job_id="job", export_type=ExportType.ADAPTER, at=START + WEEK)
    embedded.clock.now += WEEK
    looks = Steps(embedded.artifacts, "children", 0, lambda: None)
    assert embedded.collector.collect() == {"collected": 1}
    once = looks.calls
    assert embedded.files(root) == embedded.whole(NEW) | embedded.whole(OLD)
    assert all(embedded.record(f"job.gguf.{each}").uncollected_since is None for each in ("q8_0", "q4_k_m"))
    embedded.collector.collect()
    assert looks.calls == once


def test_the_mark_of_a_collector_that_was_killed_stays(embedded: Stores) -> None:
    """It may be asleep; a version without anything else is no work for another."""
    embedded.ended(version=NEW)
    embedded.put(f"merged_models/job/{OLD}.parts/spoilt.collected.1234")
    embedded.put(f"merged_models/job/{NEW}.parts/spoilt.5678")
    embedded.clock.now += WEEK
    assert embedded.collector.collect() == {"collected": 0}
    assert embedded.files() == {f"{OLD}.parts/spoilt.collected.1234", f"{NEW}.parts/spoilt.5678"}


def test_a_published_version_of_another_quantization_is_judged_by_its_own_export(stores: Stores) -> None:
    """That of a failed one stays, that of a completed one goes; one that does not say stays unless all are."""
    root = "gguf_models/job"
    stores.ended(quantization="q8_0", version=NEW)
    stores.ended(State.FAILED, quantization="q4_k_m")
    versions = {"1" * 12: "q8_0", "2" * 12: "q4_k_m", "3" * 12: "q2_k"}
    for version, quantization in versions.items():
        stores.version(version, root=root, manifest=manifest(quantization))
    for digit, text in {"4": "{", "5": "[]", "6": "{}"}.items():
        stores.version(digit * 12, root=root, manifest=text)
    stores.clock.now += WEEK
    assert stores.collector.collect() == {"collected": 1}
    assert {name[0] for name in stores.files(root)} == set("23456")


def test_what_has_not_a_versions_name_is_not_ours(stores: Stores) -> None:
    """Nor is another job whose id begins alike, another type, the base cache, or a mark."""
    stores.ended(version=NEW, job_id="job.1")
    stores.version(HALF, root="merged_models/job.1")
    others = [
        f"merged_models/job.1/{name}/file"
        for name in ("ABCDEF012345", "abcdef01234", "abcdef0123456", "abcdef012345.part", "abcdef012345.parts.x", "my")
    ]
    others += ["merged_models/job.1/README.md", f"merged_models/job.1/my/{HALF}/file", f"merged_models/{HALF}/file"]
    for job_id in ("job", "job.1.2", "job.12"):
        others += [f"merged_models/{job_id}/{HALF}/file", f"merged_models/{job_id}/{HALF}.parts/spoilt.1234"]
    others += [f"gguf_models/job.1/{HALF}/file", f"base_models/job.1/{HALF}/file"]
    for path in others:
        stores.put(path)
    stores.clock.now += WEEK
    assert stores.collector.collect() == {"collected": 1}
    for path in others:
        assert stores.artifacts.exists(stores.artifacts.uri(path)), path


class Steps:
    """Wraps a method of a store: something else happens before its call number `at`, or that call fails."""

    def __init__(self, store: object, name: str, at: int, happen: Callable[[], object]) -> None:
        self.calls = 0
        method = getattr(store, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                happen()
            return method(*arguments, **options)

        setattr(store, name, wrapped)


@pytest.mark.parametrize("at", [1, 2])
def test_an_export_that_is_asked_for_while_it_is_collected_keeps_everything(stores: Stores, at: int) -> None:
    """Up to the last look into the records; it is collected when it has ended again."""
    stores.ended(version=NEW)
    stores.version(OLD, manifest=manifest())
    before = stores.files()
    stores.clock.now += WEEK
    Steps(stores.records, "list_exports", at, stores.requeue)
    assert stores.collector.collect() == {"collected": 0}
    assert stores.files() == before
    assert stores.record().uncollected_since is None


def test_an_export_that_is_asked_for_after_the_last_look_will_be_collected_again(stores: Stores) -> None:
    """The record is the new request's."""
    stores.ended(version=NEW)
    stores.version(OLD, manifest=manifest())
    stores.clock.now += WEEK
    Steps(stores.artifacts, "delete_prefix", 1, stores.requeue)
    assert stores.collector.collect() == {"collected": 1}
    queued = stores.record()
    assert (queued.state, queued.uncollected_since) == (State.QUEUED, None)
    ended = transition(queued, State.CANCELLED, by=Actor.CALLER, now=stores.clock())
    assert ended.uncollected_since == stores.clock()


def test_a_collector_that_dies_anywhere_is_finished_by_the_next(embedded: Stores) -> None:
    """And what it leaves behind is published only as long as it is whole; its mark stays, since it may be asleep."""
    embedded.ended(version=NEW)
    embedded.version(NEW, manifest=manifest())
    embedded.clock.now += WEEK
    for at in range(1, 20):
        embedded.version(OLD, manifest=manifest())
        store = open_artifacts(embedded.artifacts.uri("x").removesuffix("/x"))

        def die(path: str = "", store: ArtifactStore = store) -> int:
            store.delete_prefix = die  # type: ignore[method-assign]  # it does nothing more
            raise KeyboardInterrupt

        steps = Steps(store, "delete_prefix", at, die)
        dying = Collector(embedded.records, store, after=WEEK, clock=embedded.clock)
        if at == 1:
            first = embedded.record()
        try:
            dying.collect()
        except KeyboardInterrupt:
            left = embedded.files()
            assert f"{OLD}/export.json" not in left or embedded.whole(OLD) <= left
            assert any(COLLECTED_PREFIX in name for name in left)
            embedded.collector.collect()
        left = embedded.files()
        assert {name for name in left if COLLECTED_PREFIX not in name} == embedded.whole(NEW)
        if steps.calls < at:
            break
        current = embedded.record()
        again = first.model_copy(update={"revision": current.revision + 1})
        assert embedded.records.replace_export(current, again)
    assert 3 < at < 19


def test_one_that_cannot_be_collected_keeps_no_other_from_it(stores: Stores) -> None:
    """It is tried again by the next run, which the error says."""
    for job_id in ("a", "b", "c"):
        stores.ended(version=NEW, job_id=job_id)
        stores.version(OLD, root=f"merged_models/{job_id}", manifest=manifest())
    stores.clock.now += WEEK

    def refuse() -> None:
        raise Unavailable("the bucket is away")

    Steps(stores.artifacts, "children", 1, refuse)
    with pytest.raises(SweepIncomplete) as error:
        stores.collector.collect()
    assert error.value.done == {"collected": 2}
    assert error.value.missed == ["a.merged: the bucket is away"]
    assert stores.collector.collect() == {"collected": 1}


def test_nothing_is_collected_beside_a_record_that_cannot_be_read(embedded: Stores, tmp_path: Path) -> None:
    """A newer version of the dispatcher wrote it; nobody here knows what it uses."""
    root = "gguf_models/job"
    embedded.ended(quantization="q8_0", version=NEW)
    embedded.ended(quantization="q4_k_m", version=OLD)
    for version in (NEW, OLD):
        embedded.version(version, root=root, manifest=manifest("q8_0"))
    embedded.clock.now += WEEK
    with closing(sqlite3.connect(tmp_path / "records.db", isolation_level=None)) as database:
        change = (
            "UPDATE exports SET document = json_set(document, '$.schema_version', 2) WHERE export_id LIKE '%q4_k_m'"
        )
        assert database.execute(change).rowcount == 1
    with pytest.raises(SweepIncomplete, match=r"job\.gguf\.q8_0: the stored record of export job\.gguf\.q4_k_m"):
        embedded.collector.collect()
    assert embedded.whole(OLD) <= embedded.files(root)


def test_a_run_is_bounded_and_the_next_goes_on(embedded: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, those that wait longest first; and by time."""
    monkeypatch.setattr(module, "MAX_RECORDS", 2)
    for number in range(5):
        embedded.ended(job_id=f"job{number}", version=NEW, at=START - timedelta(minutes=number))
        embedded.version(OLD, root=f"merged_models/job{number}", manifest=manifest())
    embedded.clock.now += WEEK
    assert embedded.collector.collect() == {"collected": 2}
    assert [number for number in range(5) if embedded.files(f"merged_models/job{number}") == set()] == [3, 4]
    monkeypatch.setattr(module, "PATIENCE_SECONDS", -1.0)
    assert embedded.collector.collect() == {"collected": 0}
    monkeypatch.undo()
    assert embedded.collector.collect() == {"collected": 3}


def test_what_a_killed_writer_left_in_the_version_in_use_is_removed(embedded: Stores, tmp_path: Path) -> None:
    """Hidden files, which nobody else ever looks at."""
    embedded.ended(version=NEW)
    embedded.version(NEW, manifest=manifest())
    partial = tmp_path / "artifacts" / "merged_models" / "job" / NEW / ".model.safetensors.0123456789ab.partial"
    partial.write_bytes(b"half")
    embedded.clock.now += WEEK
    assert embedded.collector.collect() == {"collected": 0}
    assert not partial.exists()
    assert embedded.files() == embedded.whole(NEW)


def test_a_link_is_never_followed(embedded: Stores, tmp_path: Path) -> None:
    """To a directory outside, put in a version's place by whoever has this machine."""
    embedded.ended(version=NEW)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    job = tmp_path / "artifacts" / "merged_models" / "job"
    job.mkdir(parents=True)
    (job / OLD).symlink_to(outside)
    embedded.clock.now += WEEK
    with pytest.raises(SweepIncomplete, match="leads out"):
        embedded.collector.collect()
    assert (outside / "mine.txt").read_text() == "mine"
