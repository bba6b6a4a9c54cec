"""`python -m infra.images`: the install steps of both images, without Docker, and then what was installed at work.

The very commands of the Dockerfiles are run in a fresh directory (`infra.images_build` says what differs), for the
dispatcher and for the exporter's CPU variant; of the GPU variant nothing can be run where there are no CUDA and no
Ubuntu. It takes Linux, as the images do: GNU's `cp`, and for root `setpriv`. Only the standard library is imported.
"""

import argparse
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from infra.images_build import Build
from infra.images_context import Context
from infra.images_dockerfile import DockerfileError
from infra.images_report import Report, StepFailed, say
from infra.images_run import check_dispatcher, check_exporter

ROOT = Path(__file__).parents[1]
SECONDS = 1800


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and run what is named; 1 where a step fails."""
    parser = argparse.ArgumentParser(prog="python -m infra.images", description="Both images' steps, without Docker.")
    parser.add_argument("image", nargs="*", choices=["dispatcher", "exporter", []], help="default: both")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it (default: %(default)s)")
    parser.add_argument("--build-llama-cpp", action="store_true", help="even if this machine has it built already")
    args = parser.parse_args(arguments)
    if lacking := _lacking():
        say(f"images: {lacking}")
        return 1
    signal.signal(signal.SIGTERM, _terminated)
    with tempfile.TemporaryDirectory(prefix="gemma-export-images-") as temporary:
        # Whoever the image's user is has to get in.
        Path(temporary).chmod(0o755)
        report = Report(Path(temporary, "step.log"), seconds=args.seconds)
        say(f"with Python {platform.python_version()}, in {temporary}")
        try:
            for image in args.image or ["dispatcher", "exporter"]:
                if image == "dispatcher":
                    _dispatcher(Path(temporary), report)
                else:
                    _exporter(Path(temporary), report, cache=not args.build_llama_cpp)
        except (StepFailed, DockerfileError, RuntimeError) as error:
            say(f"\nimages: {error}")
            return 1
        say(f"\nimages: {report.steps} steps in {report.seconds():.0f} s, all well")
    return 0


def _lacking() -> str | None:
    """What this machine has not that it takes."""
    if platform.system() != "Linux":
        return f"this is {platform.system()}: run it on Linux, which the images are of, or in a container"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "root cannot become the images' user: install setpriv (util-linux), or run it as another user"
    return None


def _dispatcher(directory: Path, report: Report) -> None:
    dockerfile = ROOT / "dispatcher" / "Dockerfile"
    image = Build(dockerfile, Context(ROOT), directory / "dispatcher", report).run()
    check_dispatcher(image, report, ROOT)


def _exporter(directory: Path, report: Report, *, cache: bool) -> None:
    dockerfile = ROOT / "exporter" / "Dockerfile"
    # Building llama.cpp takes minutes, and `make setup` has done it: the same sdist by the same commands.
    machine = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = {"CACHE": machine} if cache else {}
    arguments = {"VARIANT": "cpu"}
    image = Build(dockerfile, Context(ROOT), directory / "exporter", report, arguments=arguments, kept=kept).run()
    check_exporter(image, report, ROOT)


def _terminated(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
