"""`make fuzz`: each parser of strangers' bytes gets as many as it takes in FUZZ_SECONDS; a crash or a hang fails.

What was found is kept in `.fuzz/`, which begins empty: seeds are made by code.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fuzz.targets import MAX_BYTES

NAMES = ("header", "adapter", "documents")
TIMEOUT_SECONDS = 10
"""What one input may take: it is a hang if it takes longer"""
RSS_MB = 2048
"""A crash if it takes more; torch and transformers themselves take some 700"""
FAILED = ("crash", "leak", "oom", "timeout")
"""How libFuzzer's files of what it found begin"""


@dataclass(frozen=True)
class Outcome:
    """What became of one target."""

    name: str
    executions: int
    peak_mb: int
    found: list[Path]
    """Inputs that crash it, or hang"""
    status: int


def fuzz(name: str, seconds: int, place: Path) -> Outcome:
    """Run one target for so long, or to its first crash; what is found is left in `place`."""
    corpus, log = place / f"{name}-corpus", place / f"{name}.log"
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gemma-fuzz-") as scratch, log.open("wb") as said:
        options = {
            "max_total_time": seconds,
            "timeout": TIMEOUT_SECONDS,
            "rss_limit_mb": RSS_MB,
            "max_len": MAX_BYTES,
            "len_control": 0,
            "print_final_stats": 1,
            "artifact_prefix": f"{place.absolute()}/{name}-",
        }
        command = [sys.executable, "-m", "tests.fuzz.one", name, str(corpus.absolute())]
        command += [f"-{option}={value}" for option, value in options.items()]
        environment = {**os.environ, "TMPDIR": scratch, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        status = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    text = log.read_text(errors="replace")
    found = [path for kind in FAILED for path in sorted(place.glob(f"{name}-{kind}-*"))]
    return Outcome(name, _told(text, "number_of_executed_units"), _told(text, "peak_rss_mb"), found, status)


def _told(text: str, what: str) -> int:
    match = re.search(rf"stat::{what}:\s*(\d+)", text)
    return int(match[1]) if match else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=NAMES, metavar="TARGET", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=600, help="for each")
    parser.add_argument("--place", type=Path, default=Path(".fuzz"), help="where what is found is kept")
    options = parser.parse_args()
    if unknown := sorted({*options.targets} - {*NAMES}):
        parser.error(f"no such target: {', '.join(unknown)}")
    table = Table("parser", "inputs", "crashes", "hangs", "peak memory, MB", title=f"{options.seconds} s each")
    outcomes = [fuzz(name, options.seconds, options.place) for name in options.targets]
    for outcome in outcomes:
        hangs = sum(path.name.startswith(f"{outcome.name}-timeout-") for path in outcome.found)
        crashes = len(outcome.found) - hangs
        table.add_row(outcome.name, f"{outcome.executions:,}", str(crashes), str(hangs), str(outcome.peak_mb))
    console = Console()
    console.print(table)
    failed = [outcome for outcome in outcomes if outcome.status or outcome.found]
    for outcome in failed:
        log = options.place / f"{outcome.name}.log"
        console.print(f"{outcome.name} ended with {outcome.status}: see {log}", soft_wrap=True)
        console.print(*outcome.found, sep="\n", soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
