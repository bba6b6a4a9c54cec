"""A world per test, and a deployment."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.storage import StorageProxy
from tests.dispatcher.deployed import Deployed, deployed
from tests.dispatcher.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def deployment(
    tmp_path: Path, firestore_server: str, pubsub_server: str, storage_proxy: StorageProxy
) -> Iterator[Deployed]:
    """For doctor to look at; sound at first."""
    with deployed(tmp_path, firestore_server, pubsub_server, storage_proxy) as found:
        yield found
