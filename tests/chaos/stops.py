"""SIGTERM and cancellation at random moments of the work: how soon it ends, and what is left of it."""

import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from dispatcher.contract import ExportType, State, export_id_of
from dispatcher.errors import Conflict
from tests.bench.inputs import Size, prepare, shards_of
from tests.chaos.forked import Exporter
from tests.chaos.kills import AIMS
from tests.chaos.laptop import LIMIT_SECONDS, MODEL, SMALL_MODEL, Artifact, Laptop, undisturbed
from tests.chaos.rows import Row, at_most, none_of
from tests.chaos.silent import CASES, SilentCase, stopped_in_silence
from tests.chaos.steps import Then

STOPS, CANCELS, LANES, SEED = 40, 30, 2, 7
SECONDS = 5.0
"""In which an exporter that is told to stop has to be gone: half of what Cloud Run gives it"""
TRY_AGAIN = 75
KINDS = (ExportType.MERGED, ExportType.GGUF)


@dataclass
class Outcome:
    """What became of those that were told to stop, and of those whose export was cancelled."""

    stop_seconds: list[float] = field(default_factory=list)
    cancel_seconds: list[float] = field(default_factory=list)
    silent_seconds: list[float] = field(default_factory=list)
    not_told: list[str] = field(default_factory=list)
    """Exit statuses other than 75"""
    held: list[str] = field(default_factory=list)
    """Records that were not given back at once"""
    unfinished: list[str] = field(default_factory=list)
    """Exports that the next attempt did not complete as if nothing had happened"""
    kept: int = 0
    """Exports that had been finished when they were to be cancelled: 409"""
    of_cancelled: list[str] = field(default_factory=list)
    """What is left of cancelled exports"""


def measure(
    root: Path,
    console: Console,
    *,
    stops: int = STOPS,
    cancels: int = CANCELS,
    cases: tuple[SilentCase, ...] = CASES,
    size: Size = MODEL,
) -> Outcome:
    """Stop exporters so many times, and cancel so many exports; and both while a server says nothing.

    Args:
        root: Where everything is.
        console: Told of what goes wrong.
        stops: How many SIGTERMs.
        cancels: How many cancellations.
        cases: The silences.
        size: Of the base.
    """
    base, adapter = prepare(size, root / "inputs")
    laptops = [Laptop(root / f"laptop-{number}", base, adapter) for number in range(LANES)]
    stopping = _Stopping(undisturbed(laptops[0]), len(list(shards_of(size))))
    outcome = stopping.outcome
    with ThreadPoolExecutor(LANES) as pool:
        lanes = [
            pool.submit(stopping.run, laptop, number, (stops + number) // LANES, (cancels + number) // LANES)
            for number, laptop in enumerate(laptops)
        ]
        for lane in lanes:
            lane.result()
        small = prepare(SMALL_MODEL, root / "small")
        silences = [pool.submit(stopped_in_silence, root / f"silent-{n}", *small, case) for n, case in enumerate(cases)]
        for silence in silences:
            found = silence.result()
            outcome.silent_seconds.append(found.seconds)
            console.print(f"{found.seconds:6.2f} s  {found.name}")
            (outcome.of_cancelled if found.is_cancelled else outcome.held).extend(found.faults)
    for fault in (*outcome.not_told, *outcome.held, *outcome.unfinished, *outcome.of_cancelled):
        console.print(fault)
    return outcome


def rows(outcome: Outcome) -> list[Row]:
    kept = "cancelled when it was finished: answers 409 and keeps its artifact"
    return [
        at_most(
            f"SIGTERM at {len(outcome.stop_seconds)} moments of the work: gone after", outcome.stop_seconds, SECONDS
        ),
        at_most(f"cancelled at {len(outcome.cancel_seconds)} moments: gone after", outcome.cancel_seconds, SECONDS),
        at_most(f"both, in {len(outcome.silent_seconds)} silences of hub or bucket", outcome.silent_seconds, SECONDS),
        none_of("exit statuses other than 75", outcome.not_told),
        none_of("records not given back at once", outcome.held),
        none_of("not completed by the next attempt", outcome.unfinished),
        none_of("left of cancelled exports", outcome.of_cancelled),
        Row(kept, str(outcome.kept), "", True),
    ]


class _Stopping:
    """Stops and cancellations in several lanes, counted together."""

    def __init__(self, wanted: dict[ExportType, Artifact], shards: int) -> None:
        self.outcome = Outcome()
        self._wanted = wanted
        self._shards = shards
        self._lock = threading.Lock()

    def run(self, laptop: Laptop, number: int, stops: int, cancels: int) -> None:
        dice = random.Random(SEED + number)
        jobs = landed = 0
        while landed < stops:
            landed += self._stop(laptop, f"stop-{number}-{jobs}", dice)
            jobs += 1
        landed = 0
        while landed < cancels:
            landed += self._cancel(laptop, f"cancel-{number}-{jobs}", dice)
            jobs += 1

    def _stop(self, laptop: Laptop, job_id: str, dice: random.Random) -> bool:
        """Send SIGTERM to one exporter; whether it was at work."""
        laptop.submit(job_id, [dice.choice(KINDS)])
        exporter = self._somewhere(laptop, job_id, dice)
        began = time.monotonic()
        exporter.signal(signal.SIGTERM)
        exporter.signal(signal.SIGCONT)
        status = exporter.wait(LIMIT_SECONDS)
        seconds = time.monotonic() - began
        exporter.kill()
        (record,) = laptop.exports(job_id)
        # One that has just finished has nothing to give back.
        at_work = record.state is not State.COMPLETED
        again = laptop.run(job_id, execution=job_id, attempt=1)
        faults = laptop.faults(laptop.record(record.export_id), self._wanted[record.export_type])
        with self._lock:
            outcome = self.outcome
            if at_work:
                outcome.stop_seconds.append(seconds)
                outcome.not_told += [f"{job_id} ended with {status}: {exporter.said()[-300:]}"] * (status != TRY_AGAIN)
                if (record.state, record.lease) != (State.QUEUED, None):
                    outcome.held.append(f"{record.export_id} is {record.state}, lease {record.lease}")
            outcome.unfinished += [
                *([f"{job_id} ended with {again}"] * (again != 0)),
                *faults,
                *laptop.leftovers(),
                *laptop.tokens_left(),
            ]
        laptop.clear()
        return at_work

    def _cancel(self, laptop: Laptop, job_id: str, dice: random.Random) -> bool:
        """Cancel one export; whether it was not finished."""
        kind = dice.choice(KINDS)
        export_id = export_id_of(job_id, kind, None)
        laptop.submit(job_id, [kind])
        exporter = self._somewhere(laptop, job_id, dice)
        began = time.monotonic()
        try:
            laptop.cancel(export_id)
            was_unfinished = True
        except Conflict:
            was_unfinished = False
        exporter.signal(signal.SIGCONT)
        status = exporter.wait(LIMIT_SECONDS)
        seconds = time.monotonic() - began
        exporter.kill()
        record, left = laptop.record(export_id), laptop.artifact(job_id, kind)
        with self._lock:
            if not was_unfinished:
                self.outcome.kept += 1
                self.outcome.of_cancelled += laptop.faults(record, self._wanted[kind])
            else:
                self.outcome.cancel_seconds.append(seconds)
                if record.state is not State.CANCELLED or status != 0:
                    self.outcome.of_cancelled.append(f"{export_id} is {record.state}, exit {status}")
                self.outcome.of_cancelled += [f"{export_id}: {name}" for name in left]
            self.outcome.of_cancelled += [*laptop.leftovers(), *laptop.tokens_left()]
        laptop.clear()
        return was_unfinished

    def _somewhere(self, laptop: Laptop, job_id: str, dice: random.Random) -> Exporter:
        """An exporter that is at work: stopped at a step, or, every other one, running on."""
        (record,) = laptop.exports(job_id)
        if dice.random() < 0.5:
            aims = [aim for aim in AIMS if f"{record.export_type}" in aim.step.pattern.partition("_")[0]]
            aim = dice.choice(aims)
            step = replace(aim.step, skip=dice.randrange(self._shards)) if aim.of_each_shard else aim.step
            exporter = laptop.start(job_id, execution=job_id, then=[Then(step, signal.SIGSTOP)])
            _wait(lambda: exporter.is_stopped() or exporter.wait(0) is not None)
            return exporter
        exporter = laptop.start(job_id, execution=job_id)
        _wait(lambda: exporter.wait(0) is not None or laptop.exports(job_id)[0].state not in {State.QUEUED})
        exporter.wait(dice.uniform(0, 1.5))
        return exporter


def _wait(probe: Callable[[], bool]) -> None:
    last = time.monotonic() + LIMIT_SECONDS
    while not probe() and time.monotonic() < last:
        time.sleep(0.005)
