"""The commands that are measured, over one working directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from exporter import llama_cpp
from tests.bench.measure import Measurement, measured

CLI = (sys.executable, "-c", "from dispatcher.cli import main; main()")
JOB_ID = "bench"
MIB = 2**20
Results = dict[str, dict[str, list[Measurement]]]
"""Of each model, by its name, and each command, by its label: one measurement a run"""


class Bench:
    """The commands over one working directory, whose `out` is emptied before each model.

    Temporary files go to `out` too, so that they are on a disk and their writing is seen.
    """

    def __init__(self, root: Path) -> None:
        self.out = root / "out"
        self.home, self.copied, self.by_peft = (self.out / name for name in ("home", "copied", "peft"))
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "GEMMA_EXPORT_HOME": str(self.home),
            "TMPDIR": str(self.out / "tmp"),
        }

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        (self.out / "tmp").mkdir(parents=True)

    def copy(self, base: Path, adapter: Path) -> Measurement:
        return measured(["cp", "-r", str(base), str(self.copied)], self.environment)

    def export(self, base: Path, adapter: Path, *options: str) -> Measurement:
        """This engine, from the command line to the finished record, in a state of its own."""
        shutil.rmtree(self.home, ignore_errors=True)
        registration = [*CLI, "register", "--base", str(base), "--adapter", str(adapter), "--job-id", JOB_ID]
        subprocess.run(registration, env=self.environment, check=True, stdout=subprocess.DEVNULL)
        return measured([*CLI, "export", JOB_ID, *options, "--json"], self.environment)

    def export_merged(self, base: Path, adapter: Path) -> Measurement:
        return self.export(base, adapter, "--type", "merged")

    def peft(self, base: Path, adapter: Path) -> Measurement:
        return self._python("-m", "tests.bench.peft_merge", str(base), str(adapter), str(self.by_peft))

    def convert(self, out: Path, kind: str) -> Measurement:
        """llama.cpp's converter, on what PEFT merged."""
        converter = llama_cpp.home() / "convert_hf_to_gguf.py"
        return self._python(str(converter), str(self.by_peft), "--outfile", str(out), "--outtype", kind)

    def quantize(self, file: Path, out: Path, quantization: str) -> Measurement:
        """llama.cpp's quantizer."""
        return self._python("-m", "tests.bench.quantize", str(file), str(out), quantization)

    def exported(self, root: str = "merged_models") -> Path:
        """Where the finished export lies."""
        (version,) = (self.home / "artifacts" / root / JOB_ID).iterdir()
        return version

    def _python(self, *arguments: str) -> Measurement:
        return measured([sys.executable, *arguments], self.environment)


def seconds(runs: list[Measurement]) -> float:
    """The median wall time."""
    return median(run.seconds for run in runs)


def peak(runs: list[Measurement]) -> int:
    """The largest peak, in bytes."""
    return max(run.peak_bytes for run in runs)


def mib(size: float) -> str:
    return f"{size / MIB:.0f} MiB"
