"""One execution of the exporter: who may work on what, what it records, and what it leaves behind."""

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tokenizers import Regex
from tokenizers.normalizers import Replace

from dispatcher.artifacts import ArtifactWriter, path_of
from dispatcher.contract import ExportRecord, ExportType, Lease, State
from dispatcher.errors import ArtifactConflict, NotAvailable, NotFound, StorageFull, TokenExpired, Unavailable
from dispatcher.lifecycle import Actor, noted, transition
from dispatcher.local_artifacts import LocalArtifacts
from dispatcher.published import SPOILT_PREFIX
from dispatcher.records import update
from dispatcher.sqlite_records import SqliteRecords
from exporter import job
from exporter.job import ExitCode, run_job
from exporter.lease import Term, utc_now
from exporter.manifest import publish_manifest
from exporter.order import Order
from exporter.stopping import Stop
from tests.exporter.damage import Tensors, edit_adapter, edit_config
from tests.exporter.exporting import merged_into
from tests.exporter.place import EXPORT, Interfering, Place, expired
from tests.gemmas import (
    Layout,
    assert_same_tensors,
    load_model,
    make_adapter,
    model_tensors,
    peft_merged,
    save_base,
)
from tests.waiting import until


def test_a_queued_export_is_made_and_recorded_with_its_proof(place: Place) -> None:
    place.queue()
    assert place.run() is ExitCode.DONE
    record = place.record()
    assert record.state is State.COMPLETED
    assert record.progress == 1.0
    assert record.lease is None
    merged = path_of(record.artifacts[0].uri)
    manifest = json.loads((merged / "export.json").read_text())
    assert merged.parent == place.root / "artifacts" / "merged_models" / "job-1"
    assert manifest["base"]["id"] == str(place.root / "base")
    assert manifest["base"]["revision"].startswith("directory:")
    assert manifest["adapter"]["fingerprint"] == record.adapter_fingerprint
    assert manifest["engine"]["name"] == "streaming"
    assert manifest["libraries"].keys() == {"torch", "transformers", "peft", "safetensors"}
    assert manifest["tensors"]["merged"] == 14
    assert manifest["tensors"]["copied"] > 0
    assert manifest["run"]["wall_seconds"] > 0
    assert manifest["run"]["peak_rss_bytes"] > 2**20
    listed = {file.name: (file.size, file.crc32c) for file in LocalArtifacts(place.root).list(str(merged))}
    listed.pop("export.json")
    assert {file["name"]: (file["bytes"], file["crc32c"]) for file in manifest["files"]} == listed


def test_the_training_job_learns_the_path_and_keeps_the_rest(place: Place) -> None:
    place.queue()
    place.run()
    with place.records._connection() as connection:
        (text,) = connection.execute("SELECT document FROM training_jobs").fetchone()
    document = json.loads(text)
    path = place.record().artifacts[0].uri
    assert document["merged_path"] == path
    assert document["artifacts"] == {"raw": {"adapter": str(place.root / "adapter"), "merged": path}, "kept": 1}


def test_tokenizer_and_template_come_from_the_adapter_where_it_has_them(place: Place) -> None:
    (place.root / "adapter" / "chat_template.jinja").write_text("the adapter's")
    (place.root / "adapter" / "additional_chat_templates").mkdir()
    (place.root / "adapter" / "additional_chat_templates" / "tool.jinja").write_text("a tool's")
    (place.root / "base" / "chat_template.jinja").write_text("the base's")
    place.queue()
    place.run()
    merged = path_of(place.record().artifacts[0].uri)
    assert (merged / "chat_template.jinja").read_text() == "the adapter's"
    assert (merged / "additional_chat_templates" / "tool.jinja").read_text() == "a tool's"
    assert (merged / "tokenizer.model").read_bytes() == (place.root / "base" / "tokenizer.model").read_bytes()
    assert not (merged / "adapter_config.json").exists()


def test_a_second_run_finds_nothing_to_do(place: Place) -> None:
    place.queue()
    place.run()
    before = (place.record(), place.files())
    assert place.run() is ExitCode.DONE
    assert (place.record(), place.files()) == before


def test_forcing_makes_a_new_version_and_keeps_the_old(place: Place) -> None:
    place.queue()
    place.run()
    first = place.record().artifacts[0]
    assert place.run(force_nonce="n1") is ExitCode.DONE
    second = place.record().artifacts[0]
    assert second.version != first.version
    assert path_of(first.uri).is_dir()


def test_an_operator_may_ask_for_an_export_that_nobody_requested(place: Place) -> None:
    assert place.run(export_type=ExportType.MERGED) is ExitCode.DONE
    record = place.record()
    assert record.state is State.COMPLETED
    assert record.user_id == "ann"


def test_a_manifest_without_a_record_is_only_recorded(place: Place) -> None:
    """As after a crash between the manifest and the record: no byte is written again."""
    place.queue()
    place.run()
    before = {name: (place.root / "artifacts" / name).stat().st_mtime_ns for name in place.files()}
    place.requeue()
    assert place.run() is ExitCode.DONE
    assert place.record().state is State.COMPLETED
    assert {name: (place.root / "artifacts" / name).stat().st_mtime_ns for name in place.files()} == before


def test_what_a_killed_attempt_left_beside_its_manifest_goes_when_that_is_recorded(place: Place) -> None:
    """It had linked the manifest into place, and not yet removed the file's other name."""
    place.queue()
    assert place.run() is ExitCode.DONE
    files = place.files()
    published = path_of(place.record().artifacts[0].uri)
    (published / ".export.json.0123456789ab.partial").hardlink_to(published / "export.json")
    place.requeue()
    assert place.run() is ExitCode.DONE
    assert place.record().state is State.COMPLETED
    assert place.files() == files


def test_someone_elses_live_lease_is_respected(place: Place) -> None:
    place.queue()
    place.leased("other", 60)
    before = place.record()
    assert place.run() is ExitCode.DONE
    assert place.record() == before
    assert place.files() == []


def test_an_expired_lease_is_taken_over(place: Place) -> None:
    place.queue()
    place.leased("other", -1)
    assert place.run() is ExitCode.DONE
    assert place.record().state is State.COMPLETED
    assert place.record().attempt == 2


def test_the_same_executions_next_attempt_takes_over_at_once(place: Place) -> None:
    place.queue()
    place.leased("mine", 60)
    assert place.run(execution="mine") is ExitCode.DONE
    assert place.record().state is State.COMPLETED


def test_the_triggers_lease_is_adopted(place: Place) -> None:
    place.queue()
    now = utc_now()
    lease = Lease(lease_id="handed", owner="trigger", expires_at=now + timedelta(seconds=60))
    update(
        place.records,
        EXPORT,
        lambda record: transition(record, State.STARTING, by=Actor.TRIGGER, now=now, lease=lease),
    )
    assert place.run(export_id=EXPORT, lease_id="wrong") is ExitCode.DONE
    assert place.record().state is State.STARTING
    assert place.run(export_id=EXPORT, lease_id="handed") is ExitCode.DONE
    assert place.record().state is State.COMPLETED


def test_a_permanent_fault_is_recorded_and_said_again(place: Place) -> None:
    place.queue()
    edit_config(place.root / "adapter", init_lora_weights="pissa")
    assert place.run(execution="e1", export_id=EXPORT) is ExitCode.FAILED
    record = place.record()
    assert record.error is not None
    assert record.error.code == "adapter_base_mutated"
    assert not record.error.retryable
    assert place.files() == []
    assert place.run(execution="e1", export_id=EXPORT) is ExitCode.FAILED
    assert place.record().attempt == 1


def test_an_operator_reruns_a_failed_export_after_mending_it(place: Place) -> None:
    place.queue()
    edit_config(place.root / "adapter", init_lora_weights="pissa")
    place.run()
    edit_config(place.root / "adapter", init_lora_weights=True)
    assert place.run() is ExitCode.DONE
    assert place.record().state is State.COMPLETED
    assert place.record().error is None


class _Failing(LocalArtifacts):
    """A store whose writers fail after some bytes."""

    def __init__(self, root: Path, error: Exception, after: int) -> None:
        super().__init__(root)
        self.error, self.after, self.written = error, after, 0

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        writer, store = super().create(path, size=size), self

        class Writer:
            def write(self, data: bytes | bytearray | memoryview) -> None:
                store.written += 0 if SPOILT_PREFIX in path else len(data)
                if store.written > store.after and SPOILT_PREFIX not in path:
                    raise store.error
                writer.write(data)

            commit = staticmethod(writer.commit)
            discard = staticmethod(writer.discard)

        return Writer()


def test_a_full_disk_fails_clearly_and_leaves_nothing(place: Place) -> None:
    place.queue()
    full = _Failing(place.root / "artifacts", StorageFull("no room left"), after=9000)
    place.stores = replace(place.stores, artifacts=full)
    assert place.run() is ExitCode.FAILED
    error = place.record().error
    assert error is not None
    assert error.code == "storage_full"
    assert place.files() == []


def test_a_passing_fault_is_tried_again_and_then_given_up(place: Place) -> None:
    place.queue()
    broken = _Failing(place.root / "artifacts", Unavailable("the bucket is down"), after=9000)
    place.stores = replace(place.stores, artifacts=broken)
    for _ in range(2):
        assert place.run(execution="e", export_id=EXPORT) is ExitCode.TRY_AGAIN
        assert place.record().state is State.QUEUED
        assert place.files() == []
    assert place.run(execution="e", export_id=EXPORT) is ExitCode.FAILED
    error = place.record().error
    assert error is not None
    assert error.retryable


def test_a_fault_of_ours_ends_in_the_record(place: Place) -> None:
    place.queue()
    place.stores = replace(place.stores, artifacts=_Failing(place.root / "artifacts", KeyError("oops"), after=0))
    assert place.run() is ExitCode.FAILED
    error = place.record().error
    assert error is not None
    assert error.code == "internal"


def test_sigterm_gives_the_export_back_to_the_queue(place: Place) -> None:
    place.queue()
    store = Interfering(place.root / "artifacts")
    store.interfere = place.stop.set
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.TRY_AGAIN
    assert place.record().state is State.QUEUED
    assert place.files() == []


def test_an_attempt_that_is_tried_again_counts_as_no_failed_export(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the verdict does, of which there is one; an alert looks at that."""
    place.queue()
    place.stores = replace(
        place.stores, max_attempts=2, artifacts=_Failing(place.root / "artifacts", Unavailable("gone"), after=0)
    )
    counts = []
    for expected in (ExitCode.TRY_AGAIN, ExitCode.FAILED):
        assert place.run() is expected
        failed = [vars(line) for line in caplog.records if vars(line).get("event") == "export_failed"]
        counts.append([(line["code"], line["retryable"]) for line in failed])
    assert counts == [[], [("unavailable", True)]]


def test_a_cancelled_export_leaves_nothing(place: Place) -> None:
    """The cancellation comes while the weights are written, and is seen at the next heartbeat."""
    place.queue()
    store = Interfering(place.root / "artifacts")

    def cancel() -> None:
        if place.record().state is State.RUNNING:
            place.record_change(State.CANCELLED, Actor.CALLER)
            until(lambda: not any(thread.name == "heartbeat" for thread in threading.enumerate()), "the heartbeat")

    store.interfere = cancel
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.DONE
    assert place.record().state is State.CANCELLED
    assert place.files() == []


def test_an_attempt_that_slept_past_its_lease_takes_nothing_from_its_successor(place: Place) -> None:
    """It wakes with its temporary file gone, after another made and published the very same version."""
    place.queue()
    store = Interfering(place.root / "artifacts")
    successor = replace(place.stores)

    def sleep() -> None:
        store.interfere = lambda: None
        update(place.records, EXPORT, expired)
        order = Order(job_id="job-1", execution="successor")
        assert run_job(order, successor, Stop()) is ExitCode.DONE
        raise Unavailable("the disk stalled")

    store.interfere = sleep
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.DONE
    record = place.record()
    assert record.state is State.COMPLETED
    merged = path_of(record.artifacts[0].uri)
    manifest = json.loads((merged / "export.json").read_text())
    assert all((merged / file["name"]).stat().st_size == file["bytes"] for file in manifest["files"])


def test_an_attempt_that_wakes_after_its_successor_leaves_no_note_of_a_part(place: Place) -> None:
    """It was asleep between a shard and the note that it is finished, which is its next write."""
    place.queue()
    store = Interfering(place.root / "artifacts")
    successor = replace(place.stores)
    files: list[str] = []

    def sleep() -> None:
        if not store.directory.endswith(".parts"):
            return
        store.interfere = lambda: None
        update(place.records, EXPORT, expired)
        assert run_job(Order(job_id="job-1", execution="successor"), successor, Stop()) is ExitCode.DONE
        files.extend(place.files())
        until(lambda: not any(thread.name == "heartbeat" for thread in threading.enumerate()), "the heartbeat")

    store.interfere = sleep
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.DONE
    assert place.record().execution == "successor"
    assert place.files() == files


def test_a_half_written_version_of_a_live_successor_is_left_alone(place: Place) -> None:
    """As before, but the successor is still at work: it holds the lease, and there is no manifest yet."""
    place.queue()
    store = Interfering(place.root / "artifacts")

    def sleep() -> None:
        update(place.records, EXPORT, expired)
        place.leased("successor", 60)
        version = place.root / "artifacts" / store.directory
        version.mkdir(parents=True, exist_ok=True)
        (version / "model.safetensors").write_bytes(b"theirs")
        raise Unavailable("the disk stalled")

    store.interfere = sleep
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.DONE
    assert place.record().state is State.RUNNING
    assert place.files() == [f"{store.directory}/model.safetensors"]


@pytest.mark.parametrize("name", ["base/model.safetensors", "adapter/adapter_model.safetensors", "base/config.json"])
def test_a_source_replaced_while_it_is_read_is_noticed(name: str, place: Place) -> None:
    """Else the manifest would name another base or adapter than the one that was merged."""
    place.queue()
    store = Interfering(place.root / "artifacts")
    path = place.root / name

    def swap() -> None:
        content = path.read_bytes()
        other = path.with_name("other")
        other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if name.endswith("tensors") else content + b" ")
        other.replace(path)

    store.interfere = swap
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.TRY_AGAIN
    assert place.record().state is State.QUEUED
    assert place.files() == []


class _Faltering(SqliteRecords):
    """A record store that fails once the export is claimed."""

    error: Exception = Unavailable("the store is down")

    def replace_export(
        self, old: ExportRecord, new: ExportRecord, *, job_result: Mapping[str, str] | None = None
    ) -> bool:
        if old.state is State.RUNNING and new.state is State.RUNNING:
            raise self.error
        return super().replace_export(old, new, job_result=job_result)


@pytest.mark.parametrize("error", [Unavailable("the store is down"), RuntimeError("odd")])
def test_work_without_a_heartbeat_stops_and_is_tried_again(error: Exception, place: Place) -> None:
    """Never with 0, which would say that nothing is left to do."""
    place.queue()
    records = _Faltering(place.root / "records.db")
    records.error = error
    store = Interfering(place.root / "artifacts")
    store.interfere = lambda: until(lambda: _is_stopped(place), "the heartbeat to fail")
    place.stores = replace(place.stores, records=records, artifacts=store, term=Term(1))
    assert place.run() is ExitCode.TRY_AGAIN
    assert place.record().artifacts == ()
    records.close()


def _is_stopped(place: Place) -> bool:
    lease = place.record().lease
    beating = any(thread.name == "heartbeat" for thread in threading.enumerate())
    return not beating or lease is None or lease.expires_at < utc_now()


def test_the_record_says_how_far_the_work_is_without_a_write_per_block(place: Place) -> None:
    place.queue()
    store = Interfering(place.root / "artifacts")
    seen: list[ExportRecord] = []

    def look() -> None:
        store.interfere = lambda: None
        seen.append(until(lambda: place.record() if place.record().stage == "planning" else None, "a heartbeat"))

    store.interfere = look
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.DONE
    assert seen[0].state is State.RUNNING
    assert 0 <= seen[0].progress < 1
    assert place.record().revision - seen[0].revision <= 2


def test_sigterm_after_the_manifest_still_finishes(place: Place) -> None:
    """One compare-and-set is left; throwing the work back would only do it twice."""
    place.queue()

    class Stopping(LocalArtifacts):
        def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
            if path.endswith("export.json"):
                place.stop.set()
            return super().create(path, size=size)

    place.stores = replace(place.stores, artifacts=Stopping(place.root / "artifacts"))
    place.run()
    assert place.record().state is State.COMPLETED


def test_forcing_also_reaches_an_export_that_is_queued_already(place: Place) -> None:
    place.queue()
    place.run()
    first = place.record().artifacts[0].version
    place.requeue()
    assert place.run(force_nonce="n1") is ExitCode.DONE
    assert place.record().artifacts[0].version != first


def test_a_tokenizer_is_taken_whole_from_the_adapter(place: Place) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place.root / "base" / name, place.root / "adapter" / name)
    (place.root / "base" / "added_tokens.json").write_text("{}")
    place.queue()
    place.run()
    merged = path_of(place.record().artifacts[0].uri)
    assert not (merged / "added_tokens.json").exists()
    assert (merged / "tokenizer.model").exists()


def test_a_manifest_with_other_content_is_a_conflict(place: Place) -> None:
    place.queue()
    place.run()
    merged = path_of(place.record().artifacts[0].uri)
    manifest = json.loads((merged / "export.json").read_text())
    run = manifest.pop("run")
    directory = f"merged_models/job-1/{merged.name}"
    publish_manifest(place.artifacts, directory, manifest, {**run, "wall_seconds": 99})
    with pytest.raises(ArtifactConflict) as conflict:
        publish_manifest(place.artifacts, directory, {**manifest, "tensors": {}}, run)
    assert conflict.value.error_code == "manifest_conflict"
    assert not list(merged.glob(".*partial"))


def test_the_token_is_dropped_when_the_export_is_finished(place: Place) -> None:
    ref = place.tokens.put(EXPORT, "hf_secret123456")
    place.queue(token_ref=ref)
    assert place.run() is ExitCode.DONE
    assert place.record().token_ref is None
    with pytest.raises(TokenExpired):
        place.tokens.get(ref)


def test_a_token_that_came_while_the_work_went_on_is_dropped_too(place: Place) -> None:
    """The claim knew nothing of it."""
    place.queue()
    store = Interfering(place.root / "artifacts")
    refs: list[str] = []

    def ask_again() -> None:
        store.interfere = lambda: None
        refs.append(place.tokens.put(EXPORT, "hf_secret123456"))
        update(place.records, EXPORT, lambda record: noted(record, utc_now(), token_ref=refs[0]))

    store.interfere = ask_again
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.DONE
    with pytest.raises(TokenExpired):
        place.tokens.get(refs[0])


def test_a_token_that_cannot_be_dropped_does_not_undo_the_export(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left to its time to live."""
    place.queue(token_ref=place.tokens.put(EXPORT, "hf_secret123456"))

    def down(ref: str) -> None:
        raise Unavailable("the token store is down")

    monkeypatch.setattr(place.tokens, "delete", down)
    assert place.run() is ExitCode.DONE
    assert place.record().state is State.COMPLETED


def test_an_expired_token_says_how_to_go_on(place: Place) -> None:
    """Only a base on the hub needs it."""
    ref = place.tokens.put(EXPORT, "hf_secret123456")
    place.tokens.delete(ref)
    place.queue(token_ref=ref)
    assert place.run() is ExitCode.DONE
    place.rewrite_job(base_model_id="google/somewhere-else")
    place.requeue()
    update(place.records, EXPORT, lambda record: noted(record, utc_now(), token_ref=ref))
    assert place.run() is ExitCode.FAILED
    error = place.record().error
    assert error is not None
    assert error.code == "token_expired"
    assert "hf_token" in error.message


def test_an_unknown_job_or_export_is_named(place: Place) -> None:
    with pytest.raises(NotFound) as missing:
        place.run(job_id="nobody")
    assert missing.value.error_code == "job_not_found"
    with pytest.raises(NotFound) as missing:
        place.run(export_id="job-1.gguf.q8_0")
    assert missing.value.error_code == "export_not_found"


def test_an_adapter_changed_since_the_request_is_exported_as_it_is_now(place: Place) -> None:
    place.queue(adapter_fingerprint="of the older one")
    edit_adapter(place.root / "adapter", lambda tensors: {k: v * 2 for k, v in tensors.items()})
    assert place.run() is ExitCode.DONE
    assert place.record().adapter_fingerprint == place.artifacts.fingerprint(str(place.root / "adapter"))


def test_a_base_changed_in_place_makes_another_version(place: Place) -> None:
    place.queue()
    place.run()
    first = place.record().artifacts[0].version
    os.utime(place.root / "base" / "model.safetensors", ns=(1, 1))
    place.requeue()
    place.run()
    assert place.record().artifacts[0].version != first


def test_peft_is_the_way_out_and_agrees_on_a_plain_adapter(place: Place) -> None:
    place.queue()
    assert place.run(engine="peft") is ExitCode.DONE
    record = place.record()
    merged = path_of(record.artifacts[0].uri)
    manifest = json.loads((merged / "export.json").read_text())
    assert manifest["engine"]["name"] == "peft"
    assert manifest["tensors"]["merged"] == 14
    assert manifest["verified"]["tensors_changed"] == 14
    assert (merged / "tokenizer.model").is_file()
    expected = peft_merged(place.root / "base", place.root / "adapter")
    assert_same_tensors(model_tensors(load_model(merged)), expected)


def _poison(tensors: Tensors) -> Tensors:
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def _train_the_head(tensors: Tensors) -> Tensors:
    head = "base_model.model.lm_head.lora_{}.weight"
    return {**tensors, head.format("A"): torch.ones(4, 16), head.format("B"): torch.ones(64, 4)}


def _train_the_embedding(tensors: Tensors) -> Tensors:
    return {**tensors, "base_model.model.model.embed_tokens.weight": torch.ones(64, 16)}


def _of_another_base(tensors: Tensors) -> Tensors:
    return {name.replace("layers.1.", "layers.5."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_poison, "adapter_not_finite"),
        (_train_the_head, "unsupported_tied_lm_head"),
        (_train_the_embedding, "unsupported_tied_embedding"),
        (_of_another_base, "adapter_unmatched"),
        (lambda tensors: {name: tensor * 0 for name, tensor in tensors.items()}, "nothing_changed"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # all that PEFT says of it
def test_what_peft_gets_silently_wrong_is_refused(
    change: Callable[[Tensors], Tensors], code: str, place: Place
) -> None:
    place.queue()
    edit_adapter(place.root / "adapter", change)
    assert place.run(engine="peft") is ExitCode.FAILED
    error = place.record().error
    assert error is not None
    assert error.code == code
    assert place.files() == []


@pytest.mark.parametrize("layout", ["hub", "nested"])
def test_peft_takes_an_adapter_of_an_older_library(layout: Layout, tmp_path: Path) -> None:
    model = save_base("gemma3", tmp_path / "base")
    make_adapter("gemma3", model, tmp_path / "adapter", layout=layout)
    merged = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "one", engine="peft")
    streamed = merged_into(tmp_path / "base", tmp_path / "adapter", tmp_path / "two")
    assert_same_tensors(model_tensors(load_model(merged)), model_tensors(load_model(streamed)))


def test_what_cannot_be_run_is_refused_before_it_is_recorded(place: Place) -> None:
    with pytest.raises(NotAvailable) as refused:
        place.run(export_type=ExportType.ADAPTER)
    assert refused.value.error_code == "nothing_to_run"
    assert place.records.list_exports() == []


def test_a_job_that_is_gone_is_said_in_the_triggers_record(place: Place) -> None:
    """Else the trigger would launch it again and again."""
    place.queue()
    with closing(sqlite3.connect(place.root / "records.db")) as connection, connection:
        connection.execute("DELETE FROM training_jobs")
    assert place.run(export_id=EXPORT) is ExitCode.FAILED
    error = place.record().error
    assert error is not None
    assert error.code == "job_not_found"


def test_an_export_that_is_always_interrupted_fails_for_now_in_the_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may never find the time that it takes; how often it is tried has a bound."""
    monkeypatch.setattr(job, "MAX_INTERRUPTED", 2)
    place.queue()
    place.stop.set()
    assert place.run() is ExitCode.TRY_AGAIN
    assert place.record().state is State.QUEUED
    place.run()
    error = place.record().error
    assert error is not None
    assert (error.code, error.retryable) == ("interrupted", True)


def test_a_panic_in_a_library_is_a_verdict(place: Place) -> None:
    """A tokenizer's pattern that is too much for the library ends in what is no Exception of Python's."""
    place.queue()
    store = Interfering(place.root / "artifacts")

    def panic() -> None:
        if place.record().state is State.RUNNING:
            Replace(Regex(r"(.+)+\1$"), "").normalize_str("a" * 60 + "b")

    store.interfere = panic
    place.stores = replace(place.stores, artifacts=store)
    assert place.run() is ExitCode.FAILED
    error = place.record().error
    assert error is not None
    assert error.code == "file_unreadable"
    assert place.record().lease is None
