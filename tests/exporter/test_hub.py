"""A base model from the hub: the real client against a hub on loopback, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher.artifacts import path_of
from dispatcher.contract import ExportRecord, State
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.tokens import FileTokens
from tests.exporter.exporting import merged_into, merged_record, training_document
from tests.exporter.hub import COMMIT, TOKEN, Hub, hub_serving
from tests.gemmas import assert_same_tensors, file_tensors, make_adapter, save_base


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    model = save_base("gemma3_text", tmp_path / "hub", shard_bytes=6000)
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    with hub_serving(tmp_path / "hub") as hub:
        yield hub


def environment(hub: Hub, root: Path) -> dict[str, str]:
    """What points the real client at the hub on loopback."""
    return {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "GEMMA_EXPORT_HOME": str(root / "home"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(root / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }


def run(hub: Hub, root: Path, *, token: str | None = None) -> tuple[int, ExportRecord, str]:
    """Export from the hub; the exit code, the record, and everything that was printed."""
    records = SqliteRecords(root / "home" / "records.db")
    assert records.put_job("job-1", training_document("google/tiny", root / "adapter"))
    ref = FileTokens(root / "home" / "tokens").put("job-1.merged", token) if token else None
    assert records.create_export(merged_record(token_ref=ref))
    done = subprocess.run(
        [sys.executable, "-m", "exporter", "job-1"],
        env=environment(hub, root),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    record = records.get_export("job-1.merged")
    records.close()
    assert record is not None
    return done.returncode, record, done.stdout + done.stderr


def test_a_base_from_the_hub_merges_like_one_in_a_directory(hub: Hub, tmp_path: Path) -> None:
    """By its commit, with the caller's token in no place but the header; a pickle is never fetched."""
    hub.gated = True
    (hub.directory / "pytorch_model.bin").write_bytes(b"pickle")
    code, record, printed = run(hub, tmp_path, token=TOKEN)
    assert code == 0, printed
    merged = path_of(record.artifacts[0].uri)
    assert json.loads((merged / "export.json").read_text())["base"] == {"id": "google/tiny", "revision": COMMIT}
    local = merged_into(tmp_path / "hub", tmp_path / "adapter", tmp_path / "store")
    assert_same_tensors(file_tensors(merged), file_tensors(local))
    assert f"Bearer {TOKEN}" in hub.authorizations
    assert TOKEN not in printed
    assert not any(TOKEN in path or path.endswith(".bin") for path in hub.paths)


OPEN_EACH = """
import json, sys
from dispatcher.errors import ExportError
from exporter.sources import open_base
for model_id, revision, token in json.loads(sys.argv[1]):
    try:
        open_base(model_id, revision, lambda: token)
    except ExportError as error:
        print(json.dumps([error.error_code, error.message]))
    else:
        print(json.dumps(["opened", ""]))
"""


def opened(hub: Hub, root: Path, *wanted: tuple[str, str | None, str | None]) -> list[tuple[str, str]]:
    """What opening each (model id, revision, token) ends with, in one process: code and message."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_EACH, json.dumps(wanted)],
        env=environment(hub, root),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [(code, message) for code, message in map(json.loads, done.stdout.splitlines())]


def test_what_the_hub_refuses_is_named(hub: Hub, tmp_path: Path) -> None:
    answers = opened(
        hub,
        tmp_path,
        ("google/tiny", None, None),
        ("google/tiny", COMMIT, TOKEN),
        ("google/unknown", None, None),
        ("google/tiny", "v9", None),
        ("not a repo", None, None),
        ("google/tiny", None, "hf_wrongTokenOfBob"),
    )
    codes = ["opened", "opened", "base_missing", "base_missing", "base_missing", "hub_token_invalid"]
    assert [code for code, _ in answers] == codes
    assert not any("hf_wrong" in message for _, message in answers)


def test_a_gated_base_needs_the_callers_own_token_even_when_it_is_cached(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    answers = opened(hub, tmp_path, ("google/tiny", None, TOKEN), ("google/tiny", None, None))
    assert [code for code, _ in answers] == ["opened", "base_gated"]
    assert "hf_token" in answers[1][1]


def test_a_hub_that_is_down_is_a_passing_fault(hub: Hub, tmp_path: Path) -> None:
    hub.broken = True
    code, record, printed = run(hub, tmp_path)
    assert code == 75, printed
    assert record.state is State.QUEUED
