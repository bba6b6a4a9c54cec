"""Every port fails at random, by a seed: `python -m tests.chaos.ports --seed 17` runs one of them alone."""

import argparse
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from tests.chaos.aftermath import Wanted, judge
from tests.chaos.rows import Row, none_of
from tests.chaos.storm import BASES, calm, storm, weather
from tests.chaos.user import Seen
from tests.gemmas import make_adapter, save_base

SEEDS = 200
SHARD_BYTES = 4 << 10
FOUND = ("lost", "doubled", "inconsistent", "leftovers", "unexpected")
"""What of a seed is to be empty"""


@dataclass(frozen=True)
class Outcome:
    """What came of all seeds."""

    seeds: list[Seen]

    def total(self, name: str) -> int:
        """The sum of a count."""
        return sum(getattr(seen, name) for seen in self.seeds)

    def found(self, name: str) -> list[str]:
        """All that is wrong in one way, each with its seed."""
        return [f"seed {seen.seed}: {text}" for seen in self.seeds for text in getattr(seen, name)]


def measure(
    root: Path, console: Console, *, seeds: Sequence[int] = range(SEEDS), workers: int | None = None, keep: bool = False
) -> Outcome:
    """Let every port of a deployment fail, by one seed after another.

    Args:
        root: An empty directory.
        console: Told of each seed that something is wrong with.
        seeds: Which.
        workers: How many processes run them: as many as there are cores; 0 is this one.
        keep: Whether what each left stays.
    """
    models = root / "models"
    make_models(models)
    wanted = {base: undisturbed(root / f"undisturbed-{base}", models, base) for base in BASES}
    run = partial(one, root=root, models=models, wanted=wanted, keep=keep)
    outcome = Outcome([])
    workers = (os.cpu_count() or 1) if workers is None else workers
    if not workers:
        results = map(run, seeds)
        _noted(results, outcome, console)
        return outcome
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        _noted(pool.map(run, seeds), outcome, console)
    return outcome


def rows(outcome: Outcome) -> list[Row]:
    """What is to be shown: nothing lost, nothing twice."""
    faults, executions = outcome.total("faults"), outcome.total("executions")
    what = f"{len(outcome.seeds)} seeds, {faults} faults, {executions} executions"
    return [
        none_of(f"{what}: exports lost", outcome.found("lost")),
        none_of("artifacts made twice, or by two at once", outcome.found("doubled")),
        none_of("records, documents and files that disagree", outcome.found("inconsistent")),
        none_of(
            f"files and tokens left over, but for {outcome.total('tokens')} tokens left to their time to live",
            outcome.found("leftovers"),
        ),
        none_of("exceptions that are none of ours", outcome.found("unexpected")),
    ]


def make_models(models: Path) -> None:
    """A tiny Gemma, once in one file and once in several, and an adapter for it."""
    model = save_base("gemma3_text", models / BASES[0])
    save_base("gemma3_text", models / BASES[1], model=model, shard_bytes=SHARD_BYTES)
    make_adapter("gemma3_text", model, models / "adapter")


def undisturbed(root: Path, models: Path, base: str = BASES[0]) -> Wanted:
    """What there is where nothing fails.

    Raises:
        RuntimeError: Something is wrong all the same.
    """
    root.mkdir(parents=True)
    seen, deployment = storm(0, root, models, calm(base))
    wanted = Wanted.of(deployment)
    judge(seen, deployment, wanted, root / "none")
    if not seen.is_good:
        raise RuntimeError(f"nothing failed, and yet: {seen}")
    return wanted


def one(seed: int, *, root: Path, models: Path, wanted: Mapping[str, Wanted], keep: bool = False) -> Seen:
    """Run a seed in this process, and judge what it left.

    Args:
        seed: Which.
        root: Where a directory is made for it, and removed unless it is to be kept.
        models: Where the bases and `adapter` lie.
        wanted: What there is to be in the end, of each base.
        keep: Whether what it left stays.
    """
    torch.set_num_threads(1)  # these are tiny, and other seeds run beside
    place = root / f"seed-{seed}"
    scratch = place / "scratch"
    scratch.mkdir(parents=True)
    log = logging.getLogger()
    before, level, tempfile.tempdir = tempfile.tempdir, log.level, str(scratch)
    log.setLevel(logging.INFO if keep else logging.ERROR)
    try:
        expected = weather(seed)
        seen, deployment = storm(seed, place, models, expected)
        judge(seen, deployment, wanted[expected.base], scratch)
    finally:
        tempfile.tempdir = before
        log.setLevel(level)
        if not keep:
            shutil.rmtree(place)
    return seen


def _noted(results: Iterable[Seen], outcome: Outcome, console: Console) -> None:
    for seen in results:
        outcome.seeds.append(seen)
        for name in FOUND:
            for text in getattr(seen, name):
                console.print(f"seed {seen.seed}, {name}: {text}", markup=False)
        if len(outcome.seeds) % 20 == 0:
            console.print(f"{len(outcome.seeds)} seeds, {outcome.total('faults')} faults")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.ports", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, action="append", help="this one alone; may be given again")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="as many, from 0")
    parser.add_argument("--keep", type=Path, help="leave what each seed left under this directory, and print the log")
    options = parser.parse_args()
    console = Console(highlight=False)
    seeds = options.seed or range(options.seeds)
    if options.keep:
        logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6d %(threadName)s %(name)s: %(message)s")
    with tempfile.TemporaryDirectory() as directory:
        root = (options.keep or Path(directory)).absolute()
        outcome = measure(root, console, seeds=seeds, workers=0 if options.keep else None, keep=bool(options.keep))
    for seen in outcome.seeds if options.seed else ():
        console.print({field.name: getattr(seen, field.name) for field in fields(seen)})
    missed = [row for row in rows(outcome) if not row.good]
    for row in rows(outcome):
        console.print(f"{row.what}: {row.measured}", markup=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
