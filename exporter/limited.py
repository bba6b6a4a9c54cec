"""Work on a stranger's text in a process of its own, within limits of time and memory.

A chat template is a program, and a regular expression may be one too: either may run for ever, or take all memory, and
in this process would stop the heartbeat with it. What the work is is another module's: it reads `request.json`, and
leaves `answer.json` by `serve`.
"""

import contextlib
import json
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from exporter.child import end_with_parent, environment, run_child
from exporter.scratch import scratch_directory

CPU_SECONDS = 5
"""Of the processor, so that a busy machine is not taken for a slow text"""
WALL_SECONDS = 120.0
MEMORY_BYTES = 512 << 20
"""Of address space; the interpreter itself takes 25 MB of it"""
ANSWER_BYTES = 16 << 20


class LimitExceeded(Exception):
    """The work was given up.

    Args:
        limit: `time` or `memory`.
    """

    def __init__(self, limit: str) -> None:
        super().__init__(limit)
        self.limit = limit


def ask(module: str, request: dict[str, Any], *, while_waiting: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Have a module of ours answer a request, in a process that has no secret in its environment.

    Args:
        module: Its `main` calls `serve`.
        request: Whatever JSON can say.
        while_waiting: Called now and then; what it raises ends the work.

    Raises:
        LimitExceeded: It took longer than `CPU_SECONDS`, or more than `MEMORY_BYTES`.
        RuntimeError: The module itself failed.
    """
    with scratch_directory() as place:
        (place / "request.json").write_text(json.dumps(request))
        status = run_child(
            (sys.executable, "-P", "-m", module, str(place)),
            place,
            environment=environment(HOME=str(place)),  # where a login of the hub's may lie
            while_waiting=while_waiting,
            seconds=WALL_SECONDS,
        )
        if status is None or status == -signal.SIGXCPU:
            raise LimitExceeded("time")
        if status in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT):  # as native code ends without memory
            raise LimitExceeded("memory")
        if status != 0:
            raise RuntimeError(f"{module} ends with {status}: {(place / 'log').read_text(errors='replace')[-1000:]}")
        answer: dict[str, Any] = json.loads((place / "answer.json").read_text())
    if "exceeded" in answer:
        raise LimitExceeded(answer["exceeded"])
    return answer


def serve(place: Path, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the process of its own: answer the request in a directory, within the limits."""
    end_with_parent()
    request = json.loads((place / "request.json").read_text())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (ANSWER_BYTES, ANSWER_BYTES))
    try:
        with limits():
            content = json.dumps(work(request))
            if len(content) > ANSWER_BYTES:
                raise MemoryError
    except MemoryError:
        content = json.dumps({"exceeded": "memory"})
    (place / "answer.json").write_text(content)


@contextlib.contextmanager
def limits(seconds: int = CPU_SECONDS, memory: int = MEMORY_BYTES) -> Iterator[None]:
    """Let this process take no more than so much time of the processor, and memory, from now on.

    Whoever takes longer dies of SIGXCPU; for memory there is a `MemoryError`. Where the system has no limit of memory
    (macOS), that of time alone holds.
    """
    before = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)}
    _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + seconds)
    with contextlib.suppress(ValueError, OSError):
        _limit(resource.RLIMIT_AS, _address_space() + memory)
    try:
        yield
    finally:
        for kind, known in before.items():
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, known)


def _limit(kind: int, wanted: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _address_space() -> int:
    """Bytes of address space that this process has mapped.

    Raises:
        OSError: The system does not say.
    """
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
