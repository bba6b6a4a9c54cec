"""The exporter as Cloud Run's tasks between a gated hub and a bucket: killed, stopped, dealt out, and its token kept.

Real processes and servers; the model is tiny. `python -m tests.bench --formats killed,tasks` does the same at size.
"""

import random
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dispatcher.contract import State
from exporter.pipeline import worker_count
from infra.local.servers import MissingServerError
from infra.local.storage import Request
from tests.bench.deployment import ADAPTER, MANIFEST, Deployment
from tests.bench.inputs import Size, prepare
from tests.bench.leaks import is_used, leaks
from tests.bench.servers import Noted, noted_servers
from tests.conftest import missing
from tests.exporter.hub import OTHER_TOKEN, TOKEN

EIGHT = Size("eight", 8, 32, 64, 2, 1, 320, shard_bytes=24_000, head_dim=16)
SHARDS = 8
SECONDS = 120


@dataclass(frozen=True)
class Cloud:
    """A deployment, its servers, and what an undisturbed run made."""

    root: Path
    servers: Noted
    deployment: Deployment
    undisturbed: dict[str, str]

    def directory(self, job_id: str) -> str:
        """Where a job's artifact lies in the bucket."""
        version = next(iter(self.undisturbed)).partition("/")[0]
        return f"merged_models/{job_id}/{version}"

    def leftovers(self, job_id: str) -> list[str]:
        """What is in the bucket of a job, or of none, besides its artifact, kept bases and the adapter."""
        theirs = {"merged_models", "base_models", ADAPTER.partition("/")[0]}
        return [
            name
            for name in self.deployment.objects()
            if name.partition("/")[0] not in theirs
            or (name.startswith(f"merged_models/{job_id}/") and not name.startswith(f"{self.directory(job_id)}/"))
        ]

    def leaks(self) -> list[str]:
        """Where a token was found in all that was done so far."""
        return [place for token in (TOKEN, OTHER_TOKEN) for place in leaks(token, self.root, self.servers)]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    root = tmp_path_factory.mktemp("cloud")
    base, adapter = prepare(EIGHT, tmp_path_factory.mktemp("models"))
    assert len(list(base.glob("*.safetensors"))) == SHARDS
    try:
        with noted_servers(base, root / "objects", secret=TOKEN) as servers:
            servers.hub.gated = True
            settings = {"VERIFY_LOGITS": "never", "LEASE_SECONDS": "60"}
            deployment = Deployment(root, servers.hub.url, servers.storage.url, adapter, settings)
            deployment.submit("undisturbed", TOKEN)
            code = deployment.start("undisturbed").wait(SECONDS)
            assert code == 0, deployment.said("undisturbed")
            yield Cloud(root, servers, deployment, deployment.artifact("undisturbed"))
    except MissingServerError as error:
        missing(error)


@pytest.fixture(autouse=True)
def undone(cloud: Cloud) -> None:
    """No base is in the bucket, so that every test reads it from the hub and copies it."""
    cloud.deployment.delete("base_models/")
    cloud.servers.storage.forget()


class Disturbance:
    """Sends an attempt a signal when it has sent the bucket so many files, or one of a name.

    Args:
        number: Which signal.
        uploads: With which file.
        name: Or: with the file of this name.
    """

    def __init__(self, number: signal.Signals, uploads: int = 0, name: str = "") -> None:
        self._number = number
        self._uploads = uploads
        self._name = f'"{name}"'.encode() if name else b""
        self._seen = 0
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, request: Request) -> None:
        if request.method != "POST":
            return
        with self._lock:
            self._seen += 1
            if self.process and (self._seen == self._uploads or (self._name and self._name in request.body)):
                self.process.send_signal(self._number)


def shards_in(names: Counter[str]) -> dict[str, int]:
    """Of the weight files of artifacts, how often each is in there."""
    return {
        name.rpartition("/")[2]: count
        for name, count in names.items()
        if name.startswith("merged_models/") and name.endswith(".safetensors")
    }


def test_a_token_is_shown_to_the_hub_and_to_nobody_else(cloud: Cloud) -> None:
    """Of a gated base whose files come from another host."""
    assert is_used(TOKEN, cloud.servers)
    assert cloud.leaks() == []


def test_a_token_without_access_is_in_no_error_text(cloud: Cloud) -> None:
    """Neither what the process says nor what the record says has it."""
    cloud.deployment.submit("refused", OTHER_TOKEN)
    assert cloud.deployment.start("refused").wait(SECONDS) == 1
    error = cloud.deployment.record("refused").error
    assert error is not None
    assert error.code == "base_gated"
    assert cloud.leaks() == []


def test_a_leak_would_be_found(cloud: Cloud, tmp_path: Path) -> None:
    """The search is no better than what it looks at."""
    host = cloud.servers.hub.url.removeprefix("http://")
    assert "GET" in leaks(host, tmp_path, cloud.servers)[0]  # every request has it in a header
    (tmp_path / "log").write_text(f"asked with {TOKEN}")
    assert leaks(TOKEN, tmp_path, cloud.servers) == [str(tmp_path / "log")]


def test_killed_and_stopped_at_random_moments_it_ends_as_if_undisturbed(cloud: Cloud) -> None:
    """No finished shard is made again, an unfinished one once more, and nothing is left behind."""
    dice = random.Random(6)
    disturbances = [
        Disturbance(signal.SIGKILL, uploads=dice.randint(2, 7)),
        Disturbance(signal.SIGTERM, uploads=dice.randint(2, 7)),
        Disturbance(signal.SIGKILL, uploads=dice.randint(2, 7)),
        Disturbance(signal.SIGKILL, name=f"{cloud.directory('killed')}/{MANIFEST}"),
    ]
    codes = [-signal.SIGKILL, 75, -signal.SIGKILL, -signal.SIGKILL, 0]
    deployment, storage = cloud.deployment, cloud.servers.storage
    uploads: Counter[str] = Counter()
    finished: set[str] = set()
    deployment.submit("killed", TOKEN)
    for attempt, code in enumerate(codes):
        storage.forget()
        disturbance = disturbances[attempt] if attempt < len(disturbances) else None
        if disturbance:
            storage.before = disturbance
        process = deployment.start("killed", attempt=attempt)
        if disturbance:
            disturbance.process = process
        assert process.wait(SECONDS) == code, deployment.said("killed", attempt=attempt)
        storage.before = lambda request: None
        begun = shards_in(storage.begun)
        assert not finished & begun.keys()
        uploads.update(begun)
        markers = [name for name in deployment.objects("merged_models/killed/") if ".parts/" in name]
        finished |= {name.rpartition("/")[2].removesuffix(".json") for name in markers}
    assert deployment.artifact("killed") == cloud.undisturbed
    assert deployment.record("killed").state is State.COMPLETED
    assert SHARDS <= sum(uploads.values()) <= SHARDS + 3 * worker_count()
    assert cloud.leftovers("killed") == []
    assert cloud.leaks() == []


def test_four_tasks_make_the_artifact_of_one_and_each_shard_once(cloud: Cloud) -> None:
    """Started together, in processes of their own."""
    deployment = cloud.deployment
    deployment.submit("tasks", TOKEN)
    tasks = [deployment.start("tasks", index=index, count=4) for index in range(4)]
    codes = [task.wait(SECONDS) for task in tasks]
    assert codes == [0] * 4, [deployment.said("tasks", index=index) for index in range(4)]
    assert deployment.record("tasks").state is State.COMPLETED
    assert deployment.artifact("tasks") == cloud.undisturbed
    assert [*shards_in(cloud.servers.storage.begun).values()] == [1] * SHARDS
    assert cloud.leftovers("tasks") == []
    assert cloud.leaks() == []
