"""`python -m tests.bench`: writes its inputs once, measures every command in turn, and prints medians and ratios."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.inputs import SIZES, prepare, prepare_tiny
from tests.bench.measure import Measurement, measured

CLI = (sys.executable, "-c", "from dispatcher.cli import main; main()")
JOB_ID = "bench"
COPY, OURS, PEFT = "cp -r", "gemma-export", "PEFT merge + save"
MIB = 2**20
SAMPLE = 25
"""Of how many tensors one is compared with PEFT's, after the first run."""
Results = dict[str, dict[str, list[Measurement]]]


class Bench:
    """The commands over one working directory, whose `out` is emptied before each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home, self.copied, self.by_peft = (root / "out" / name for name in ("home", "copied", "peft"))
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GEMMA_EXPORT_HOME": str(self.home)}

    def clear(self) -> None:
        shutil.rmtree(self.root / "out", ignore_errors=True)
        (self.root / "out").mkdir(parents=True)

    def copy(self, base: Path, adapter: Path) -> Measurement:
        return measured(["cp", "-r", str(base), str(self.copied)], self.environment)

    def export(self, base: Path, adapter: Path) -> Measurement:
        """This engine, from the command line to the finished record, in a state of its own."""
        registration = [*CLI, "register", "--base", str(base), "--adapter", str(adapter), "--job-id", JOB_ID]
        subprocess.run(registration, env=self.environment, check=True, stdout=subprocess.DEVNULL)
        return measured([*CLI, "export", JOB_ID, "--type", "merged", "--json"], self.environment)

    def peft(self, base: Path, adapter: Path) -> Measurement:
        command = [sys.executable, "-m", "tests.bench.peft_merge", str(base), str(adapter), str(self.by_peft)]
        return measured(command, self.environment)

    def exported(self) -> Path:
        """Where the finished export lies."""
        (version,) = (self.home / "artifacts" / "merged_models" / JOB_ID).iterdir()
        return version


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1b,4b", help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument("--root", type=Path, default=Path(".bench"), help="inputs stay here (about 10 GB)")
    options = parser.parse_args()
    names = options.sizes.split(",")
    if unknown := [name for name in names if name not in SIZES]:
        parser.error(f"no such size: {', '.join(unknown)}")

    console = Console(highlight=False)
    root = options.root.absolute()
    bench = Bench(root)
    inputs = {"tiny": prepare_tiny(root)}
    for name in names:
        with console.status(f"writing the {name} base"):
            inputs[name] = prepare(SIZES[name], root)
    results = _measure(bench, inputs, options.runs, options.skip_peft, console)
    bench.clear()
    _print_medians(console, results)
    _print_goals(console, results)
    _print_stages(console, results)
    return 0


def _measure(
    bench: Bench, inputs: dict[str, tuple[Path, Path]], runs: int, skip_peft: bool, console: Console
) -> Results:
    results: Results = {name: {} for name in inputs}
    for run in range(1, runs + 1):
        for name, (base, adapter) in inputs.items():
            commands: dict[str, Callable[[Path, Path], Measurement]] = {OURS: bench.export}
            if name != "tiny":
                commands = {COPY: bench.copy, **commands} | ({} if skip_peft else {PEFT: bench.peft})
            bench.clear()
            for label, command in commands.items():
                with console.status(f"run {run} of {runs}: {name}, {label}"):
                    result = command(base, adapter)
                results[name].setdefault(label, []).append(result)
                console.print(f"run {run}  {name:5} {label:18} {result.seconds:7.2f} s  {_mib(result.peak_bytes)}")
                if label == COPY:
                    shutil.rmtree(bench.copied)
            if run == 1 and PEFT in commands:
                count = _compare(bench.exported(), bench.by_peft)
                console.print(f"       {name:5} {count} tensors compared with PEFT's: the same bits")
    return results


def _compare(ours: Path, theirs: Path) -> int:
    """Compare every 25th tensor bit for bit; returns how many.

    Raises:
        SystemExit: One differs.
    """
    import torch
    from safetensors import safe_open

    def files(directory: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in directory.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def tensor(path: Path, name: str) -> Any:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).view(torch.int16)

    mine, other = files(ours), files(theirs)
    if mine.keys() != other.keys():
        sys.exit(f"the names differ from PEFT's: {sorted(mine.keys() ^ other.keys())[:5]}")
    sample = sorted(mine)[::SAMPLE]
    for name in sample:
        if not torch.equal(tensor(mine[name], name), tensor(other[name], name)):
            sys.exit(f"{name} differs from PEFT's")
    return len(sample)


def _print_medians(console: Console, results: Results) -> None:
    table = Table("model", "command", "median s", "all s", "peak RSS of one process", title="medians")
    for name, by_label in results.items():
        for label, runs in by_label.items():
            each = " ".join(f"{run.seconds:.2f}" for run in runs)
            table.add_row(name, label, f"{_seconds(runs):.2f}", each, _mib(_peak(runs)))
    console.print(table)


def _print_goals(console: Console, results: Results) -> None:
    table = Table("what", "measured", "goal", "", title="goals")

    def row(what: str, value: float, goal: float, unit: str) -> None:
        mark = "[green]reached[/]" if value <= goal else "[red]missed[/]"
        table.add_row(what, f"{value:.2f}{unit}", f"at most {goal:g}{unit}", mark)

    row("tiny model, submit to finished record", _seconds(results["tiny"][OURS]), 3, " s")
    for name in [name for name in results if PEFT in results[name]]:
        ratio = _seconds(results[name][OURS]) / _seconds(results[name][PEFT])
        row(f"{name}: wall, relative to PEFT's", ratio, 0.3, " x")
    if "1b" in results:
        row("1b: peak RSS", _peak(results["1b"][OURS]) / MIB, 600, " MiB")
    if {"1b", "4b"} <= results.keys():
        ours, copy = _slope(results, OURS), _slope(results, COPY)
        table.add_row("cp -r: slope from 1b to 4b", f"{copy:.2f} s/GB", "", "")
        table.add_row("gemma-export: slope from 1b to 4b", f"{ours:.2f} s/GB", "", "")
        row("slope, relative to cp's", ours / copy, 2, " x")
        row("peak RSS, 4b relative to 1b", _peak(results["4b"][OURS]) / _peak(results["1b"][OURS]), 1.1, " x")
    console.print(table)


def _print_stages(console: Console, results: Results) -> None:
    """What of each export was the exporter's own work; the rest is starting, waiting and recording."""
    table = Table("model", "whole command", "of it in the exporter's work", "its own peak RSS", title="gemma-export")
    for name, by_label in results.items():
        summaries = [json.loads(run.output.splitlines()[-1])["summary"] for run in by_label[OURS]]
        work = median(summary["wall_seconds"] for summary in summaries)
        peak = max(summary["peak_rss_bytes"] for summary in summaries)
        table.add_row(name, f"{_seconds(by_label[OURS]):.2f} s", f"{work:.2f} s", _mib(peak))
    console.print(table)


def _slope(results: Results, label: str) -> float:
    """Seconds per further gigabyte, so that start-up drops out."""
    seconds = _seconds(results["4b"][label]) - _seconds(results["1b"][label])
    return seconds / (SIZES["4b"].gigabytes - SIZES["1b"].gigabytes)


def _seconds(runs: list[Measurement]) -> float:
    return median(run.seconds for run in runs)


def _peak(runs: list[Measurement]) -> int:
    return max(run.peak_bytes for run in runs)


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
