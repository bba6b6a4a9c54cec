"""What is around the exporter gives out in the middle of an export: the disk, the bucket, the records."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

from rich.console import Console

from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.published import MANIFEST_NAME, ROOTS
from dispatcher.records import open_records
from infra.local.storage import StorageProxy, storage_proxy
from tests.buckets import bucket_named, new_bucket
from tests.chaos import full_disk
from tests.chaos.crowd import firestore
from tests.chaos.deployment import Deployment
from tests.chaos.endured import Case, Files, endured, told
from tests.chaos.faults import Dice
from tests.chaos.full_disk import files_of
from tests.chaos.ports import make_models, undisturbed
from tests.chaos.rows import Row
from tests.chaos.tcp_proxy import tcp_proxy
from tests.chaos.user import User
from tests.ports.storing import CHUNK_BYTES, QUICK

STATUSES = (
    HTTPStatus.FORBIDDEN,
    HTTPStatus.PRECONDITION_FAILED,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
WRITTEN = 4
"""Uploads that get through before the bucket refuses"""
AWAY_SECONDS = 60.0
LEASE_SECONDS = 10
ALWAYS = 1 << 30
STORAGE, FIRESTORE = "STORAGE_EMULATOR_HOST", "FIRESTORE_EMULATOR_HOST"
"""Where Google's clients look for emulators"""


def measure(root: Path, console: Console, *, away: float = AWAY_SECONDS) -> list[Case]:
    """Let the disk, the bucket and the records give out, one after the other.

    Args:
        root: An empty directory.
        console: Told of each outage.
        away: How many seconds the records are away.
    """
    models = root / "models"
    make_models(models)
    undisturbed(root / "undisturbed", models)
    wanted = files_of(root / "undisturbed")
    cases: list[Case] = []

    def add(case: Case) -> None:
        console.print(f"{case.what}: {'; '.join(case.during)}; {case.seconds:.1f} s to the end", markup=False)
        cases.append(case)

    (root / "disk").mkdir()
    try:
        add(full_disk.measure(root / "disk", models, wanted))
    except full_disk.NoMountError as error:
        add(Case("a full disk", [str(error)], clear=False))
    with storage_proxy(root / "objects") as proxy, variable(STORAGE, proxy.url):
        calm = Bucket(root / "calm", models, proxy)
        calm.endured(None, None)
        for status in STATUSES:
            add(Bucket(root / f"bucket-{status}", models, proxy).endured(status, calm.files()))
    with firestore() as project:
        add(records_away(root / "records", models, project, away, wanted))
    return cases


def rows(outcome: list[Case]) -> list[Row]:
    """A clear record, a clean retry, nothing left over."""
    found = []
    for case in outcome:
        faults = [*case.different, *case.unexpected]
        ending = "completed" if case.completed else "NOT COMPLETED"
        measured = "; ".join([*case.during, f"then {ending} in {case.seconds:.1f} s, {len(faults)} faults"])
        goal = "a clear record, then completed, 0 faults"
        found.append(Row(case.what, "\n".join([measured, *faults[:3]]), goal, case.is_good))
    return found


class Bucket:
    """A deployment whose artifacts are in a bucket of its own.

    Args:
        root: Where everything else is.
        models: Where `base` and `adapter` lie; the adapter is copied to the bucket.
        proxy: Cloud Storage.
    """

    def __init__(self, root: Path, models: Path, proxy: StorageProxy) -> None:
        self._proxy = proxy
        self._name = new_bucket()
        for path in (models / "adapter").iterdir():
            bucket_named(self._name).blob(f"adapter/{path.name}").upload_from_filename(path)
        self._deployment = Deployment(
            root,
            models,
            Dice(0, 0),
            lease_seconds=30,
            artifacts=GcsArtifacts(self._name, retry=QUICK.with_timeout(1), chunk_bytes=CHUNK_BYTES),
            adapter=f"gs://{self._name}/adapter",
        )

    def endured(self, status: HTTPStatus | None, wanted: Files | None) -> Case:
        """Whatever is written gets this answer, after some that gets through; None is no outage."""
        if status is not None:
            self._proxy.fail(status, "POST", f"/b/{self._name}/o?", skip=WRITTEN, times=ALWAYS)

        def lasts(user: User, case: Case) -> None:
            assert self._deployment.settled()
            if status is not None:
                told(user, case)
            self._proxy.heal()

        what = f"a bucket that answers {status}" if status is None else f"a bucket that answers {status.value}"
        return endured(what, self._deployment, lasts=lasts, files=self.files, wanted=wanted)

    def files(self) -> Files:
        """Every object under the roots of artifacts; of a manifest, which says where the adapter lies, the name."""
        blobs = [blob for root in ROOTS.values() for blob in bucket_named(self._name).list_blobs(prefix=f"{root}/")]
        return {
            blob.name: "" if blob.name.endswith(MANIFEST_NAME) else f"{blob.size} bytes, {blob.crc32c}"
            for blob in blobs
        }


def records_away(root: Path, models: Path, project: str, away: float, wanted: Files) -> Case:
    """Records in Firestore, which nobody reaches for a while from the first file on that an exporter begins.

    Args:
        root: Where everything else is.
        models: Where `base` and `adapter` lie.
        project: Of the emulator that the environment names.
        away: For how many seconds.
        wanted: What is to lie in the artifact store in the end.
    """
    with tcp_proxy(os.environ[FIRESTORE]) as proxy:
        with variable(FIRESTORE, proxy.address):
            records = open_records(f"firestore://{project}/(default)")
        root.mkdir()
        deployment = Deployment(
            root, models, Dice(0, 0), lease_seconds=LEASE_SECONDS, records=records, delays=(0.2, 30.0)
        )
        begun = threading.Event()

        def cut() -> None:
            if not begun.is_set():
                proxy.away.set()
                begun.set()

        deployment.on_write = cut

        def lasts(user: User, case: Case) -> None:
            assert begun.wait(60)
            over = time.monotonic() + away
            while (began := time.monotonic()) < over:
                said = user.look("merged")
                took = time.monotonic() - began
                if said is None and not case.during:
                    case.during.append(f"GET is answered with 503 after {took:.1f} s")
                time.sleep(min(1.0, max(0.0, over - time.monotonic())))
            proxy.away.clear()

        return endured(
            f"records that are away for {away:g} s",
            deployment,
            lasts=lasts,
            files=lambda: files_of(root),
            wanted=wanted,
        )


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
