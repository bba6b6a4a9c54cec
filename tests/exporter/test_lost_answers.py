"""What an execution makes of an answer of the record store that it never got: its change was made all the same."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dispatcher.contract import ExportRecord, State
from dispatcher.errors import TokenExpired, Unavailable
from dispatcher.sqlite_records import SqliteRecords
from exporter.job import ExitCode
from tests.exporter.place import EXPORT, Place


class Unheard(SqliteRecords):
    """Makes the change to one state, and then the transport sends it again, or it is told that nothing answered."""

    def __init__(self, path: Path, to: State, *, again: bool) -> None:
        super().__init__(path)
        self._to = to
        self._again = again

    def replace_export(
        self, old: ExportRecord, new: ExportRecord, *, job_result: Mapping[str, str] | None = None
    ) -> bool:
        done = super().replace_export(old, new, job_result=job_result)
        if not done or new.state is not self._to:
            return done
        if self._again:
            return super().replace_export(old, new, job_result=job_result)
        raise Unavailable("the answer was lost")


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize(
    ("to", "code"), [(State.COMPLETED, ExitCode.DONE), (State.FAILED, ExitCode.FAILED)], ids=["completed", "failed"]
)
def test_an_ending_whose_answer_was_lost_is_still_its_own(place: Place, to: State, code: ExitCode, again: bool) -> None:
    """The exit code is that of the record, and the token is dropped, which the record knows nothing of any more."""
    if to is State.FAILED:
        place.rewrite_job(base_model_id=str(place.root / "nowhere"))
    ref = place.tokens.put(EXPORT, "hf_secret123456")
    place.queue(token_ref=ref)
    place.stores = replace(place.stores, records=Unheard(place.root / "records.db", to, again=again))
    found = place.run()
    place.stores.records.close()
    assert place.record().state is to
    with pytest.raises(TokenExpired):
        place.tokens.get(ref)
    assert found is code


def test_an_export_that_was_given_back_is_tried_again_though_nobody_said_so(place: Place) -> None:
    """Else it would wait for the next sweep."""
    place.rewrite_job(base_model_id="google/nowhere")
    place.queue()
    place.stores = replace(place.stores, records=Unheard(place.root / "records.db", State.QUEUED, again=True))
    assert place.run() is ExitCode.TRY_AGAIN
    place.stores.records.close()
    assert place.record().state is State.QUEUED


def test_a_killed_attempts_token_is_dropped_by_the_next(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record was completed, and it died before it could do that."""

    def die(ref: str) -> None:
        raise SystemExit

    ref = place.tokens.put(EXPORT, "hf_secret123456")
    place.queue(token_ref=ref)
    with monkeypatch.context() as killed:
        killed.setattr(place.tokens, "delete", die)
        with pytest.raises(SystemExit):
            place.run(execution="e")
    assert place.record().state is State.COMPLETED
    assert place.record().token_ref == ref
    assert place.run(execution="e", task_attempt=1) is ExitCode.DONE
    assert place.record().token_ref is None
    with pytest.raises(TokenExpired):
        place.tokens.get(ref)
