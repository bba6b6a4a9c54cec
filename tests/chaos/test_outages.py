"""A short version of what `make chaos` does with outages."""

import os
from http import HTTPStatus
from pathlib import Path

import pytest

from infra.local.storage import StorageProxy
from tests.chaos import full_disk
from tests.chaos.full_disk import NoMountError, files_of
from tests.chaos.outages import Bucket, records_away
from tests.chaos.ports import make_models, undisturbed

AWAY_SECONDS = 3.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma, an adapter for it, and beside them an export of both in which nothing failed."""
    models = tmp_path_factory.mktemp("outages") / "models"
    make_models(models)
    undisturbed(models.parent / "undisturbed", models)
    return models


def test_a_full_disk_is_recorded_and_asking_again_with_room_completes(models: Path, tmp_path: Path) -> None:
    """The disk holds everything, the records too; nothing of the attempt that failed is left."""
    try:
        case = full_disk.measure(tmp_path, models, files_of(models.parent / "undisturbed"))
    except NoMountError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    assert case.is_good, case
    assert any("storage_full, retryable False" in said for said in case.during), case


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (HTTPStatus.FORBIDDEN, "failed, permission_denied, retryable False"),
        (HTTPStatus.SERVICE_UNAVAILABLE, "failed, unavailable, retryable True"),
    ],
)
def test_a_bucket_that_refuses_is_recorded_and_asking_again_completes(
    models: Path, tmp_path: Path, storage_proxy: StorageProxy, status: HTTPStatus, said: str
) -> None:
    """With the very files of an export that met no refusal, and no others."""
    calm = Bucket(tmp_path / "calm", models, storage_proxy)
    assert calm.endured(None, None).is_good
    case = Bucket(tmp_path / "refusing", models, storage_proxy).endured(status, calm.files())
    assert case.is_good, case
    assert case.during == [f"{kind} {said}" for kind in ("merged", "gguf.q8_0")]


def test_records_that_are_away_for_a_while_lose_nothing(models: Path, tmp_path: Path, firestore_server: str) -> None:
    """Status requests are answered with 503 meanwhile."""
    wanted = files_of(models.parent / "undisturbed")
    case = records_away(tmp_path / "place", models, "outages", AWAY_SECONDS, wanted)
    assert case.is_good, case
