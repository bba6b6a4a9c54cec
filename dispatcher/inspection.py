"""`gemma-export inspect`: asks the exporter, in a process of its own, what it would do; nothing here loads torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dispatcher.errors import ExportError

SHOWN_TENSORS = 12
MIB = 1 << 20


def inspected(adapter: Path, base: str | None) -> dict[str, Any]:
    """The exporter's report (see `exporter.inspection`).

    Raises:
        ExportError: The exporter could not be run.
    """
    command = [sys.executable, "-m", "exporter", "--inspect", str(adapter), *(["--base", base] if base else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise ExportError(
            f"the exporter ended with code {done.returncode} and no report: is gemma-export[exporter] installed here?"
        ) from error
    return report


def told(report: dict[str, Any]) -> str:
    """A report for people."""
    lines = [f"adapter   {report.get('adapter')} ({report.get('peft_type')})", f"base      {report.get('base')}"]
    if report["outcome"] == "refused":
        return "\n".join([*lines, f"refused   {report['code']}: {report['message']}"])
    if report["outcome"] == "passthrough":
        return "\n".join([lines[0], "published as it is: this is a whole model, and no adapter"])
    counts = ", ".join(f"{number} {operation}" for operation, number in report["tensors"].items() if number)
    lines.append(f"tensors   {counts}")
    for tower, found in report["towers"].items():
        lines.append(
            f"  {tower:<8}{', '.join(f'{number} {operation}' for operation, number in found.items() if number)}"
        )
    if report["mapped_to_tower"]:
        lines.append(f"tower     the adapter's names are taken for those of {report['mapped_to_tower']}")
    if report["untied"]:
        lines.append("head      gets a tensor of its own: the output is no longer tied to its embedding")
    lines.append(
        f"writes    {report['bytes'] / MIB:,.1f} MiB, in about {report['memory_bytes'] / MIB:,.0f} MiB of memory"
    )
    uses = list(report["adapter_tensors"].items())
    for name, use in uses[:SHOWN_TENSORS]:
        lines.append(f"  {name}: {use['operation']} {', '.join(use['tensors'])}".rstrip())
    if len(uses) > SHOWN_TENSORS:
        lines.append(f"  … and {len(uses) - SHOWN_TENSORS} more; --json shows all")
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {operation}" for operation, number in counts.items() if number)
