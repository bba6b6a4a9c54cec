"""A disk that is full in the middle of an export: everything on a small file system, nearly all of it taken."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from tests.chaos.aftermath import tree_of
from tests.chaos.deployment import JOB, Deployment
from tests.chaos.endured import Case, Files, endured, told
from tests.chaos.faults import Dice
from tests.chaos.user import User

DISK_BYTES = 24 << 20
ROOM_BYTES = 40 << 10
"""What is left once an exporter begins its first file: enough for records, and for no tokenizer"""
LEASE_SECONDS = 5
"""Short, since the verdict may find no room either while another export fills it, and the lease has to run out then"""
REPOSITORY = Path(__file__).parents[2]


class NoMountError(Exception):
    """This machine allows no mount in a namespace of its own."""


def measure(root: Path, models: Path, wanted: Files) -> Case:
    """Export onto a full disk, of which room is made then.

    Args:
        root: An empty directory, where the disk is mounted, in a namespace that ends with it.
        models: Where `base` and `adapter` lie.
        wanted: What is to lie there in the end.

    Raises:
        NoMountError: There can be no such disk here.
        RuntimeError: The run broke off.
    """
    mount = f"mount -t tmpfs -o size={DISK_BYTES} tmpfs '{root}'"
    probe = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False)  # noqa: S607
    if probe.returncode != 0:
        raise NoMountError(f"this machine allows no mount in a namespace of its own: {probe.stderr.decode().strip()}")
    command = [sys.executable, "-m", "tests.chaos.full_disk", str(root), str(models), json.dumps(wanted)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command],  # noqa: S607
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return Case(**json.loads(done.stdout))


def files_of(root: Path) -> Files:
    """What lies in a deployment's artifact store of one job, by root and path."""
    return {
        f"{top.name}/{name}": digest
        for top in sorted((root / "artifacts").iterdir())
        for name, digest in tree_of(top / JOB).items()
    }


def main() -> int:
    """Inside: the disk is mounted at the first argument."""
    root, models, wanted = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    ballast, filling, filled = root / "ballast", threading.Lock(), threading.Event()
    deployment = Deployment(root, models, Dice(0, 0), lease_seconds=LEASE_SECONDS)

    def fill() -> None:
        with filling:
            if not filled.is_set():
                filled.set()
                room = os.statvfs(root)
                with ballast.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - ROOM_BYTES)

    def lasts(user: User, case: Case) -> None:
        assert deployment.settled()
        told(user, case)
        ballast.unlink()

    deployment.on_write = fill
    case = endured("a full disk", deployment, lasts=lasts, files=lambda: files_of(root), wanted=wanted)
    print(json.dumps(asdict(case)))  # noqa: T201  # this is the output
    return 0


if __name__ == "__main__":
    sys.exit(main())
