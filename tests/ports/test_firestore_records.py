"""What only Firestore can show: lost answers, fields that are not ours, and the indexes that its queries need."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api_core import exceptions as api
from google.cloud import firestore
from google.cloud.firestore_v1.services.firestore import FirestoreClient

from dispatcher.contract import UNFINISHED, State
from dispatcher.errors import ExportError, Misconfigured, SourceError, Unavailable
from dispatcher.firestore_records import FirestoreRecords
from dispatcher.lifecycle import noted
from dispatcher.records import every_export
from infra.local.servers import free_port
from tests.dispatcher.world import START
from tests.ports.test_records import JOB, QUEUED, named

INDEXES = Path(__file__).parents[2] / "infra" / "firestore.indexes.json"


@pytest.fixture
def store(firestore_server: str, request: pytest.FixtureRequest) -> Iterator[FirestoreRecords]:
    store = FirestoreRecords(f"project-{abs(hash(request.node.nodeid)):x}", "(default)")
    yield store
    store.close()


class Line:
    """The wire between the client and Firestore, which can fail before or after a commit has acted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: list[Exception] = []
        self.after: list[Exception] = []
        self.commits = 0
        commit = FirestoreClient.commit

        def failing(client: FirestoreClient, *args: Any, **kwargs: Any) -> object:
            retry = kwargs.pop("retry")

            def once() -> object:
                self.commits += 1
                if self.before:
                    raise self.before.pop()
                answer = commit(client, *args, retry=None, **kwargs)
                if self.after:
                    raise self.after.pop()
                return answer

            return retry(once)()

        monkeypatch.setattr(FirestoreClient, "commit", failing)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    return Line(monkeypatch)


@pytest.mark.parametrize("fault", [api.ServiceUnavailable("x"), api.DeadlineExceeded("x"), api.Aborted("x")])
def test_a_write_whose_answer_was_lost_is_known_to_have_held(
    store: FirestoreRecords, line: Line, fault: Exception
) -> None:
    """Its repetition meets its own result, which is no lost race."""
    line.after.append(fault)
    assert store.create_export(QUEUED)
    new = noted(QUEUED, START, execution="e")
    line.after.append(fault)
    assert store.replace_export(QUEUED, new)
    assert store.get_export("job.merged") == new
    assert line.commits == 4


def test_a_write_that_someone_else_overtook_while_its_answer_was_out_is_lost(
    store: FirestoreRecords, line: Line
) -> None:
    """A repetition that meets another's result has not held."""
    store.create_export(QUEUED)
    line.before.append(api.ServiceUnavailable("x"))
    snapshot_taken = store._read

    def overtaken(place: Any, fields: Any = None) -> Any:
        found = snapshot_taken(place, fields)
        store._read = snapshot_taken  # type: ignore[method-assign]  # only the first read is overtaken
        line.before, faults = [], line.before
        assert store.replace_export(QUEUED, noted(QUEUED, START, execution="theirs"))
        line.before = faults
        return found

    store._read = overtaken  # type: ignore[method-assign]  # a moment that no thread could be sure to hit
    assert not store.replace_export(QUEUED, noted(QUEUED, START, execution="ours"))
    found = store.get_export("job.merged")
    assert found is not None
    assert found.execution == "theirs"


def test_a_field_that_is_not_ours_stays(store: FirestoreRecords) -> None:
    """Neither writing a record nor a result rewrites a document, as a newer release may have added."""
    store.put_job("job", {**JOB, "artifacts": "text where a map is expected"})
    store.create_export(QUEUED)
    client = firestore.Client(project=store._client.project)
    client.document("exports/job.merged").update({"note": "by hand"})
    assert store.replace_export(QUEUED, noted(QUEUED, START), job_result={"artifacts.raw.merged": "/m"})
    found = client.document("exports/job.merged").get()
    assert (found.get("note"), found.get("revision")) == ("by hand", 1)
    assert client.document("training_jobs/job").get().to_dict() == {**JOB, "artifacts": {"raw": {"merged": "/m"}}}
    assert store.get_export("job.merged") == noted(QUEUED, START)
    client.close()


def test_an_unreadable_record_does_not_hide_the_others(store: FirestoreRecords) -> None:
    """A page is filled up with those that come after it."""
    for number in range(6):
        store.create_export(named(f"job{number}.merged", uncollected_since=START))
    client = firestore.Client(project=store._client.project)
    for number in (1, 2):
        client.document(f"exports/job{number}.merged").update({"state": "queued", "attempt": "many"})
    client.close()
    readable = [f"job{number}.merged" for number in (0, 3, 4, 5)]
    assert [found.export_id for found in store.list_exports(limit=2)] == readable[:2]
    assert [found.export_id for found in every_export(store, {State.QUEUED}, page=1)] == readable
    assert [found.export_id for found in store.list_uncollected({State.QUEUED}, until=START, limit=3)] == readable[:3]
    with pytest.raises(ExportError):
        store.list_exports(limit=2, strict=True)


def test_what_the_client_cannot_decode_hides_nothing_else(store: FirestoreRecords) -> None:
    """A reference into another project, say: one in a record, one where a training service may put it."""
    elsewhere = firestore.Client(project="another-project").document("a/b")
    for number in range(4):
        store.create_export(named(f"job{number}.merged", uncollected_since=START))
    store.put_job("job", {**JOB, "see_also": elsewhere})
    store.put_job("odd", {**JOB, "provider": elsewhere})
    client = firestore.Client(project=store._client.project)
    client.document("exports/job1.merged").update({"stage": elsewhere})
    client.close()
    assert [found.export_id for found in every_export(store, {State.QUEUED}, page=2)] == [
        f"job{number}.merged" for number in (0, 2, 3)
    ]
    assert [found.export_id for found in store.list_uncollected({State.QUEUED}, until=START, limit=2)] == [
        f"job{number}.merged" for number in (0, 2)
    ]
    with pytest.raises(ExportError) as error:
        store.get_export("job1.merged")
    assert error.value.error_code == "record_invalid"
    job = store.get_job("job")
    assert job is not None
    assert job.user_id == "ann"
    with pytest.raises(SourceError):
        store.get_job("odd")
    assert store.create_export(named("job.merged"), job_result={"merged_path": "/m"})


def test_a_copied_record_does_not_turn_the_pages_for_ever(store: FirestoreRecords) -> None:
    """Pages go by the document's id, which a copy made by hand does not have."""
    for number in range(3):
        store.create_export(named(f"job{number}.merged"))
    client = firestore.Client(project=store._client.project)
    client.document("exports/z-copy").set(client.document("exports/job0.merged").get().to_dict() or {})
    client.document("exports/y-empty").set({})
    client.close()
    found = [record.export_id for record in every_export(store, {State.QUEUED}, page=1)]
    assert found == [f"job{number}.merged" for number in range(3)]
    assert not store.replace_export(named("y-empty"), named("y-empty"))


def test_a_job_that_takes_no_more_does_not_undo_the_export(
    store: FirestoreRecords, caplog: pytest.LogCaptureFixture
) -> None:
    """Its document is at Firestore's limit of 1 MiB; the result is in the record, and the log says the rest."""
    store.put_job("job", {**JOB, "history": "x" * (2**20 - 300)})
    store.create_export(QUEUED)
    new = noted(QUEUED, START, execution="e")
    assert store.replace_export(QUEUED, new, job_result={"merged_path": "gs://bucket/" + "m" * 1000})
    assert store.get_export("job.merged") == new
    assert any("did not take its result" in line.getMessage() for line in caplog.records)


def test_a_job_whose_creation_was_not_answered_is_known_to_be_there(store: FirestoreRecords, line: Line) -> None:
    """It is no other job of that name."""
    line.after.append(api.ServiceUnavailable("x"))
    assert store.put_job("job", JOB)
    assert not store.put_job("job", {**JOB, "user_id": "mallory"})


def test_the_export_is_gone_is_a_lost_race_even_with_a_result(store: FirestoreRecords) -> None:
    """Not the same as a training job that is gone."""
    store.put_job("job", JOB)
    assert not store.replace_export(QUEUED, noted(QUEUED, START), job_result={"merged_path": "/m"})
    assert firestore.Client(project=store._client.project).document("training_jobs/job").get().to_dict() == JOB


def test_firestore_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch, firestore_server: str) -> None:
    """In bounded time, with the vendor's error as the cause."""
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", f"127.0.0.1:{free_port()}")
    monkeypatch.setattr("dispatcher.firestore_records.RETRY_SECONDS", 0.5)
    store = FirestoreRecords("project", "(default)")
    for use in (lambda: store.get_export("a.merged"), lambda: store.create_export(QUEUED), store.list_exports):
        with pytest.raises(Unavailable) as error:
            use()
        assert isinstance(error.value.__cause__, api.GoogleAPIError)
    store.close()


def test_no_credentials_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An operator has to mend that."""
    monkeypatch.delenv("FIRESTORE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(Misconfigured) as error:
        FirestoreRecords("project", "(default)")
    assert error.value.error_code == "no_credentials"


def test_every_composite_query_has_its_index_and_every_index_its_query(
    store: FirestoreRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator asks for none, Firestore refuses a query without."""
    asked: set[tuple[str, ...]] = set()
    run = FirestoreClient.run_query

    def watched(client: FirestoreClient, request: Any, **kwargs: Any) -> Any:
        asked.add(_fields(request["structured_query"]))
        return run(client, request, **kwargs)

    monkeypatch.setattr(FirestoreClient, "run_query", watched)
    store.create_export(QUEUED)
    for arguments in _EVERY_USE:
        store.list_exports(**arguments)
    store.list_uncollected({State.COMPLETED, State.FAILED}, until=START, limit=5)
    composite = {fields for fields in asked if len(fields) > 1}
    declared = json.loads(INDEXES.read_text())["indexes"]
    assert {tuple(field["fieldPath"] for field in index["fields"]) for index in declared} == composite
    for index in declared:
        assert index["collectionGroup"] == "exports"
        assert index["queryScope"] == "COLLECTION"
        assert {field["order"] for field in index["fields"]} == {"ASCENDING"}


def test_no_other_combination_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table above holds what the code really uses: every call of `list_exports` in the product."""
    calls = set()
    for source in Path(__file__).parents[2].glob("*er/*.py"):
        calls |= {tuple(sorted(names)) for names in _keywords(source)}
    used = {tuple(sorted(name for name in use if name not in ("limit", "after"))) for use in _EVERY_USE}
    assert calls - {()} <= used


_EVERY_USE: list[dict[str, Any]] = [
    {"user_id": "ann", "limit": 5, "after": "a.merged"},
    {"user_id": "ann", "job_id": "job", "limit": 5},
    {"user_id": "ann", "states": UNFINISHED, "limit": 5},
    {"job_id": "job"},
    {"job_id": "job", "states": UNFINISHED, "limit": 1},
    {"states": UNFINISHED, "limit": 5, "after": "a.merged"},
]
"""Each combination of filters that a caller in the dispatcher or the exporter uses."""


def _fields(query: Any) -> tuple[str, ...]:
    """The fields that a query filters and sorts by, in order; the last is the document id, as in every index."""
    filters = list(query.where.composite_filter.filters) or [query.where]
    filtered = [each.field_filter.field.field_path for each in filters if each.field_filter.field.field_path]
    *sorted_by, last = [order.field.field_path for order in query.order_by]
    assert last == "__name__"
    return tuple(dict.fromkeys([*filtered, *sorted_by]))


def _keywords(source: Path) -> Iterator[set[str]]:
    import ast

    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "list_exports":
            yield {keyword.arg or "" for keyword in node.keywords} - {"limit", "after", "strict"}
