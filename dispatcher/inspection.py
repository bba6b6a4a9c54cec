"""`gemma-export inspect`: asks the exporter, in a process of its own, what it would do; nothing here loads torch."""

import json
import subprocess
from pathlib import Path
from typing import Any

from dispatcher.errors import ExportError
from dispatcher.runner import EXPORTER

SHOWN_TENSORS = 12
MIB = 1 << 20


def inspected(adapter: Path, base: str | None) -> dict[str, Any]:
    """The exporter's report (see `exporter.inspection`).

    Raises:
        ExportError: The exporter could not be run.
    """
    command = [*EXPORTER, "--inspect", str(adapter), *(["--base", base] if base else [])]
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
    if report["outcome"] == "reference_engine":
        told = f"{report['message']} With --engine auto, which is the default, a reference engine merges it"
        return "\n".join([*lines, f"{told}, if there is the memory for the whole model."])
    if report["outcome"] == "passthrough":
        return "\n".join([lines[0], "published as it is: this is a whole model, and no adapter"])
    lines.append(f"tensors   {_counted(report['tensors'])}")
    lines += [f"  {tower}: {_counted(found)}" for tower, found in report["towers"].items()]
    if report["mapped_to_tower"]:
        lines.append(f"tower     the adapter's names are taken for those of {report['mapped_to_tower']}")
    if report["untied"]:
        lines.append("head      gets a tensor of its own: the output is no longer tied to its embedding")
    memory = f"in about {report['memory_bytes'] / MIB:,.0f} MiB of memory beyond Python and torch"
    lines.append(f"writes    {report['bytes'] / MIB:,.1f} MiB, {memory}")
    uses = list(report["adapter_tensors"].items())
    for name, use in uses[:SHOWN_TENSORS]:
        lines.append(f"  {name}: {use['operation']} {', '.join(use['tensors'])}".rstrip())
    if len(uses) > SHOWN_TENSORS:
        lines.append(f"  … and {len(uses) - SHOWN_TENSORS} more; --json shows all")
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {operation}" for operation, number in counts.items() if number)
