"""Several quantizations of one job: made in one pass over the base, and each goes its own way otherwise."""

import json
import logging
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from dispatcher.artifacts import ArtifactWriter, path_of
from dispatcher.contract import ExportRecord, ExportType, State
from dispatcher.errors import StorageFull
from dispatcher.lifecycle import Actor
from dispatcher.local_artifacts import LocalArtifacts
from exporter.job import ExitCode
from tests.exporter.exporting import export_gguf_of, file_of, gguf_record
from tests.exporter.place import Place
from tests.gemmas.llama import llama_adapter, llama_base
from tests.waiting import until

FIRST, SECOND = "job-1.gguf.q8_0", "job-1.gguf.q4_k_m"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and adapter."""
    directory = tmp_path_factory.mktemp("models")
    llama_adapter("gemma3_text", llama_base("gemma3_text", directory / "base"), directory / "adapter")
    return directory


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What each file is when nobody shares."""
    store = tmp_path_factory.mktemp("alone")
    made = {
        record_id: export_gguf_of(models / "base", models / "adapter", store, [record_id.rpartition(".")[2]])[0]
        for record_id in (FIRST, SECOND)
    }
    return {record_id: file_of(result).read_bytes() for record_id, result in made.items()}


@pytest.fixture
def place(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Place]:
    """With two quantizations in the queue."""
    caplog.set_level(logging.INFO)
    place = Place(tmp_path, models)
    for quantization in ("q8_0", "q4_k_m"):
        assert place.records.create_export(gguf_record(quantization))
    yield place
    place.records.close()


def passes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The files of each pass over a base."""
    said = [record.getMessage() for record in caplog.records]
    return [line.partition("one pass over the base for ")[2] for line in said if "one pass over" in line]


def content(record: ExportRecord) -> bytes:
    """The bytes of a finished export's file."""
    assert record.state is State.COMPLETED
    assert record.path is not None
    return path_of(record.path).read_bytes()


class Disturbed(LocalArtifacts):
    """A store that does something when half of a file is written."""

    def __init__(self, root: Path, name: str, disturb: Callable[[], object]) -> None:
        super().__init__(root)
        self.name, self.disturb = name, disturb

    def create(self, path: str, *, size: int | None = None) -> ArtifactWriter:
        writer = super().create(path, size=size)
        if not path.endswith(self.name):
            return writer
        disturb, half = self.disturb, (size or 0) // 2

        class Writer:
            written = 0

            def write(self, data: bytes | bytearray | memoryview) -> None:
                before, self.written = self.written, self.written + len(data)
                if before <= half < self.written:
                    disturb()
                writer.write(data)

            commit = staticmethod(writer.commit)
            discard = staticmethod(writer.discard)

        return Writer()


def test_each_gets_its_own_record_and_the_base_is_read_once(
    place: Place, alone: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """And the files are those that each would be by itself."""
    assert place.run() is ExitCode.DONE
    for export_id, expected in alone.items():
        record = place.record(export_id)
        assert content(record) == expected
        assert record.summary["file"].endswith(f"-{str(record.quantization).upper()}.gguf")
    (files,) = passes(caplog)
    assert sorted(files.split(", ")) == ["base-Q4_K_M.gguf", "base-Q8_0.gguf"]
    document = training_document_of(place)
    assert document["gguf_path"] == document["artifacts"]["file"]["gguf"]
    assert document["gguf_path"] in {place.record(export_id).path for export_id in alone}


def training_document_of(place: Place) -> dict[str, Any]:
    """What the training job's document is now."""
    with closing(sqlite3.connect(place.root / "records.db")) as connection:
        (text,) = connection.execute("SELECT document FROM training_jobs").fetchone()
    document: dict[str, Any] = json.loads(text)
    return document


@pytest.mark.parametrize(("cancelled", "other"), [(FIRST, SECOND), (SECOND, FIRST)])
def test_one_that_is_cancelled_ends_alone(
    cancelled: str, other: str, place: Place, alone: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Halfway through its file, whichever of them leads."""

    def cancel() -> None:
        place.record_change(State.CANCELLED, Actor.CALLER, cancelled)
        until(lambda: len([t for t in threading.enumerate() if t.name == "heartbeat"]) == 1, "its heartbeat to end")

    name = cancelled.rpartition(".")[2].upper() + ".gguf"
    place.stores = replace(place.stores, artifacts=Disturbed(place.root / "artifacts", name, cancel))
    assert place.run() is ExitCode.DONE
    assert place.record(cancelled).state is State.CANCELLED
    assert content(place.record(other)) == alone[other]
    assert [file for file in place.files() if file.endswith(name)] == []
    assert len(passes(caplog)) == 1


def test_one_that_finds_no_room_fails_alone(place: Place, alone: dict[str, bytes]) -> None:
    """With nothing of its own left."""

    def fill() -> None:
        raise StorageFull("no room left")

    place.stores = replace(place.stores, artifacts=Disturbed(place.root / "artifacts", "Q8_0.gguf", fill))
    assert place.run() is ExitCode.FAILED
    error = place.record(FIRST).error
    assert error is not None
    assert error.code == "storage_full"
    assert content(place.record(SECOND)) == alone[SECOND]
    assert [file for file in place.files() if file.endswith("Q8_0.gguf")] == []


def test_all_that_fail_end_the_pass(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is left to read the base for."""

    def fill() -> None:
        raise StorageFull("no room left")

    place.stores = replace(place.stores, artifacts=Disturbed(place.root / "artifacts", ".gguf", fill))
    assert place.run() is ExitCode.FAILED
    assert [place.record(export_id).state for export_id in (FIRST, SECOND)] == [State.FAILED] * 2
    assert place.files() == []
    assert len(passes(caplog)) == 1


def test_one_that_is_finished_already_is_not_waited_for(
    place: Place, alone: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """As after a crash between its manifest and its record: it takes no part in the pass."""
    assert place.run(export_type=ExportType.GGUF, quantization="q8_0") is ExitCode.DONE
    place.record_change(State.QUEUED, Actor.OPERATOR, FIRST)
    assert place.run() is ExitCode.DONE
    assert content(place.record(FIRST)) == alone[FIRST]
    assert content(place.record(SECOND)) == alone[SECOND]
    assert passes(caplog) == ["base-Q8_0.gguf", "base-Q4_K_M.gguf"]


def test_one_that_cannot_be_made_does_not_keep_the_others(place: Place, alone: dict[str, bytes]) -> None:
    """Of a record that no request makes."""
    assert place.records.create_export(gguf_record("iq2_xs"))
    assert place.run() is ExitCode.FAILED
    error = place.record("job-1.gguf.iq2_xs").error
    assert error is not None
    assert error.code == "quantization_unknown"
    for export_id, expected in alone.items():
        assert content(place.record(export_id)) == expected


def test_a_type_that_does_not_hold_the_weights_fails_alone(models: Path, tmp_path: Path) -> None:
    """1e5 is in bfloat16's range and in q8_0's, and not in half precision's."""
    shutil.copytree(models, tmp_path / "models")
    weights = tmp_path / "models" / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    place = Place(tmp_path, tmp_path / "models")
    for quantization in ("f16", "bf16"):
        assert place.records.create_export(gguf_record(quantization))
    assert place.run() is ExitCode.FAILED
    error = place.record("job-1.gguf.f16").error
    assert error is not None
    assert (error.code, error.retryable) == ("gguf_overflow", False)
    assert "bf16" in error.message
    assert place.record("job-1.gguf.bf16").state is State.COMPLETED
    assert not [file for file in place.files() if file.endswith("-F16.gguf")]
    place.records.close()
