"""SIGKILL: exports of a merged model and a GGUF that are killed at random moments and started again like a task."""

import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from dispatcher.contract import UNFINISHED, State
from tests.bench.inputs import Size, prepare, shards_of
from tests.chaos.laptop import LIMIT_SECONDS, MODEL, Laptop, undisturbed
from tests.chaos.rows import Row, none_of
from tests.chaos.steps import Step, Then

KILLS = 100
LANES = 2
"""Exports under way at once, each on a laptop of its own"""
FROM_COLD = 8
"""How many of the kills are of `python -m exporter` itself, the seconds included in which it only imports"""
TWICE = 0.2
"""In how many of the exports the attempt after the killed one is killed too"""
SEED = 7


@dataclass(frozen=True)
class Aim:
    """A short window that kills are aimed at."""

    step: Step
    """When it begins"""
    seconds: float
    """How long it is"""
    of_each_shard: bool = False


AIMS = (
    Aim(Step("begins a shard", "open", r"merged_models/.*safetensors\..*partial"), 0.05, of_each_shard=True),
    Aim(Step("publishes a shard", "os.link", r"merged_models/.*safetensors\..*partial"), 0.01, of_each_shard=True),
    Aim(Step("notes a shard as finished", "os.link", r"merged_models/.*\.parts/"), 0.01, of_each_shard=True),
    Aim(Step("publishes the merged model's card", "os.link", r"merged_models/.*README"), 0.02),
    Aim(Step("publishes the merged model's manifest", "os.link", r"merged_models/.*export\.json"), 0.003),
    Aim(Step("records the merged model", "os.remove", r"merged_models/.*export\.json"), 0.02),
    Aim(Step("removes the parts' notes", "os.remove", r"merged_models/.*\.parts"), 0.005, of_each_shard=True),
    Aim(Step("lays out what the converter reads", "os.mkdir", r"gemma-export-"), 0.3),
    Aim(Step("begins the GGUF", "open", r"gguf_models/.*gguf\..*partial"), 0.2),
    Aim(Step("publishes the GGUF", "os.link", r"gguf_models/.*gguf\..*partial"), 0.01),
    Aim(Step("runs llama.cpp", "subprocess.Popen", r"llama_run"), 0.4),
    Aim(Step("publishes the Modelfile", "os.link", r"gguf_models/.*Modelfile"), 0.02),
    Aim(Step("publishes the GGUF's manifest", "os.link", r"gguf_models/.*export\.json"), 0.003),
    Aim(Step("records the GGUF", "os.remove", r"gguf_models/.*export\.json"), 0.02),
    Aim(Step("drops a finished export's token", "os.remove", r"/tokens/"), 0.01),
    Aim(Step("drops the last token", "os.remove", r"/tokens/", skip=1), 0.01),
)


@dataclass
class Outcome:
    """What became of all exports."""

    goal: int
    """Kills"""
    kills: Counter[str] = field(default_factory=Counter)
    """By what the exporter was at"""
    of_restarts: int = 0
    """Those of an attempt that went on after a kill"""
    artifacts: int = 0
    good: int = 0
    """Those that are recorded, complete and byte-identical to the undisturbed ones"""
    different: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    """Records that nobody will finish"""
    leftovers: list[str] = field(default_factory=list)
    """Temporary files, and what attempts hand to each other"""
    tokens: list[str] = field(default_factory=list)
    """Those of finished exports"""
    orphans: list[str] = field(default_factory=list)
    """Processes that outlived the exporter that started them"""


def measure(
    root: Path, console: Console, *, kills: int = KILLS, from_cold: int = FROM_COLD, size: Size = MODEL
) -> Outcome:
    """Kill exporters until there were so many kills, each of an attempt that had not ended.

    Half of the moments are drawn over the length of an undisturbed run, the others within short windows that begin
    with a step of the work.

    Args:
        root: Where everything is.
        console: Told what the exporters were at.
        kills: How many.
        from_cold: How many of them are of a Python that has imported nothing yet.
        size: Of the base.
    """
    base, adapter = prepare(size, root / "inputs")
    laptops = [Laptop(root / f"laptop-{number}", base, adapter) for number in range(LANES)]
    killing = _Killing(laptops[0], Outcome(kills), len(list(shards_of(size))), with_cold=from_cold > 0)
    console.print(f"undisturbed: {killing.seconds:.1f} s, and {killing.cold_seconds:.1f} s with what Python imports")
    with ThreadPoolExecutor(LANES) as pool:
        lanes = [
            pool.submit(killing.run, laptop, number, (kills + number) // LANES, (from_cold + number) // LANES)
            for number, laptop in enumerate(laptops)
        ]
        for lane in lanes:
            lane.result()
    for where, count in sorted(killing.outcome.kills.items()):
        console.print(f"{count:4}  {where}")
    return killing.outcome


def rows(outcome: Outcome) -> list[Row]:
    count, good, artifacts = sum(outcome.kills.values()), outcome.good, outcome.artifacts
    told = f"{count}, of restarts {outcome.of_restarts}"
    return [
        Row("SIGKILLs of an exporter at work", told, str(outcome.goal), count >= outcome.goal),
        Row("complete, byte-identical artifacts", f"{good} of {artifacts}", "all", good == artifacts > 0),
        none_of("artifacts and records that differ", outcome.different),
        none_of("records stuck", outcome.stuck),
        none_of("left over: temporary files and parts", outcome.leftovers),
        none_of("left over: tokens", outcome.tokens),
        none_of("left over: processes", outcome.orphans),
    ]


class _Killing:
    """Kills in several lanes, counted together."""

    def __init__(self, laptop: Laptop, outcome: Outcome, shards: int, *, with_cold: bool) -> None:
        self.outcome = outcome
        self._shards = shards
        self._lock = threading.Lock()
        self._wanted = undisturbed(laptop)
        # Once more, for how long it takes when the libraries are there.
        self.seconds = _timed(laptop, "timed", lambda: laptop.run("timed", execution="timed"))
        self.cold_seconds = 0.0
        if with_cold:
            self.cold_seconds = _timed(laptop, "cold", lambda: laptop.start_python("cold", execution="cold").wait())

    def run(self, laptop: Laptop, number: int, kills: int, from_cold: int) -> None:
        """Make exports one after the other on a laptop, until so many attempts were killed."""
        dice = random.Random(SEED + number)
        landed = jobs = 0
        while landed < kills:
            job_id, jobs = f"job-{number}-{jobs}", jobs + 1
            laptop.submit(job_id)
            kill = self._kill_from_cold if landed < from_cold else self._kill_forked
            attempt, wanted = 0, min(kills - landed, 1 + (dice.random() < TWICE))
            while attempt < wanted and (at := kill(laptop, job_id, attempt, dice)):
                attempt += 1
                with self._lock:
                    self.outcome.kills[at] += 1
                    self.outcome.of_restarts += attempt > 1
            landed += attempt
            status = laptop.run(job_id, execution=job_id, attempt=attempt)
            with self._lock:
                if status != 0:
                    self.outcome.different.append(f"{job_id}: the last attempt ended with {status}")
                self._tally(laptop, job_id)
            laptop.clear()

    def _kill_forked(self, laptop: Laptop, job_id: str, attempt: int, dice: random.Random) -> str | None:
        """Run an attempt and kill it; what it was at, or None where it ended before."""
        if dice.random() < 0.5:
            aim = dice.choice(AIMS)
            step = replace(aim.step, skip=dice.randrange(self._shards)) if aim.of_each_shard else aim.step
            # Every other one at the very call: what is not done yet, and what is, are next to each other.
            after = dice.choice((0.0, dice.uniform(0, aim.seconds)))
            then = [Then(step, signal.SIGKILL, after)]
            exporter = laptop.start(job_id, execution=job_id, attempt=attempt, then=then)
            exporter.wait(LIMIT_SECONDS)
            exporter.kill()
            return f"aimed: {step.name}" if exporter.wait() == -signal.SIGKILL else None
        exporter = laptop.start(job_id, execution=job_id, attempt=attempt)
        exporter.wait(dice.uniform(0, self.seconds))
        exporter.kill()
        stage = _stage(laptop, job_id)
        return f"at any time: {stage}" if stage and exporter.wait() == -signal.SIGKILL else None

    def _kill_from_cold(self, laptop: Laptop, job_id: str, attempt: int, dice: random.Random) -> str | None:
        process = laptop.start_python(job_id, execution=job_id, attempt=attempt)
        try:
            process.wait(dice.uniform(0, self.cold_seconds))
        except subprocess.TimeoutExpired:
            process.kill()
        stage = _stage(laptop, job_id)
        return f"from cold: {stage}" if process.wait() == -signal.SIGKILL and stage else None

    def _tally(self, laptop: Laptop, job_id: str) -> None:
        """Count what there is, and what there should not be."""
        for record in laptop.exports(job_id):
            faults = laptop.faults(record, self._wanted[record.export_type])
            self.outcome.artifacts += 1
            self.outcome.good += not faults
            self.outcome.different += faults
            self.outcome.stuck += [record.export_id] * (record.state in UNFINISHED)
        self.outcome.leftovers += laptop.leftovers()
        self.outcome.tokens += laptop.tokens_left()
        self.outcome.orphans += laptop.orphans()


def _timed(laptop: Laptop, job_id: str, run: Callable[[], object]) -> float:
    laptop.submit(job_id)
    began = time.monotonic()
    run()
    seconds = time.monotonic() - began
    laptop.clear()
    return seconds


def _stage(laptop: Laptop, job_id: str) -> str | None:
    """What the records say that the work is at; None where it is all done, so that a kill meets nothing."""
    records = laptop.exports(job_id)
    running = [f"{record.export_type}, {record.stage}" for record in records if record.state is State.RUNNING]
    done = sum(record.state is State.COMPLETED for record in records)
    return " and ".join(running) or ("nothing claimed", "between the two", None)[done]
