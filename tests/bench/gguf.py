"""GGUF: this engine in one pass, against merging, converting, and for the K types quantizing, one after the other."""

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from exporter import llama_cpp
from tests.bench.commands import MIB, Bench, Results, mib, peak, seconds
from tests.bench.measure import Measurement

OURS, MERGE, CONVERT, QUANTIZE = "gemma-export", "PEFT merge + save", "convert", "quantize"
ROUTES = {"q8_0": (MERGE, f"{CONVERT} q8_0"), "q4_k_m": (MERGE, f"{CONVERT} bf16", f"{QUANTIZE} q4_k_m")}
"""The steps that lead to each quantization without this engine"""
GOALS = {"q8_0": 0.25, "q4_k_m": 0.4}
"""The time to take at most, relative to that"""
PEAK_GOAL = 1024 * MIB
METADATA = 64 * MIB
"""What may be written besides the result: the vocabulary and other metadata, the record, logs; but no weights"""
AGAINST = "1b"
"""The model that both are measured with; larger ones are for the memory."""
SAMPLE = 25
"""Of how many tensors one is compared with the other route's, after the first run."""


def measure(
    bench: Bench, inputs: dict[str, tuple[Path, Path]], runs: int, skip_peft: bool, console: Console
) -> Results:
    """Run every command `runs` times; with `skip_peft` only this engine's."""
    results: Results = {name: {} for name in inputs}

    def note(run: int, name: str, label: str, result: Measurement) -> None:
        results[name].setdefault(label, []).append(result)
        console.print(
            f"run {run}  {name:5} {label:19} {result.seconds:7.2f} s  {mib(result.peak_bytes):>9}  "
            f"{mib(result.written_bytes):>9} written"
        )

    for run in range(1, runs + 1):
        for name, (base, adapter) in inputs.items():
            bench.clear()
            files: dict[str, Path] = {}
            for quantization in ROUTES:
                result = bench.export(base, adapter, "--type", "gguf", "--quantization", quantization)
                note(run, name, f"{OURS} {quantization}", result)
                (file,) = bench.exported("gguf_models").glob("*.gguf")
                files[quantization] = file.rename(bench.out / f"{quantization}.gguf")
            if name != AGAINST or skip_peft:
                continue
            note(run, name, MERGE, bench.peft(base, adapter))
            converted = {kind: bench.out / f"converted-{kind}.gguf" for kind in ("q8_0", "bf16")}
            for kind, file in converted.items():
                note(run, name, f"{CONVERT} {kind}", bench.convert(file, kind))
            quantized = bench.out / "quantized.gguf"
            note(run, name, f"{QUANTIZE} q4_k_m", bench.quantize(converted["bf16"], quantized, "q4_k_m"))
            if run == 1:
                count = _compare(files["q8_0"], converted["q8_0"]) + _compare(files["q4_k_m"], quantized)
                console.print(f"       {name:5} {count} tensors compared with the other route's: the same bytes")
    return results


def _compare(ours: Path, theirs: Path) -> int:
    """Compare names and types of all tensors, and every 25th byte for byte; returns how many.

    Raises:
        SystemExit: One differs.
    """
    llama_cpp.ensure_importable()
    import gguf

    mine, other = ({found.name: found for found in gguf.GGUFReader(path).tensors} for path in (ours, theirs))
    if {name: found.tensor_type for name, found in mine.items()} != {
        name: found.tensor_type for name, found in other.items()
    }:
        sys.exit(f"{ours.name}: names or types differ from {theirs.name}'s")
    sample = sorted(mine)[::SAMPLE]
    for name in sample:
        if not np.array_equal(mine[name].data, other[name].data):
            sys.exit(f"{name} of {ours.name} differs from {theirs.name}'s")
    return len(sample)


def show(console: Console, results: Results) -> None:
    """Print medians, and how they stand to the goals; the route is PEFT's merge, the converter, and the quantizer."""
    table = Table("model", "command", "median s", "all s", "peak RSS of one process", "written", title="GGUF: medians")
    for name, by_label in results.items():
        for label, runs in by_label.items():
            each = " ".join(f"{run.seconds:.2f}" for run in runs)
            table.add_row(name, label, f"{seconds(runs):.2f}", each, mib(peak(runs)), mib(_written(runs)))
    console.print(table)

    goals = Table("what", "measured", "goal", "", title="GGUF: goals")

    def row(what: str, value: float, goal: float, unit: str) -> None:
        mark = "[green]reached[/]" if value <= goal else "[red]missed[/]"
        goals.add_row(what, f"{value:.3g}{unit}", f"at most {goal:g}{unit}", mark)

    for name, by_label in results.items():
        for quantization, steps in ROUTES.items():
            ours = by_label[f"{OURS} {quantization}"]
            what = f"{name} {quantization}"
            if MERGE in by_label:
                route = [by_label[step] for step in steps]
                ratio = seconds(ours) / sum(seconds(runs) for runs in route)
                row(f"{what}: wall, relative to the route's", ratio, GOALS[quantization], " x")
                between = sum(_written(runs) for runs in route[:-1])
                goals.add_row(f"{what}: the route's peak RSS", mib(max(peak(runs) for runs in route)), "", "")
                goals.add_row(f"{what}: the route's intermediate files", mib(between), "", "")
            row(f"{what}: peak RSS", peak(ours) / MIB, PEAK_GOAL / MIB, " MiB")
            row(f"{what}: written besides the result", _besides(ours) / MIB, METADATA / MIB, " MiB")
    console.print(goals)


def _written(runs: list[Measurement]) -> int:
    return max(run.written_bytes for run in runs)


def _besides(runs: list[Measurement]) -> int:
    """What an export wrote, without the artifact itself."""
    artifacts = (json.loads(run.output.splitlines()[-1])["artifacts"] for run in runs)
    return max(run.written_bytes - int(found[0]["bytes"]) for run, found in zip(runs, artifacts, strict=True))
