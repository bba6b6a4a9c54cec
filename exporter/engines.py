"""The engines by name, and which of the reference engines stands in for the streaming one."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dispatcher.artifacts import StoredFile
from dispatcher.errors import NotAvailable, Unsupported
from exporter import peft_engine, streaming, unsloth_engine
from exporter.attempt import Attempt
from exporter.checkpoint import Checkpoint
from exporter.lease import Report
from exporter.making import Checks, Made
from exporter.sources import Base
from exporter.tasks import Tasks

CGROUP = Path("/sys/fs/cgroup")
GIB = 1 << 30


@dataclass(frozen=True)
class Engine:
    """One way to merge."""

    name: str
    version: Callable[[], str]
    """What decides its bytes, besides base and adapter"""
    make: Callable[[Attempt, Base, Path, Report, Checks, Tasks], Made | None]
    """None where the other tasks of the execution have the rest to make"""
    memory_needed: Callable[[Checkpoint], int] = lambda base: 0
    """Bytes for a whole model in memory, where it holds one"""


def _by_one_task(make: Callable[[Attempt, Base, Path, Report, Checks], Made]) -> Callable[..., Made | None]:
    """For an engine that holds the whole model: the first task makes all of it, and the others nothing."""

    def made(
        attempt: Attempt, base: Base, adapter_dir: Path, report: Report, checks: Checks, tasks: Tasks
    ) -> Made | None:
        return None if tasks.index > 0 else make(attempt, base, adapter_dir, report, checks)

    return made


_ENGINES = {
    engine.name: engine
    for engine in (
        Engine("streaming", streaming.version, streaming.stream),
        Engine("peft", peft_engine.peft_version, _by_one_task(peft_engine.make), peft_engine.memory_needed),
        Engine(
            "unsloth", unsloth_engine.unsloth_version, _by_one_task(unsloth_engine.make), unsloth_engine.memory_needed
        ),
    )
}


def engine_of(name: str) -> Engine:
    """The engine of a name.

    Raises:
        NotAvailable: There is none (`engine_not_available`).
    """
    if name not in _ENGINES:
        raise NotAvailable(
            f"engine {name!r} is not in this build; auto, {', '.join(_ENGINES)} are.", code="engine_not_available"
        )
    return _ENGINES[name]


def reference_for(refusal: Unsupported, provider: str, base: Base, adapter: Sequence[StoredFile]) -> Engine:
    """The reference engine that makes what the streaming engine does not support.

    Args:
        refusal: What the streaming engine said.
        provider: Who trained it: what Unsloth trained, Unsloth merges, where it is installed.
        base: The base model, which the reference engine holds in memory.
        adapter: The adapter's files.

    Raises:
        Unsupported: The refusal itself, where there is not the memory for another engine.
    """
    # Of PEFT's types, Unsloth merges LoRA alone.
    is_lora = not refusal.error_code.startswith("unsupported_peft_type")
    unsloth = is_lora and provider == "unsloth" and unsloth_engine.is_installed()
    engine = _ENGINES["unsloth" if unsloth else "peft"]
    needed = engine.memory_needed(base.checkpoint()) + 2 * sum(file.size for file in adapter)
    available = available_memory()
    if needed > available:
        raise Unsupported(
            f"{refusal.message} The {engine.name} engine would need {needed / GIB:.1f} GiB of memory for it, "
            f"{available / GIB:.1f} are available.",
            code=refusal.error_code,
        ) from refusal
    return engine


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of the container if that is less."""
    machine = _told("/proc/meminfo", "MemAvailable:")
    if machine is None:  # a system that does not say
        return sys.maxsize
    try:
        used = int((CGROUP / "memory.current").read_text()) - (_told(CGROUP / "memory.stat", "inactive_file") or 0)
        return min(machine * 1024, int((CGROUP / "memory.max").read_text()) - used)
    except (OSError, ValueError):  # no limit, or none that is told
        return machine * 1024


def _told(path: Path | str, name: str) -> int | None:
    """A number from a file of names and numbers."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
