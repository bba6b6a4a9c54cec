"""What a caller gets, whatever has happened to the export before."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.contract import ExportRecord, State
from dispatcher.errors import (
    ExportError,
    Forbidden,
    JobNotCompleted,
    NotFound,
    TokenExpired,
    TooManyExports,
    Unavailable,
)
from dispatcher.tokens import TokenStore, open_tokens
from infra.local.secret_manager import LocalSecretManager
from tests.dispatcher.world import World

TOKEN = "hf_secretsecret"


class Meanwhile:
    """A token store in which something else happens while a token is being stored."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store
        self.happens: list[Callable[[], object]] = []

    def put(self, export_id: str, token: str) -> str:
        while self.happens:
            self.happens.pop()()
        return self._store.put(export_id, token)

    def get(self, ref: str) -> str:
        return self._store.get(ref)

    def delete(self, ref: str) -> None:
        self._store.delete(ref)


Contended = tuple[World, Meanwhile, LocalSecretManager]


@pytest.fixture
def contended(tmp_path: Path) -> Iterator[Contended]:
    """A world with a job, whose tokens lie in Secret Manager, where each put has a reference of its own."""
    server = LocalSecretManager("project")
    with server.serving() as address:
        tokens = Meanwhile(open_tokens(f"secretmanager://project?emulator={address}", ttl_seconds=3600))
        world = World(tmp_path, tokens=tokens)
        world.job()
        yield world, tokens, server
        world.close()


def test_a_first_request_is_recorded_and_published(world: World) -> None:
    """The record is queued, dated, and one message waits for it."""
    record = world.submit(world.job())
    assert (record.state, record.export_id, record.user_id) == (State.QUEUED, "job.merged", "ann")
    assert record.published_at == world.clock()
    assert len(world.queue.held) == 1
    assert world.record() == record


def test_an_adapter_is_answered_at_once_and_written_back(world: World) -> None:
    """No exporter is needed: the record is created completed, with the adapter's own path."""
    world.job()
    record = world.submit(export_type="adapter")
    assert record.state is State.COMPLETED
    assert record.path == str(world.home / "adapter-job")
    assert record.artifacts[0].files == 2
    assert not world.queue.held
    job = world.records.get_job("job")
    assert job is not None
    assert job.adapter_path == record.path
    assert world.submit(export_type="adapter") == record


def test_a_whole_model_is_answered_as_it_lies_too(world: World) -> None:
    """A full fine-tune lies where adapters do; `adapter` is whatever the training left there."""
    model = world.home / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "optimizer.pt"):
        (model / name).write_text("x")
    world.job(adapter_path=str(model))
    record = world.submit(export_type="adapter")
    assert (record.state, record.path, record.artifacts[0].files) == (State.COMPLETED, str(model), 3)
    assert world.submit().state is State.QUEUED


def test_a_changed_adapter_replaces_the_adapter_record(world: World) -> None:
    """The fingerprint follows what lies there now."""
    world.job()
    before = world.submit(export_type="adapter")
    world.adapter("adapter-job", b"other weights")
    after = world.submit(export_type="adapter")
    assert after.adapter_fingerprint != before.adapter_fingerprint
    assert after.revision > before.revision


@pytest.mark.parametrize(
    ("fields", "user", "error", "code"),
    [
        ({}, "bob", Forbidden, "not_yours"),
        ({"status": "running"}, "ann", JobNotCompleted, "job_not_completed"),
        ({"adapter_path": None}, "ann", NotFound, "adapter_gone"),
        ({"adapter_path": "/nowhere/at/all"}, "ann", NotFound, "adapter_gone"),
        ({"adapter_path": "gs://bucket/adapter"}, "ann", ExportError, "uri_unsupported"),
        ({"base_model_id": 7}, "ann", ExportError, "job_document_invalid"),
    ],
)
def test_a_job_that_cannot_be_exported_leaves_no_record(
    world: World, fields: dict[str, Any], user: str, error: type[ExportError], code: str
) -> None:
    """Each refusal has its own code, and neither record nor message is made."""
    world.job(**fields)
    with pytest.raises(error) as refusal:
        world.submit(user=user)
    assert refusal.value.error_code == code
    assert world.records.get_export("job.merged") is None
    assert not world.queue.held


def test_an_unknown_job_is_not_found(world: World) -> None:
    """`job_not_found`, before anything else is looked at."""
    with pytest.raises(NotFound, match="no training job") as refusal:
        world.submit("nobody")
    assert refusal.value.error_code == "job_not_found"


def test_a_gguf_is_recorded_with_its_quantization(world: World) -> None:
    """Several of one job are exports of their own; and only the owner gets any."""
    world.job()
    assert world.submit(export_type="gguf").quantization == "q8_0"
    assert world.submit(export_type="gguf", quantization="q4_k_m").export_id == "job.gguf.q4_k_m"
    assert world.record("job.gguf.q4_k_m").quantization == "q4_k_m"
    assert world.record("job.gguf.q8_0").state is State.QUEUED
    with pytest.raises(Forbidden):
        world.submit(export_type="gguf", user="bob")


def test_an_emptied_adapter_directory_is_gone(world: World) -> None:
    """A directory without files holds no adapter."""
    empty = world.home / "empty"
    empty.mkdir()
    world.job(adapter_path=str(empty))
    with pytest.raises(NotFound) as refusal:
        world.submit(export_type="adapter")
    assert refusal.value.error_code == "adapter_gone"


def test_a_repeated_request_publishes_nothing_more(world: World) -> None:
    """The message of the first is still under way."""
    world.job()
    first = world.submit()
    assert world.submit() == first
    assert len(world.queue.held) == 1


def test_a_message_that_may_be_lost_is_published_again(world: World) -> None:
    """After five minutes in the queue, the next request sends another."""
    world.job()
    world.submit()
    world.clock.pass_seconds(301)
    assert world.submit().published_at == world.clock()
    assert len(world.queue.held) == 2


def test_a_queue_that_is_down_loses_nothing(world: World) -> None:
    """The caller is told to ask again; the record waits, and asking again publishes it."""
    world.job()
    world.queue.down = True
    with pytest.raises(Unavailable):
        world.submit()
    assert (world.record().state, world.record().published_at) == (State.QUEUED, None)
    world.queue.down = False
    assert world.submit().published_at is not None
    assert len(world.queue.held) == 1


def test_work_under_way_answers_as_it_is(world: World) -> None:
    """Starting and running are shown, and nothing is published."""
    world.job()
    assert world.launched().state is State.STARTING
    assert world.submit().state is State.STARTING
    world.claim()
    assert world.submit().state is State.RUNNING
    assert not world.queue.held


def test_a_dead_lease_is_taken_back_by_the_next_request(world: World) -> None:
    """Running under a lease that ran out is queued, in the answer and in the record."""
    world.job()
    world.launched()
    world.claim()
    world.clock.pass_seconds(121)
    assert world.submit().state is State.QUEUED
    assert len(world.queue.held) == 1


def test_a_finished_export_is_answered_with_its_path(world: World) -> None:
    """No second export of the same adapter is made."""
    world.job()
    world.launched()
    world.claim()
    done = world.complete()
    assert world.submit() == done
    assert done.path is not None
    assert not world.queue.held


@pytest.mark.parametrize("loss", ["adapter changed", "manifest gone"])
def test_a_stale_export_is_queued_anew(world: World, loss: str) -> None:
    """When the adapter changed, or the artifact is not there any more."""
    world.job()
    world.launched()
    world.claim()
    done = world.complete()
    if loss == "adapter changed":
        world.adapter("adapter-job", b"other weights")
    else:
        world.artifacts.delete_prefix("merged_models/job.merged")
    again = world.submit()
    assert (again.state, again.attempt, again.artifacts) == (State.QUEUED, 0, ())
    assert (again.adapter_fingerprint != done.adapter_fingerprint) is (loss == "adapter changed")
    assert len(world.queue.held) == 1


@pytest.mark.parametrize(
    "damage",
    [
        *("file gone", "file cut short", "file a link to elsewhere"),
        *(b"{", b"[]", b"{}", b'{"files": 3}', b'{"files": [{"name": "../v1/model.safetensors", "bytes": 7}]}'),
    ],
)
def test_a_damaged_export_is_made_anew_as_another_version(world: World, damage: str | bytes) -> None:
    """Its manifest is there, so the same version could never be written again: a nonce makes another one."""
    world.job()
    world.launched()
    world.claim()
    done = world.complete()
    directory = world.home / "artifacts" / "merged_models" / "job.merged" / "v1"
    weights = directory / "model.safetensors"
    if isinstance(damage, bytes):
        (directory / "export.json").write_bytes(damage)
    elif damage == "file cut short":
        weights.write_bytes(b"weigh")
    else:
        weights.unlink()
        if damage == "file a link to elsewhere":
            (world.home / "elsewhere").write_bytes(b"weights")
            weights.symlink_to(world.home / "elsewhere")
    again = world.submit()
    assert (again.state, again.artifacts) == (State.QUEUED, ())
    assert again.force_nonce is not None
    assert world.submit().force_nonce == again.force_nonce
    world.queue.deliver_all(world.trigger)
    world.claim()
    anew = world.complete()
    assert anew.path != done.path
    assert world.submit() == anew


def test_a_stale_export_needs_no_nonce(world: World) -> None:
    """The changed adapter gives it a version of its own, and a collected one may be written again."""
    world.job()
    world.launched()
    world.claim()
    world.complete()
    world.artifacts.delete_prefix("merged_models/job.merged")
    assert world.submit().force_nonce is None


def test_a_failed_or_cancelled_export_is_queued_anew(world: World) -> None:
    """Asking again is how its owner starts over."""
    world.job()
    world.launched()
    world.claim()
    world.fail()
    again = world.submit()
    assert (again.state, again.error) == (State.QUEUED, None)
    world.service.cancel("job.merged", "ann")
    assert world.submit().state is State.QUEUED


def test_a_token_is_stored_and_only_referred_to(world: World) -> None:
    """The record holds a reference, the message nothing at all."""
    world.job()
    record = world.submit(hf_token="hf_secretsecret")
    assert record.token_ref is not None
    assert world.tokens.get(record.token_ref) == "hf_secretsecret"
    assert "hf_secretsecret" not in record.model_dump_json()
    assert b"hf_secretsecret" not in world.queue.held[0][0]
    assert b"hf_secretsecret" not in (world.home / "records.db").read_bytes()


def test_a_newer_token_replaces_the_stored_one(world: World) -> None:
    """Also while the export is under way, and when the first request came without."""
    world.job()
    world.submit()
    record = world.submit(hf_token="hf_first")
    assert record.token_ref == world.record().token_ref
    record = world.submit(hf_token="hf_second")
    assert record.token_ref == world.record().token_ref
    assert record.token_ref is not None
    assert world.tokens.get(record.token_ref) == "hf_second"


def test_a_token_is_stored_once_however_many_races_its_request_loses(contended: Contended) -> None:
    """Another request for the same export comes first; its exporter gets the token that came second."""
    world, tokens, server = contended
    tokens.happens.append(world.submit)
    record = world.submit(hf_token=TOKEN)
    assert record == world.record()
    assert record.token_ref is not None
    assert world.tokens.get(record.token_ref) == TOKEN
    assert server.payloads() == [TOKEN.encode()]


def test_of_requests_at_once_the_record_has_the_token_of_one(contended: Contended) -> None:
    """Whichever comes last; the token of the other is readable as long, and goes with it."""
    world, tokens, server = contended
    tokens.happens.append(lambda: world.submit(hf_token="hf_otherother"))
    ref = world.submit(hf_token=TOKEN).token_ref
    assert ref is not None
    assert world.tokens.get(ref) == TOKEN
    assert server.payloads() == [b"hf_otherother", TOKEN.encode()]
    world.service.cancel("job.merged", "ann")
    assert server.payloads() == []


def test_a_token_for_an_export_that_is_completed_meanwhile_is_not_kept(contended: Contended) -> None:
    """The answer is the finished export, and nobody is left to delete the token later."""
    world, tokens, server = contended
    world.launched()
    world.claim()
    tokens.happens.append(world.complete)
    record = world.submit(hf_token=TOKEN)
    assert (record.state, record.token_ref) == (State.COMPLETED, None)
    assert server.payloads() == []


@pytest.mark.parametrize("retryable", [False, True])
def test_an_export_that_fails_meanwhile_is_queued_again_with_the_token(contended: Contended, retryable: bool) -> None:
    """As if the request had come a moment later: a first token that opened nothing is no reason to refuse a second."""
    world, tokens, _ = contended
    world.submit(hf_token="hf_wrongwrong")
    world.queue.deliver_all(world.trigger)
    world.claim()
    tokens.happens.append(lambda: world.fail(retryable=retryable))
    record = world.submit(hf_token=TOKEN)
    assert (record.state, record.error) == (State.QUEUED, None)
    assert record.token_ref is not None
    assert world.tokens.get(record.token_ref) == TOKEN
    assert len(world.queue.held) == 1


def test_too_many_unfinished_exports_are_refused(tmp_path: Path) -> None:
    """Per user, with the time to ask again; those already there still answer."""
    world = World(tmp_path, max_unfinished_per_user=2)
    for name in ("a", "b", "c"):
        world.job(name)
    world.job("d", user="bob")
    world.submit("a")
    world.submit("b")
    with pytest.raises(TooManyExports) as refusal:
        world.submit("c")
    assert refusal.value.headers["Retry-After"].isdigit()
    assert world.submit("a").state is State.QUEUED
    assert world.submit("d", user="bob").state is State.QUEUED
    world.service.cancel("a.merged", "ann")
    assert world.submit("c").state is State.QUEUED
    world.close()


def test_many_requests_at_once_make_one_record(world: World) -> None:
    """Every one of them is answered with the same export."""
    world.job()
    ready = threading.Barrier(16)
    answers: list[str] = []

    def ask() -> None:
        ready.wait()
        answers.append(world.submit().export_id)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["job.merged"] * 16
    world.queue.deliver_all(world.trigger)
    assert len(world.machines.started) == 1


def test_only_the_owner_sees_and_cancels(world: World) -> None:
    """Someone else's is forbidden, one that is not there not found."""
    world.job()
    world.submit()
    with pytest.raises(Forbidden):
        world.service.status("job.merged", "bob")
    with pytest.raises(Forbidden):
        world.service.cancel("job.merged", "bob")
    for export_id in ("other.merged", "no export id", "job.gguf.q9_9", "../job.merged"):
        with pytest.raises(NotFound):
            world.service.status(export_id, "ann")
    assert world.service.list_exports("bob") == []
    assert [record.export_id for record in world.service.list_exports("ann")] == ["job.merged"]


def test_cancelling_stops_the_execution_and_drops_the_token(world: World) -> None:
    """The flag is in the record, the token is gone, the machine is told."""
    world.job()
    ref = world.submit(hf_token="hf_secretsecret").token_ref
    world.queue.deliver_all(world.trigger)
    world.claim()
    record = world.service.cancel("job.merged", "ann")
    assert (record.state, record.lease, record.token_ref) == (State.CANCELLED, None, None)
    assert world.machines.cancelled == {"execution-1"}
    assert ref is not None
    with pytest.raises(TokenExpired):
        world.tokens.get(ref)
    world.machines.cancelled.clear()
    assert world.service.cancel("job.merged", "ann") == record
    assert world.machines.cancelled == {"execution-1"}


def test_a_cancellation_whose_answer_was_lost_still_drops_the_token(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record has forgotten it by then."""
    world.job()
    ref = world.submit(hf_token="hf_secretsecret").token_ref
    replace = world.records.replace_export

    def lost(old: ExportRecord, new: ExportRecord, **result: Any) -> bool:
        replace(old, new, **result)
        raise Unavailable("no answer")

    monkeypatch.setattr(world.records, "replace_export", lost)
    with pytest.raises(Unavailable):
        world.service.cancel("job.merged", "ann")
    assert world.record().state is State.CANCELLED
    assert ref is not None
    with pytest.raises(TokenExpired):
        world.tokens.get(ref)


def test_an_execution_that_still_has_other_work_is_not_cancelled(world: World) -> None:
    """The same job's other export would die with it."""
    world.job()
    world.launched()
    sibling = world.record().model_copy(update={"export_id": "job.gguf.q8_0", "revision": 0})
    assert world.records.create_export(sibling)
    world.service.cancel("job.merged", "ann")
    assert world.machines.cancelled == set()


def test_a_machine_that_does_not_answer_leaves_the_export_cancelled(world: World) -> None:
    """The flag is what counts: the exporter sees it at its next heartbeat."""
    world.job()
    world.launched()
    world.machines.down = True
    assert world.service.cancel("job.merged", "ann").state is State.CANCELLED
