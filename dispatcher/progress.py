"""Shows an export on its way: a bar for people, a JSON object a line for programs."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Show = Callable[[dict[str, Any]], None]


@contextmanager
def shown(export_id: str, *, as_json: bool) -> Iterator[Show]:
    """What to call with each status of an export: prints lines on stdout, or draws a bar on stderr."""
    if as_json:
        yield lambda document: print(json.dumps(document), flush=True)  # noqa: T201  # this is the output
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(export_id, total=1.0)

        def show(document: dict[str, Any]) -> None:
            stage = document["stage"] or document["state"]
            progress.update(task, completed=document["progress"], description=f"{export_id}: {stage}")

        yield show
