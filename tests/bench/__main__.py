"""`python -m tests.bench`: writes its inputs once, measures every command in turn, and prints medians and ratios."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench import gguf, killed, streamed, tasks
from tests.bench.commands import MIB, Bench, Results, mib, peak, seconds
from tests.bench.inputs import SIZES, prepare, prepare_tiny
from tests.bench.measure import Measurement

COPY, OURS, PEFT = "cp -r", "gemma-export", "PEFT merge + save"
FORMATS = ("merged", "gguf", "streamed", "killed", "tasks")
"""What is measured: the first three at all sizes, the others on bases of their own"""
KILLS = 25
SAMPLE = 25
"""Of how many tensors one is compared with PEFT's, after the first run."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1b,4b", help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"comma-separated, of {', '.join(FORMATS)}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip-peft", action="store_true", help="measure nothing but this engine, and cp")
    parser.add_argument("--kills", type=int, default=KILLS, help="how often exports are killed")
    parser.add_argument("--root", type=Path, default=Path(".bench"), help="inputs stay here (about 12 GB)")
    options = parser.parse_args()
    names, formats = options.sizes.split(","), options.formats.split(",")
    if unknown := [name for name in names if name not in SIZES]:
        parser.error(f"no such size: {', '.join(unknown)}")
    if unknown := [name for name in formats if name not in FORMATS]:
        parser.error(f"no such format: {', '.join(unknown)}")

    console = Console(highlight=False)
    root = options.root.absolute()
    bench = Bench(root)
    inputs = {}
    for name in names if {"merged", "gguf", "streamed"} & {*formats} else ():
        with console.status(f"writing the {name} base"):
            inputs[name] = prepare(SIZES[name], root)
    if "merged" in formats:
        results = _measure(bench, {"tiny": prepare_tiny(root), **inputs}, options.runs, options.skip_peft, console)
        _print_medians(console, results)
        _print_goals(console, results)
        _print_stages(console, results)
    if "gguf" in formats:
        gguf.show(console, gguf.measure(bench, inputs, options.runs, options.skip_peft, console))
    bench.clear()
    if "streamed" in formats:
        transfers = streamed.measure(bench.out, inputs, options.runs, options.skip_peft, console)
        streamed.show(console, transfers, inputs)
    if "killed" in formats:
        killed.show(console, killed.measure(bench.out, root, options.kills, console))
    if "tasks" in formats:
        tasks.show(console, tasks.measure(bench.out, root, options.runs, console))
    return 0


def _measure(
    bench: Bench, inputs: dict[str, tuple[Path, Path]], runs: int, skip_peft: bool, console: Console
) -> Results:
    results: Results = {name: {} for name in inputs}
    for run in range(1, runs + 1):
        for name, (base, adapter) in inputs.items():
            commands: dict[str, Callable[[Path, Path], Measurement]] = {OURS: bench.export_merged}
            if name != "tiny":
                commands = {COPY: bench.copy, **commands} | ({} if skip_peft else {PEFT: bench.peft})
            bench.clear()
            for label, command in commands.items():
                with console.status(f"run {run} of {runs}: {name}, {label}"):
                    result = command(base, adapter)
                results[name].setdefault(label, []).append(result)
                console.print(f"run {run}  {name:5} {label:18} {result.seconds:7.2f} s  {mib(result.peak_bytes)}")
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
            table.add_row(name, label, f"{seconds(runs):.2f}", each, mib(peak(runs)))
    console.print(table)


def _print_goals(console: Console, results: Results) -> None:
    table = Table("what", "measured", "goal", "", title="goals")

    def row(what: str, value: float, goal: float, unit: str) -> None:
        mark = "[green]reached[/]" if value <= goal else "[red]missed[/]"
        table.add_row(what, f"{value:.2f}{unit}", f"at most {goal:g}{unit}", mark)

    row("tiny model, submit to finished record", seconds(results["tiny"][OURS]), 3, " s")
    for name in [name for name in results if PEFT in results[name]]:
        ratio = seconds(results[name][OURS]) / seconds(results[name][PEFT])
        row(f"{name}: wall, relative to PEFT's", ratio, 0.3, " x")
    if "1b" in results:
        row("1b: peak RSS", peak(results["1b"][OURS]) / MIB, 600, " MiB")
    if {"1b", "4b"} <= results.keys():
        ours, copy = _slope(results, OURS), _slope(results, COPY)
        table.add_row("cp -r: slope from 1b to 4b", f"{copy:.2f} s/GB", "", "")
        table.add_row("gemma-export: slope from 1b to 4b", f"{ours:.2f} s/GB", "", "")
        row("slope, relative to cp's", ours / copy, 2, " x")
        row("peak RSS, 4b relative to 1b", peak(results["4b"][OURS]) / peak(results["1b"][OURS]), 1.1, " x")
    console.print(table)


def _print_stages(console: Console, results: Results) -> None:
    """What of each export was the exporter's own work; the rest is starting, waiting and recording."""
    table = Table("model", "whole command", "of it in the exporter's work", "its own peak RSS", title="gemma-export")
    for name, by_label in results.items():
        summaries = [json.loads(run.output.splitlines()[-1])["summary"] for run in by_label[OURS]]
        work = median(summary["wall_seconds"] for summary in summaries)
        peak = max(summary["peak_rss_bytes"] for summary in summaries)
        table.add_row(name, f"{seconds(by_label[OURS]):.2f} s", f"{work:.2f} s", mib(peak))
    console.print(table)


def _slope(results: Results, label: str) -> float:
    """Seconds per further gigabyte, so that start-up drops out."""
    more = seconds(results["4b"][label]) - seconds(results["1b"][label])
    return more / (SIZES["4b"].gigabytes - SIZES["1b"].gigabytes)


if __name__ == "__main__":
    sys.exit(main())
