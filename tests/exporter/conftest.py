"""What the exporter's tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exporter.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.records.close()
