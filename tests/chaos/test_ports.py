"""A short version of what `make chaos` does with failing ports; and that its judges see what they are there to see."""

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from dispatcher.contract import Lease, State
from dispatcher.lifecycle import Actor, transition
from dispatcher.tokens import FileTokens
from tests.chaos import ports
from tests.chaos.aftermath import Wanted, judge
from tests.chaos.deployment import JOB, Deployment
from tests.chaos.faults import Dice, Fate
from tests.chaos.storm import calm, storm
from tests.chaos.user import Seen
from tests.chaos.watch import Watch
from tests.exporter.exporting import merged_record

SEEDS = range(12)


def test_exports_survive_ports_that_fail_at_random(tmp_path: Path) -> None:
    """Nothing is lost, nothing is made twice, records and files agree, and nothing is left over."""
    outcome = ports.measure(tmp_path, Console(file=io.StringIO()), seeds=SEEDS, workers=0)
    assert [row for row in ports.rows(outcome) if not row.good] == []
    assert outcome.total("faults") > 50


def test_a_call_is_not_done_or_its_answer_lost_or_done_twice() -> None:
    """And the same one of a seed has the same fate every time."""

    def fates(seed: int) -> list[Fate]:
        dice = Dice(seed, 0.5)
        return [dice.fate("somebody", "call") for _ in range(100)]

    assert fates(1) == fates(1) != fates(2)
    assert set(fates(1)) == set(Fate)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Deployment, Wanted]:
    """A deployment in which nothing failed."""
    root = tmp_path_factory.mktemp("left")
    ports.make_models(root / "models")
    (root / "stack").mkdir()
    _, deployment = storm(0, root / "stack", root / "models", calm())
    return deployment, Wanted.of(deployment)


def judged(left: tuple[Deployment, Wanted]) -> Seen:
    """What the judge says of it."""
    seen = Seen(0)
    judge(seen, *left, left[0].root / "scratch")
    return seen


def test_the_judge_finds_nothing_where_nothing_failed(left: tuple[Deployment, Wanted]) -> None:
    assert judged(left).is_good


@pytest.mark.parametrize("name", ["merged_models/job-1/half/.x.partial", "gguf_models/job-1/stray", "base_models/x"])
def test_the_judge_sees_a_file_that_was_left(left: tuple[Deployment, Wanted], name: str) -> None:
    path = left[0].root / "artifacts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"left")
    try:
        assert len(judged(left).leftovers) == 1
    finally:
        path.unlink()


def test_the_judge_sees_a_second_version(left: tuple[Deployment, Wanted]) -> None:
    manifest = left[0].root / "artifacts" / "merged_models" / JOB / "0123456789ab" / "export.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"run": {}, "files": []}))
    try:
        assert len(judged(left).doubled) == 1
    finally:
        manifest.unlink()


def test_the_judge_sees_a_file_with_another_byte(left: tuple[Deployment, Wanted]) -> None:
    path = next((left[0].root / "artifacts" / "merged_models" / JOB).glob("*/model.safetensors"))
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        assert len(judged(left).inconsistent) == 1
    finally:
        path.write_bytes(before)


def test_a_token_that_is_left_to_its_time_to_live_is_counted(left: tuple[Deployment, Wanted]) -> None:
    """It is no leftover, since nothing is left of it after that."""
    directory = left[0].root / "tokens"
    FileTokens(directory).put("job-1.merged", "hf_token")
    seen = judged(left)
    assert (seen.tokens, seen.is_good) == (1, True)


def test_the_watch_sees_who_writes_for_an_export_that_another_holds(left: tuple[Deployment, Wanted]) -> None:
    """Unless their own lease ran out before."""
    for seconds, count in ((60, 1), (-60, 0)):
        watch = Watch()
        now = datetime.now(UTC)
        lease = Lease(lease_id="a", owner="one", expires_at=now + timedelta(seconds=seconds))
        held = transition(merged_record(), State.RUNNING, by=Actor.EXPORTER, now=now, lease=lease)
        watch.stored(None, held, "one/0")
        other = lease.model_copy(update={"lease_id": "b", "owner": "two", "expires_at": now + timedelta(seconds=60)})
        watch.stored(held, held.model_copy(update={"lease": other}), "two/0")
        watch.writes("two/0", held.export_id, "a/file")
        assert watch.doubled == []
        watch.writes("one/0", held.export_id, "a/file")
        assert len(watch.doubled) == count
