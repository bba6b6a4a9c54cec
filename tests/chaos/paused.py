"""SIGSTOP: an exporter that sleeps across the end of its lease, while another finishes, and then wakes up."""

import signal
import sqlite3
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path

from rich.console import Console

from dispatcher.artifacts import path_of
from dispatcher.contract import ExportRecord, ExportType, State, export_id_of
from exporter.model_card import CARD_NAME
from tests.bench.inputs import Size, prepare
from tests.chaos.laptop import LIMIT_SECONDS, MANIFEST, MODEL, Artifact, Laptop, undisturbed
from tests.chaos.rows import Row, none_of
from tests.chaos.steps import Step, Then
from tests.waiting import until

LANES = 2
LEASE_SECONDS = 2
MINUTE = 60.0
FINISHER, SLEEPER = "finisher", "sleeper"
SHARD = r"merged_models/.*/\.model-.*partial"
CONTENDERS = 3
ASLEEP_WITH_A_LOCK = 5
"""How often in a row at most a sleeper is given up, because a thread of its writes to SQLite just then"""


class Meanwhile(Enum):
    """What happens while the sleeper sleeps."""

    TAKEN_OVER = "its lease runs out, and another execution takes over"
    ASKED_AGAIN = "the export is cancelled and asked for again"
    ANOTHER_VERSION = "it is cancelled, and an operator forces another version"


@dataclass(frozen=True)
class Nap:
    """Where the sleeper is stopped, and what it misses."""

    step: Step
    meanwhile: Meanwhile = Meanwhile.TAKEN_OVER
    kind: ExportType = ExportType.MERGED
    seconds: float = 0.0
    """After the step"""
    in_removal: bool = False
    """The step is of the removal after a cancellation."""
    clocks: tuple[float, float] = (0.0, 0.0)
    """How far those of sleeper and finisher are ahead, in seconds"""
    margin: int = 0
    """CLOCK_SKEW_SECONDS"""

    @property
    def name(self) -> str:
        clocks = f", clocks {self.clocks[0]:+g} s and {self.clocks[1]:+g} s" if any(self.clocks) else ""
        return f"{self.kind}: {self.step.name}; {self.meanwhile.value}{clocks}"


BEFORE_COMMIT = Step("between manifest and commit", "os.remove", r"merged_models/.*export\.json")
MERGED_STEPS = (
    (Step("in the middle of a shard", "open", SHARD, skip=2), 0.004),
    (Step("before a shard is published", "os.link", SHARD, skip=2), 0.0),
    (Step("before a shard is begun", "os.mkdir", r"merged_models/[^/]+/[0-9a-f]{12} ", skip=5), 0.0),
    (Step("before a shard is noted as finished", "os.mkdir", r"merged_models/.*\.parts", skip=2), 0.0),
    (Step("before that note is written", "open", r"merged_models/.*\.parts/.*partial", skip=2), 0.0),
    (Step("before that note is published", "os.link", r"merged_models/.*\.parts/.*partial", skip=2), 0.0),
    (Step("before the manifest is published", "os.link", r"merged_models/.*export\.json"), 0.0),
    (BEFORE_COMMIT, 0.0),
    (Step("while the notes are removed", "os.remove", r"merged_models/.*\.parts/.*json ", skip=1), 0.0),
)
GGUF_STEPS = (
    (Step("in the middle of the file", "open", r"gguf_models/.*gguf\..*partial"), 0.05),
    (Step("before the file is published", "os.link", r"gguf_models/.*gguf\..*partial"), 0.0),
    (Step("before the manifest is published", "os.link", r"gguf_models/.*export\.json"), 0.0),
    (Step("between manifest and commit", "os.remove", r"gguf_models/.*export\.json"), 0.0),
)
REMOVAL_STEPS = (
    Step("before the first file is removed", "os.remove", r"merged_models/.*/model-[^/]* "),
    Step("between two files' removal", "os.remove", r"merged_models/.*/model-[^/]* ", skip=1),
)
MIDDLE = MERGED_STEPS[0][0]
NAPS = (
    *(Nap(step, meanwhile, seconds=seconds) for meanwhile in Meanwhile for step, seconds in MERGED_STEPS),
    *(
        Nap(step, meanwhile, ExportType.GGUF, seconds)
        for meanwhile in (Meanwhile.TAKEN_OVER, Meanwhile.ASKED_AGAIN)
        for step, seconds in GGUF_STEPS
    ),
    *(Nap(step, Meanwhile.ASKED_AGAIN, in_removal=True) for step in REMOVAL_STEPS),
    Nap(MIDDLE, clocks=(-MINUTE, MINUTE), margin=120),
    Nap(BEFORE_COMMIT, clocks=(-MINUTE, MINUTE), margin=120),
    # The lease lasts for three times the difference then; so it is a small one.
    Nap(MIDDLE, clocks=(4.0, -4.0), margin=8),
)
CLOCKS = ((-MINUTE, MINUTE), (MINUTE, -MINUTE), (0.0, MINUTE), (0.0, -MINUTE))
"""Of a holder that beats, and of those that would like to have the export"""


@dataclass
class Outcome:
    """What became of the exports."""

    naps: int = 0
    not_the_finishers: list[str] = field(default_factory=list)
    """Artifacts and records that are not what the finisher made"""
    changed: list[str] = field(default_factory=list)
    """What was otherwise after the sleeper had been awake"""
    leftovers: list[str] = field(default_factory=list)
    contended: int = 0
    taken: list[str] = field(default_factory=list)
    """Exports that were taken from a holder that beat"""


def measure(
    root: Path,
    console: Console,
    *,
    naps: Sequence[Nap] = NAPS,
    clocks: Sequence[tuple[float, float]] = CLOCKS,
    size: Size = MODEL,
) -> Outcome:
    """Let one exporter sleep in each of these ways, and let others try to take an export from one that beats.

    Args:
        root: Where everything is.
        console: Told of what goes wrong.
        naps: The ways.
        clocks: How far the holder's clock is ahead, and the others', in seconds.
        size: Of the base.
    """
    base, adapter = prepare(size, root / "inputs")
    wanted = undisturbed(Laptop(root / "undisturbed", base, adapter))
    outcome = Outcome(len(naps), contended=len(clocks))

    def laptop(number: int, margin: int) -> Laptop:
        lease = {"LEASE_SECONDS": str(LEASE_SECONDS), "CLOCK_SKEW_SECONDS": str(margin)}
        return Laptop(root / str(number), base, adapter, lease)

    with ThreadPoolExecutor(LANES) as pool:
        sleeping = [
            pool.submit(_nap, laptop(number, nap.margin), nap, wanted[nap.kind], outcome)
            for number, nap in enumerate(naps)
        ]
        beating = [
            pool.submit(_contend, laptop(len(naps) + number, 120), each, outcome) for number, each in enumerate(clocks)
        ]
        for done in (*sleeping, *beating):
            done.result()
    for fault in (*outcome.not_the_finishers, *outcome.changed, *outcome.taken):
        console.print(fault)
    return outcome


def rows(outcome: Outcome) -> list[Row]:
    return [
        Row("exporters stopped, and woken when another had finished", str(outcome.naps), "", outcome.naps > 0),
        none_of("artifacts and records that are not the finisher's", outcome.not_the_finishers),
        none_of("what the sleeper changed after it woke up", outcome.changed),
        none_of("left over: temporary files, parts, tokens", outcome.leftovers),
        none_of(f"taken from a holder that beats, clocks a minute off ({outcome.contended})", outcome.taken),
    ]


def _nap(laptop: Laptop, nap: Nap, wanted: Artifact, outcome: Outcome) -> None:
    for number in range(ASLEEP_WITH_A_LOCK):
        if _slept(laptop, f"job-{number}", nap, wanted, outcome):
            return
    outcome.changed.append(f"{nap.name}: its heartbeat held the lock of the records every time")


def _slept(laptop: Laptop, job_id: str, nap: Nap, wanted: Artifact, outcome: Outcome) -> bool:
    """Let one exporter sleep; whether it did so without a lock on the records, for which everybody would wait."""
    export_id = export_id_of(job_id, nap.kind, None)
    laptop.clear()
    laptop.submit(job_id, [nap.kind])
    last = Then(nap.step, signal.SIGSTOP, nap.seconds)
    # The work is held up until the heartbeat has seen that the export is cancelled.
    before = [Then(MIDDLE, signal.SIGSTOP), Then(Step("", "open", SHARD), None, 2.0)] if nap.in_removal else []
    sleeper = laptop.start(job_id, execution=SLEEPER, then=[*before, last], clock_seconds=nap.clocks[0])
    try:
        until(lambda: sleeper.is_stopped() or sleeper.wait(0) is not None, f"sleep: {nap.name}")
        if nap.in_removal:
            if laptop.is_locked():
                return False
            laptop.cancel(export_id)
            sleeper.signal(signal.SIGCONT)
            until(lambda: not sleeper.is_stopped(), "the sleeper to go on")
            until(lambda: sleeper.is_stopped() or sleeper.wait(0) is not None, f"sleep: {nap.name}")
        if not sleeper.is_stopped():
            outcome.not_the_finishers.append(f"{nap.name}: it was never stopped: {sleeper.said()[-300:]}")
            return True
        if laptop.is_locked():
            return False
        options = _meanwhile(laptop, export_id, nap)
        status = laptop.run(job_id, *options, execution=FINISHER, clock_seconds=nap.clocks[1])
        record = laptop.record(export_id)
        outcome.not_the_finishers += [f"{nap.name}: {fault}" for fault in _faults(laptop, record, status, wanted)]
        seen = _seen(laptop, record)
        sleeper.signal(signal.SIGCONT)
        status = sleeper.wait(LIMIT_SECONDS)
        differences = _differences(seen, _seen(laptop, record))
        if status not in (0, 75):
            differences.append(f"it ended with {status}: {sleeper.said()[-300:]}")
        outcome.changed += [f"{nap.name}: {difference}" for difference in differences]
        if nap.meanwhile is not Meanwhile.ANOTHER_VERSION:  # what another version has left is the collector's
            outcome.leftovers += [f"{nap.name}: {path}" for path in _left(laptop, record)]
    finally:
        sleeper.kill()
    return True


def _meanwhile(laptop: Laptop, export_id: str, nap: Nap) -> list[str]:
    """Do what the sleeper misses, up to the finisher's start; with which options that starts."""
    if nap.meanwhile is Meanwhile.TAKEN_OVER:
        lease = laptop.record(export_id).lease
        assert lease is not None
        ahead = timedelta(seconds=nap.clocks[1])
        while datetime.now(UTC) + ahead <= lease.expires_at:
            time.sleep(0.05)
        return []
    if not nap.in_removal:
        laptop.cancel(export_id)
    if nap.meanwhile is Meanwhile.ANOTHER_VERSION:
        return ["--export-type", nap.kind.value, "--force"]
    laptop.ask_again(export_id)
    return []


def _contend(laptop: Laptop, clocks: tuple[float, float], outcome: Outcome) -> None:
    """Let others try to take the export of one that is at work for three times its lease, and beats."""
    job_id, export_id = "job-1", export_id_of("job-1", ExportType.MERGED, None)
    laptop.submit(job_id, [ExportType.MERGED])
    slow = Then(MIDDLE, None, 3.0 * LEASE_SECONDS)
    holder = laptop.start(job_id, execution="holder", then=[slow], clock_seconds=clocks[0])
    told = f"clocks {clocks[0]:+g} s and {clocks[1]:+g} s"
    try:
        until(lambda: laptop.record(export_id).state is State.RUNNING, "a claim")
        for number in range(CONTENDERS):
            time.sleep(0.4 * LEASE_SECONDS)
            laptop.run(job_id, execution=f"contender-{number}", clock_seconds=clocks[1])
        status = holder.wait(LIMIT_SECONDS)
    finally:
        holder.kill()
    record = laptop.record(export_id)
    if (status, record.state, record.execution, record.attempt) != (0, State.COMPLETED, "holder", 1):
        outcome.taken.append(f"{told}: {record.state} by {record.execution}, attempt {record.attempt}, exit {status}")


def _faults(laptop: Laptop, record: ExportRecord, status: int | None, wanted: Artifact) -> list[str]:
    """In what the export is not as the finisher alone would have made it."""
    if (status, record.state, record.execution) != (0, State.COMPLETED, FINISHER) or record.lease or record.token_ref:
        return [f"exit {status}, {record.state} by {record.execution}, lease {record.lease}, {record.error}"]
    made = _content(laptop.artifact(record.job_id, record.export_type), record.artifacts[0].version)
    whole = _content(wanted, next(iter(wanted)).partition("/")[0])
    differing = sorted(name for name in made.keys() | whole.keys() if made.get(name) != whole.get(name))
    return [f"of the artifact differ {', '.join(differing)}"] if differing else []


def _content(artifact: Artifact, version: str) -> Artifact:
    """The files of a version, but for the text of those that name it."""
    paths = {name.partition("/")[2]: facts for name, facts in artifact.items() if name.startswith(f"{version}/")}
    return {name: (0, "") if name in (MANIFEST, CARD_NAME) else facts for name, facts in paths.items()}


def _seen(laptop: Laptop, record: ExportRecord) -> Mapping[str, object]:
    """Everything that the sleeper must leave as it is: the finisher's files, and all rows of the database."""
    seen: dict[str, object] = {}
    for path in path_of(record.artifacts[0].uri).rglob("*") if record.artifacts else ():
        facts = path.stat()
        seen[str(path)] = (facts.st_ino, facts.st_mtime_ns, facts.st_size, path.read_bytes())
    with closing(sqlite3.connect(laptop.home / "records.db")) as connection:
        for table in ("training_jobs", "exports"):
            seen |= {f"{table}: {row[0]}": row for row in connection.execute(f"SELECT * FROM {table}")}  # noqa: S608
    return seen


def _differences(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def _left(laptop: Laptop, record: ExportRecord) -> list[str]:
    """What there is besides the artifact."""
    own = path_of(record.artifacts[0].uri) if record.artifacts else None
    strays = [path for path in laptop.artifacts.rglob("*") if path.is_file() and own not in path.parents]
    return laptop.leftovers() + [str(path.relative_to(laptop.artifacts)) for path in strays]
