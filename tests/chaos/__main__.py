"""`python -m tests.chaos`: makes the service's worst days happen, and prints what became of its exports."""

import argparse
import importlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import cast

from rich.console import Console

from tests.chaos.rows import Row, Section, table_of

SECTIONS = {
    "kills": "SIGKILL at random moments",
    "paused": "SIGSTOP across the end of a lease",
    "stops": "SIGTERM and cancellation at random moments",
    "ports": "ports that fail, time out after acting, or act twice",
    "crowd": "a thousand identical requests and deliveries at once",
    "outages": "a full disk, a refusing bucket, records that are away",
    "api": "requests made from the OpenAPI document",
}
"""Each is the module of this package by that name"""
LIMIT_MINUTES = 25


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--root", type=Path, default=Path(".chaos"), help="what is made lies here, and is removed")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no such part: {', '.join(unknown)}")

    console = Console(highlight=False)
    # No part may ask the hub of the world for anything: what it needs of one, it starts itself.
    os.environ["HF_HUB_OFFLINE"] = "1"
    began = time.monotonic()
    rows: list[tuple[str, Row]] = []
    for name in names:
        rows += [(name, row) for row in _run(name, options.root.absolute() / name, console)]
    minutes = (time.monotonic() - began) / 60
    whole = Row("all of it", f"{minutes:.1f} minutes", f"at most {LIMIT_MINUTES} minutes", minutes <= LIMIT_MINUTES)
    rows.append(("", whole))
    console.print(table_of(rows))
    return 0 if all(row.good for _, row in rows) else 1


def _run(name: str, root: Path, console: Console) -> list[Row]:
    """One section; one that breaks off misses, and keeps no other from running."""
    console.rule(f"{name}: {SECTIONS[name]}")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    began = time.monotonic()
    try:
        section = cast(Section, importlib.import_module(f"tests.chaos.{name}"))
        rows = section.rows(section.measure(root, console))
    except Exception as error:  # noqa: BLE001 an entry point: what went wrong is a line of the table
        console.print_exception()
        rows = [Row("runs to its end", f"{type(error).__name__}: {str(error)[:300]}", "it does", False)]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    console.print(f"{name}: {time.monotonic() - began:.0f} s")
    return rows


if __name__ == "__main__":
    sys.exit(main())
