"""The implementations that each port's one suite runs over; another one is one more parameter here."""

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dispatcher.artifacts import ArtifactStore, open_artifacts
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.records import RecordStore, open_records
from dispatcher.tokens import TokenStore, open_tokens
from infra.local.secret_manager import LocalSecretManager
from infra.local.storage import StorageProxy
from tests.buckets import new_bucket
from tests.ports.storing import CHUNK_BYTES, QUICK


@pytest.fixture(params=["sqlite", "firestore"])
def records_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty record store of each kind."""
    if request.param == "sqlite":
        return f"sqlite://{tmp_path / 'records.db'}"
    request.getfixturevalue("firestore_server")
    return f"firestore://project-{secrets.token_hex(6)}/(default)"


@pytest.fixture
def open_again(records_url: str) -> Iterator[Callable[[], RecordStore]]:
    """Opens one and the same record store, each time as another process would."""
    opened: list[RecordStore] = []

    def open_store() -> RecordStore:
        opened.append(open_records(records_url))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


@pytest.fixture
def stored_job(records_url: str) -> Callable[[str], object]:
    """Reads a training job's whole document, behind the store's back."""

    def read(job_id: str) -> object:
        parts = urlsplit(records_url)
        if parts.scheme == "sqlite":
            with closing(sqlite3.connect(parts.path)) as database:
                query = "SELECT document FROM training_jobs WHERE job_id = ?"
                return json.loads(database.execute(query, (job_id,)).fetchone()[0])
        from google.cloud import firestore

        with closing(firestore.Client(project=parts.netloc)) as client:
            return client.collection("training_jobs").document(job_id).get().to_dict()

    return read


@pytest.fixture
def records(open_again: Callable[[], RecordStore]) -> RecordStore:
    return open_again()


@pytest.fixture(params=["file", "gs"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "file":
        return open_artifacts((tmp_path / "artifacts").as_uri())
    return open_artifacts(f"gs://{request.getfixturevalue('bucket')}")


@pytest.fixture
def bucket(storage_server: str) -> str:
    """The name of an empty bucket."""
    return new_bucket()


@pytest.fixture
def cloud(storage_proxy: StorageProxy) -> Iterator[StorageProxy]:
    """Cloud Storage, whose faults and requests are the test's own."""
    storage_proxy.heal()
    yield storage_proxy
    storage_proxy.heal()


@pytest.fixture
def store(cloud: StorageProxy, bucket: str) -> ArtifactStore:
    """Artifacts in Cloud Storage, with small requests that are soon tried again."""
    return GcsArtifacts(bucket, retry=QUICK, chunk_bytes=CHUNK_BYTES)


@pytest.fixture(params=["file", "secretmanager"])
def tokens(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TokenStore]:
    if request.param == "file":
        yield open_tokens((tmp_path / "tokens").as_uri(), ttl_seconds=3600)
        return
    with LocalSecretManager("project").serving() as address:
        yield open_tokens(f"secretmanager://project?emulator={address}", ttl_seconds=3600)
