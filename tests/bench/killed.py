"""An export from hub to bucket that is killed at random moments and started again until it is done; and its token."""

import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from infra.local.hub_state import TOKEN
from tests.bench.commands import mib
from tests.bench.deployment import ADAPTER, Deployment
from tests.bench.inputs import Size, prepare
from tests.bench.leaks import is_used, leaks
from tests.bench.servers import Noted, noted_servers

BASE = Size("8x32", 8, 1024, 4608, 4, 1, 320, shard_bytes=(32 << 20) + 320 * 2048, rank=8)
"""Eight shards of 32 MiB, each a layer"""
BYTES_PER_SECOND = 12 << 20
"""Of each connection: so that most of a run is transfer, and not the start of a process"""
SEED = 6
WEIGHTS = ".safetensors"
SETTLE_SECONDS = 0.5
"""What a request that was under way at a kill has to be answered in"""


@dataclass(frozen=True)
class Kill:
    """What one SIGKILL cost."""

    seconds: float
    """After the start of the process"""
    unfinished: int
    """Shards of the artifact that were begun and have to be made again"""
    lost: int
    """Bytes sent for shards of the artifact that are in no object"""
    lost_of_copy: int
    """Likewise for files of the base, on their way into its cache"""


@dataclass
class Outcome:
    """What became of all exports."""

    seconds: float
    """Of the undisturbed run"""
    lanes: int
    """Shards it made at once"""
    shard_bytes: int
    """Of the largest"""
    kills: list[Kill] = field(default_factory=list)
    exports: int = 0
    different: list[str] = field(default_factory=list)
    """Jobs whose artifact is not the undisturbed one's, or is not recorded"""
    leftovers: list[str] = field(default_factory=list)
    """Objects that are neither an artifact's nor a whole file of a base"""
    leaks: list[str] = field(default_factory=list)
    """Where the token was found"""


def measure(root: Path, inputs: Path, kills: int, console: Console) -> Outcome:
    """Kill exports until there were so many kills, at moments drawn over the length of an undisturbed run.

    Args:
        root: Where disks, objects, records and logs are; emptied before and after.
        inputs: Where base and adapter are kept.
        kills: How many.
        console: Told of each export.
    """
    shutil.rmtree(root, ignore_errors=True)
    base, adapter = prepare(BASE, inputs)
    with noted_servers(base, root / "objects", secret=TOKEN, bytes_per_second=BYTES_PER_SECOND) as servers:
        servers.hub.gated = True
        deployment = Deployment(root, servers.hub.url, servers.storage.url, adapter)
        killing = _Killing(root, deployment, servers)
        outcome = killing.undisturbed()
        console.print(f"undisturbed: {outcome.seconds:.1f} s, {outcome.lanes} shards at once")
        dice = random.Random(SEED)
        while len(outcome.kills) < kills:
            job_id = f"killed-{outcome.exports}"
            with console.status(f"{job_id}: {len(outcome.kills)} of {kills} kills so far"):
                killing.export(
                    job_id, outcome, lambda: dice.uniform(0, outcome.seconds) if len(outcome.kills) < kills else None
                )
            console.print(f"{job_id}: done, {len(outcome.kills)} kills so far")
        if not is_used(TOKEN, servers):
            raise RuntimeError("the hub was not shown the token, so that nothing was shown of where else it goes")
    shutil.rmtree(root)
    return outcome


class _Killing:
    def __init__(self, root: Path, deployment: Deployment, servers: Noted) -> None:
        self._root = root
        self._deployment = deployment
        self._servers = servers
        self._storage = servers.storage
        self._wanted: dict[str, str] = {}

    def undisturbed(self) -> Outcome:
        self._deployment.submit("undisturbed", TOKEN)
        start = time.monotonic()
        code = self._deployment.start("undisturbed").wait()
        seconds = time.monotonic() - start
        if code != 0:
            raise RuntimeError(self._deployment.said("undisturbed"))
        self._wanted = self._deployment.artifact("undisturbed")
        shards = [size for name, size in self._deployment.objects("merged_models/").items() if name.endswith(WEIGHTS)]
        self._deployment.delete("merged_models/")
        return Outcome(seconds, self._storage.at_once, max(shards))

    def export(self, job_id: str, outcome: Outcome, moment: Callable[[], float | None]) -> None:
        """One export from beginning to end; no base is in the bucket yet.

        Args:
            job_id: Its job.
            outcome: Added to.
            moment: When the next attempt is killed, in seconds after its start; None lets it be.
        """
        self._deployment.delete("base_models/")
        self._deployment.submit(job_id, TOKEN)
        attempt = 0
        while (kill := self._attempt(job_id, attempt, moment())) is not None:
            outcome.kills.append(kill)
            attempt += 1
        outcome.exports += 1
        recorded = self._deployment.record(job_id).state.value
        if self._deployment.artifact(job_id) != self._wanted or recorded != "completed":
            outcome.different.append(f"{job_id} ({recorded})")
        version = next(iter(self._wanted)).partition("/")[0]
        expected = (f"merged_models/{job_id}/{version}/", "base_models/", f"{ADAPTER}/")
        outcome.leftovers += [name for name in self._deployment.objects() if not name.startswith(expected)]
        outcome.leaks = sorted({*outcome.leaks, *leaks(TOKEN, self._root, self._servers)})
        self._deployment.delete("merged_models/")
        shutil.rmtree(self._deployment.disks)

    def _attempt(self, job_id: str, attempt: int, moment: float | None) -> Kill | None:
        """Run one attempt; None where it came to its end."""
        before = self._deployment.objects()
        self._storage.forget()
        process = self._deployment.start(job_id, attempt=attempt)
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            time.sleep(SETTLE_SECONDS)
            return self._cost(moment or 0.0, before)
        if code != 0:
            raise RuntimeError(f"{job_id} ended with {code}:\n{self._deployment.said(job_id, attempt=attempt)[-3000:]}")
        return None

    def _cost(self, moment: float, before: dict[str, int]) -> Kill:
        after = self._deployment.objects()
        new = {name: size for name, size in after.items() if name not in before}

        def lost(root: str) -> int:
            sent = sum(size for name, size in self._storage.uploaded.items() if _is_weights(name, root))
            return max(0, sent - sum(size for name, size in new.items() if _is_weights(name, root)))

        marked = {name.replace(".parts/", "/").removesuffix(".json") for name in after if ".parts/" in name}
        published = {name.rpartition("/")[0] for name in after if name.endswith("/export.json")}
        unfinished = [
            name
            for name in self._storage.begun
            if _is_weights(name, "merged_models/") and name not in marked and name.rpartition("/")[0] not in published
        ]
        return Kill(moment, len(unfinished), lost("merged_models/"), lost("base_models/"))


def _is_weights(name: str, root: str) -> bool:
    return name.startswith(root) and name.endswith(WEIGHTS)


def show(console: Console, outcome: Outcome) -> None:
    """Print what the kills cost, and how that stands to the goals."""
    pace = f"{BYTES_PER_SECOND >> 20} MiB/s a connection"
    title = f"killed: 8 shards of 32 MiB, {pace}; undisturbed {outcome.seconds:.1f} s, {outcome.lanes} shards at once"
    table = Table("what", "measured", "goal", "", title=title)

    def row(what: str, measured: str, goal: str, good: bool) -> None:
        table.add_row(what, measured, goal, "[green]reached[/]" if good else "[red]missed[/]")

    kills, lanes, limit = outcome.kills, outcome.lanes, outcome.lanes * outcome.shard_bytes
    table.add_row("kills, and exports they were dealt to", f"{len(kills)}, {outcome.exports}", "", "")
    row("exports unlike the undisturbed one", ", ".join(outcome.different) or "none", "none", not outcome.different)
    shards = max(kill.unfinished for kill in kills)
    row("shards made again per kill, at most", str(shards), f"at most {lanes}", shards <= lanes)
    for what, costs in (
        ("bytes sent in vain per kill, at most", [kill.lost for kill in kills]),
        ("likewise, of the copy for the base cache", [kill.lost_of_copy for kill in kills]),
    ):
        median = sorted(costs)[len(costs) // 2]
        row(what, f"{mib(max(costs))} (median {mib(median)})", f"at most {mib(limit)}", max(costs) <= limit)
    left = ", ".join(outcome.leftovers[:5]) or "none"
    row("left in the bucket besides artifacts and kept bases", left, "none", not outcome.leftovers)
    told = "\n".join(outcome.leaks[:5]) or "nowhere"
    row("the hub's token, besides with the hub", told, "nowhere", not outcome.leaks)
    console.print(table)
