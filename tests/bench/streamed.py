"""From the hub to a bucket: this engine without a disk, against the libraries' own transfers and against PEFT's way."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.bench.commands import MIB, mib
from tests.bench.deployment import BUCKET, MODEL_ID, Deployment
from tests.bench.disk import written_to
from tests.bench.measure import Measurement, measured
from tests.bench.servers import hub_process, storage_process

DOWNLOAD, UPLOAD, SEED = "snapshot_download", "upload_from_filename", "download, PEFT, save, upload"
NEVER, FIRST, AGAIN = "no base cache", "base cache, empty", "base cache, filled"
OURS = {NEVER: {"BASE_CACHE": "never"}, FIRST: {"BASE_CACHE": "auto"}, AGAIN: {"BASE_CACHE": "auto"}}
"""This engine's states, and the settings of each; `AGAIN` finds what `FIRST` kept"""
PEAK_GOAL = 900 * MIB
TRANSFER_GOAL, SEED_GOAL = 1.3, 0.6
"""The time to take at most, relative to download + upload, and to the other way"""
METADATA = 32 * MIB
"""What may be written to a disk besides the adapter: tokenizer, config, locks, records"""


@dataclass(frozen=True)
class Run:
    """A measured command."""

    cost: Measurement
    files: dict[str, int]
    """What it had on its disk at any time: names, and bytes at most"""


Results = dict[str, dict[str, list[Run]]]
"""Of each model, by its name, and each command, by its label: one a run"""


def measure(root: Path, inputs: dict[str, tuple[Path, Path]], runs: int, skip_peft: bool, console: Console) -> Results:
    """Run every command `runs` times; with `skip_peft` not PEFT's.

    Args:
        root: Where disks and objects are; emptied before every command but the one that finds a kept base.
        inputs: Base and adapter of each model.
        runs: How often.
        skip_peft: Whether to leave out the way over PEFT.
        console: Told of each.
    """
    results: Results = {name: {} for name in inputs}
    for run in range(1, runs + 1):
        for name, (base, adapter) in inputs.items():
            with hub_process(base) as hub_url:
                way = _Way(root, hub_url, adapter)
                commands: dict[str, Callable[[], Run]] = {DOWNLOAD: way.download, UPLOAD: way.upload, **way.ours()}
                for label, command in (commands if skip_peft else {**commands, SEED: way.seed}).items():
                    with console.status(f"run {run} of {runs}: {name}, {label}"):
                        result = command()
                    results[name].setdefault(label, []).append(result)
                    cost = result.cost
                    figures = f"{mib(cost.peak_bytes):>9}  {mib(cost.written_bytes):>9} written"
                    console.print(f"run {run}  {name:5} {label:28} {cost.seconds:7.2f} s  {figures}")
                way.clear()
    return results


class _Way:
    """The commands, each with a bucket server and a disk of its own.

    Args:
        root: Where those are.
        hub_url: Where the base is.
        adapter: The adapter's directory.
    """

    def __init__(self, root: Path, hub_url: str, adapter: Path) -> None:
        self._root = root
        self._hub_url = hub_url
        self._adapter = adapter

    def clear(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def download(self) -> Run:
        self.clear()
        with self._deployed() as deployment:
            return self._transferred(deployment, DOWNLOAD, "download", MODEL_ID)

    def upload(self) -> Run:
        """Of what was downloaded before."""
        (snapshot,) = (self._root / "disks").glob("*/hf/hub/models--*/snapshots/*")
        with self._deployed() as deployment:
            return self._transferred(deployment, UPLOAD, "upload", BUCKET, "transferred", str(snapshot))

    def seed(self) -> Run:
        self.clear()
        with self._deployed() as deployment:
            merged = str(self._root / "merged")
            return self._transferred(
                deployment, SEED, "seed", MODEL_ID, str(self._adapter), BUCKET, "transferred", merged
            )

    def ours(self) -> dict[str, Callable[[], Run]]:
        return {state: lambda state=state: self._exported(state) for state in OURS}  # type: ignore[misc]  # bound now

    def _exported(self, state: str) -> Run:
        if state != AGAIN:
            self.clear()
        with self._deployed() as deployment:
            if state == AGAIN:
                deployment.delete("merged_models/")
            job_id = f"job-{[*OURS].index(state)}"
            deployment.submit(job_id)
            environment = deployment.environment(job_id, settings=OURS[state])
            with written_to(deployment.disk(job_id)) as files:
                cost = measured(deployment.command(job_id), environment)
            return Run(cost, files)

    def _transferred(self, deployment: Deployment, label: str, *arguments: str) -> Run:
        environment = deployment.environment(label.replace(" ", "-"))
        return Run(measured([sys.executable, "-m", "tests.bench.transfer", *arguments], environment), {})

    @contextmanager
    def _deployed(self) -> Iterator[Deployment]:
        with storage_process(self._root / "objects") as storage_url:
            yield Deployment(self._root, self._hub_url, storage_url, self._adapter)


def show(console: Console, results: Results, inputs: dict[str, tuple[Path, Path]]) -> None:
    """Print medians, and how they stand to the goals."""
    table = Table(
        "model", "command", "median s", "all s", "peak RSS", "written to disk", title="hub to bucket: medians"
    )
    for name, by_label in results.items():
        for label, runs in by_label.items():
            each = " ".join(f"{run.cost.seconds:.2f}" for run in runs)
            table.add_row(name, label, f"{_seconds(runs):.2f}", each, mib(_peak(runs)), mib(_written(runs)))
    console.print(table)

    goals = Table("what", "measured", "goal", "", title="hub to bucket: goals")

    def row(what: str, value: float, goal: float, unit: str) -> None:
        mark = "[green]reached[/]" if value <= goal else "[red]missed[/]"
        goals.add_row(what, f"{value:.3g}{unit}", f"at most {goal:g}{unit}", mark)

    for name, by_label in results.items():
        transfers = _seconds(by_label[DOWNLOAD]) + _seconds(by_label[UPLOAD])
        adapter = sum(path.stat().st_size for path in inputs[name][1].iterdir())
        for state in OURS:
            runs, what = by_label[state], f"{name}, {state}"
            row(f"{what}: peak RSS", _peak(runs) / MIB, PEAK_GOAL / MIB, " MiB")
            row(
                f"{what}: written to disk besides the adapter", (_written(runs) - adapter) / MIB, METADATA / MIB, " MiB"
            )
            row(f"{what}: wall, relative to download + upload", _seconds(runs) / transfers, TRANSFER_GOAL, " x")
            if state == FIRST:
                # It uploads twice as much: the artifact, and the base for those who come after.
                ratio = _seconds(runs) / (transfers + _seconds(by_label[UPLOAD]))
                goals.add_row(f"{what}: likewise, to download + 2 uploads", f"{ratio:.3g} x", "", "")
            if SEED in by_label:
                row(f"{what}: wall, relative to PEFT's way", _seconds(runs) / _seconds(by_label[SEED]), SEED_GOAL, " x")
    console.print(goals)

    files = Table("model", "state", "files on the exporter's disk, largest first", title="hub to bucket: on the disk")
    for name, by_label in results.items():
        for state in OURS:
            found = by_label[state][-1].files
            largest = sorted(found, key=lambda path: -found[path])[:4]
            told = [f"{path} ({found[path] / MIB:.2f} MiB)" for path in largest]
            files.add_row(name, state, "\n".join([*told, f"and {max(0, len(found) - 4)} smaller ones"]))
    console.print(files)


def _seconds(runs: list[Run]) -> float:
    return median(run.cost.seconds for run in runs)


def _peak(runs: list[Run]) -> int:
    return max(run.cost.peak_bytes for run in runs)


def _written(runs: list[Run]) -> int:
    return max(run.cost.written_bytes for run in runs)
