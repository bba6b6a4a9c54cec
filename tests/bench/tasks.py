"""Four tasks against one, from hub to bucket, where the network is what they wait for."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.bench.commands import MIB
from tests.bench.deployment import Deployment
from tests.bench.inputs import Size, prepare
from tests.bench.servers import NotedStorage, noted_servers

BASE = Size("8x64", 8, 2048, 4608, 4, 1, 320, shard_bytes=(64 << 20) + 320 * 4096, rank=8)
"""Eight shards of 64 MiB, each a layer; the adapter has 1.5 percent of that, as that of a large model"""
BYTES_PER_SECOND = 1 << 20
"""Of each connection, in each direction: so slow that starting four processes on a few cores counts for little"""
COUNTS = (1, 4)
GOAL = 3.0
UNUSED = "hf_thisIsNoToken"


@dataclass(frozen=True)
class Run:
    """One execution."""

    seconds: float
    """From the first task's start to the last one's end"""
    at_once: int
    """Shards on their way together at most, of all tasks"""
    artifact: dict[str, str]


Results = dict[int, list[Run]]
"""By the number of tasks"""


def measure(root: Path, inputs: Path, runs: int, console: Console) -> Results:
    """Make the same artifact by one task and by four, `runs` times.

    Args:
        root: Where disks, objects, records and logs are; emptied before and after.
        inputs: Where base and adapter are kept.
        runs: How often.
        console: Told of each.
    """
    shutil.rmtree(root, ignore_errors=True)
    base, adapter = prepare(BASE, inputs)
    results: Results = {count: [] for count in COUNTS}
    with noted_servers(base, root / "objects", secret=UNUSED, bytes_per_second=BYTES_PER_SECOND) as servers:
        deployment = Deployment(root, servers.hub.url, servers.storage.url, adapter)
        for run in range(1, runs + 1):
            for count in COUNTS:
                with console.status(f"run {run} of {runs}: {count} tasks"):
                    result = _execute(deployment, servers.storage, f"tasks-{count}-{run}", count)
                results[count].append(result)
                console.print(f"run {run}  {count} tasks  {result.seconds:7.2f} s  {result.at_once} shards at once")
    shutil.rmtree(root)
    return results


def _execute(deployment: Deployment, storage: NotedStorage, job_id: str, count: int) -> Run:
    """One execution, of a base that is not in the bucket."""
    storage.forget()
    deployment.submit(job_id)
    start = time.monotonic()
    tasks = [deployment.start(job_id, index=index, count=count) for index in range(count)]
    codes = [task.wait() for task in tasks]
    seconds = time.monotonic() - start
    if any(codes):
        raise RuntimeError("\n".join(deployment.said(job_id, index=index)[-2000:] for index in range(count)))
    artifact = deployment.artifact(job_id)
    for prefix in ("base_models/", "merged_models/"):
        deployment.delete(prefix)
    return Run(seconds, storage.at_once, artifact)


def show(console: Console, results: Results) -> None:
    """Print medians, and how they stand to the goals."""
    pace = f"{BYTES_PER_SECOND / MIB:g} MiB/s a connection each way"
    title = f"tasks: 8 shards of 64 MiB, {pace}, the base not in the bucket yet"
    table = Table("what", "measured", "goal", "", title=title)
    for count, runs in results.items():
        each = " ".join(f"{run.seconds:.1f}" for run in runs)
        table.add_row(f"{count} tasks: median s (all)", f"{_seconds(runs):.1f} ({each})", "", "")
        table.add_row(f"{count} tasks: shards at once", str(max(run.at_once for run in runs)), "", "")

    def row(what: str, measured: str, goal: str, good: bool) -> None:
        table.add_row(what, measured, goal, "[green]reached[/]" if good else "[red]missed[/]")

    ratio = _seconds(results[1]) / _seconds(results[4])
    row("4 tasks are faster", f"{ratio:.2f} x", f"at least {GOAL:g} x", ratio >= GOAL)
    artifacts = [run.artifact for runs in results.values() for run in runs]
    same = all(artifact == artifacts[0] for artifact in artifacts)
    row("the same bytes", "yes" if same else "no", "yes", same)
    console.print(table)


def _seconds(runs: list[Run]) -> float:
    return median(run.seconds for run in runs)
