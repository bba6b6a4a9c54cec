"""A base model from the hub: the real client against a hub on loopback, in a process of its own."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dispatcher.artifacts import path_of
from dispatcher.contract import ExportRecord, State
from dispatcher.errors import ExportError, SourceError, Unavailable
from dispatcher.sqlite_records import SqliteRecords
from dispatcher.tokens import FileTokens
from exporter.byte_source import read_bytes
from exporter.hub import MAX_FILES, look_up
from infra.local.servers import free_port
from tests.exporter.exporting import merged_into, merged_record, training_document
from tests.exporter.hub import COMMIT, NARROW_TOKEN, OTHER_TOKEN, TOKEN, Hub, hub_serving, pointing_at
from tests.gemmas import assert_same_tensors, file_tensors, make_adapter, save_base

WRONG = "hf_wrongTokenOfBob"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    model = save_base("gemma3_text", tmp_path / "hub", shard_bytes=6000)
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    with hub_serving(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def nearby(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, for the client in this very process."""
    pointing_at(hub, monkeypatch, tmp_path / "cache")
    return hub


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
        ("google/unknown", None, TOKEN),
        ("google/tiny", "v9", None),
        ("not a repo", None, None),
        ("google/tiny", None, WRONG),
        ("google/unknown", None, WRONG),
        ("google/tiny", None, NARROW_TOKEN),
    )
    codes = ["opened", "opened", "base_missing", "base_missing", "base_revision_missing", "base_missing"]
    codes += ["hub_token_unneeded", "hub_token_invalid", "hub_token_forbidden"]
    assert [code for code, _ in answers] == codes
    assert not any("hf_wrong" in message for _, message in answers)


@pytest.mark.parametrize(
    ("change", "token", "code", "todo"),
    [
        ({"gated": True}, None, "base_gated", "no token was given"),
        ({"gated": True}, OTHER_TOKEN, "base_gated", "the account of this token has no access"),
        ({"gated": True}, WRONG, "hub_token_invalid", "POST again with a valid hf_token"),
        ({"gated": True, "expired": True}, TOKEN, "hub_token_invalid", "expired"),
        ({"expired": True}, TOKEN, "hub_token_unneeded", "deployment's HF_TOKEN"),
        ({"private": True}, None, "base_missing", "a private one needs an hf_token"),
        ({"private": True}, OTHER_TOKEN, "base_missing", "the account of this token may see"),
        ({"disabled": True}, TOKEN, "base_disabled", "choose another base"),
        ({"gated": True}, NARROW_TOKEN, "hub_token_forbidden", "lacks the permission"),
        ({"broken": True}, TOKEN, "hub_unavailable", "try again later"),
        ({"unlisted": True}, TOKEN, "base_unlisted", "HF_ENDPOINT"),
    ],
)
def test_each_refusal_says_what_to_do(
    nearby: Hub, change: dict[str, Any], token: str | None, code: str, todo: str
) -> None:
    """Of one that is gated, too, anybody gets the listing: it is a file that tells."""
    for name, value in change.items():
        setattr(nearby, name, value)
    with pytest.raises(ExportError) as raised:
        look_up("google/tiny", None, token)
    assert raised.value.error_code == code
    assert todo in raised.value.message
    assert "google/tiny" in raised.value.message
    assert "TokenOf" not in raised.value.message
    assert raised.value.retryable == (code == "hub_unavailable")


@pytest.mark.parametrize(
    "name",
    [
        *("../escaped.json", "a/../../escaped.json", "/escaped.json", "./config.json", "a//b.json", ""),
        *("..\\escaped.json", "a\nb.json", "a\0.json", "a" * 2000 + ".json"),
    ],
    ids=lambda name: repr(name[:20]),
)
def test_a_listing_of_names_that_lead_elsewhere_is_refused(nearby: Hub, name: str, tmp_path: Path) -> None:
    """Before anything is fetched by them; the message shows the name escaped, and cut."""
    nearby.listed = [{"rfilename": name, "size": 1}]
    with pytest.raises(SourceError) as raised:
        look_up("google/tiny", None, None)
    assert raised.value.error_code == "base_listing_invalid"
    assert repr(name[:200]) in raised.value.message
    assert len(raised.value.message) < 400
    assert not list(tmp_path.rglob("escaped.json"))


@pytest.mark.parametrize(
    "more",
    [
        [{"rfilename": "tokenizer.json", "size": 10**15}],
        [{"rfilename": f"{number}.txt", "size": 1} for number in range(MAX_FILES)],
    ],
    ids=["size", "number"],
)
def test_a_listing_of_what_no_model_has_is_refused(nearby: Hub, more: list[dict[str, Any]]) -> None:
    """A petabyte to be fetched whole; a hundred thousand files."""
    nearby.listed = more
    with pytest.raises(SourceError) as raised:
        look_up("google/tiny", None, None)
    assert raised.value.error_code == "base_listing_invalid"


def test_looking_up_leaves_no_token_in_a_log_or_a_url(nearby: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Nor a signature: of a large file, the hub's answer to a HEAD has one."""
    for name in ("", "httpx", "httpcore", "urllib3", "huggingface_hub"):
        caplog.set_level(logging.DEBUG, logger=name)
    nearby.gated = True
    look_up("google/tiny", None, TOKEN)
    for token in (OTHER_TOKEN, NARROW_TOKEN, WRONG):
        with pytest.raises(SourceError) as raised:
            look_up("google/tiny", None, token)
        assert raised.value.__cause__ is None
        assert raised.value.__suppress_context__
    texts = [record.getMessage() + str(record.exc_text) for record in caplog.records]
    assert any("httpcore" in record.name for record in caplog.records)
    assert not [text for text in texts if "TokenOf" in text or "secret" in text]
    assert not [path for path in nearby.paths if "TokenOf" in path]


def test_a_hub_that_cannot_be_reached_is_a_passing_fault(nearby: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    nearby.url = f"http://127.0.0.1:{free_port()}"
    pointing_at(nearby, monkeypatch)
    with pytest.raises(Unavailable) as raised:
        look_up("google/tiny", None, None)
    assert raised.value.error_code == "hub_unavailable"


def test_a_found_model_has_its_weights_to_read(nearby: Hub) -> None:
    """Pinned and ready for ranges; none was fetched, and each file's digest came with the one listing."""
    nearby.gated = True
    (nearby.directory / "more").mkdir()
    (nearby.directory / "config.json.safetensors.txt").write_text("no weights")
    found = look_up("google/tiny", "main", TOKEN)
    paths = {path.name: path for path in nearby.directory.glob("*.safetensors")}
    assert len(paths) > 1
    assert set(found.weights) == set(paths)
    for name, file in found.weights.items():
        content = paths[name].read_bytes()
        assert (file.commit, file.size) == (COMMIT, len(content))
        assert file.etag == hashlib.sha256(content).hexdigest()
    proofs = [seen.target for seen in nearby.seen if seen.method == "HEAD" and ".safetensors" in seen.target]
    assert proofs == [f"/google/tiny/resolve/{COMMIT}/{min(paths)}"]
    assert not [seen for seen in nearby.seen if seen.host == "storage"]
    file = found.weights[min(paths)]
    with file.open() as reader:
        assert read_bytes(reader, 0, file.size) == paths[file.name].read_bytes()


def test_a_model_without_weights_is_proved_by_its_config(nearby: Hub) -> None:
    for path in nearby.directory.glob("*.safetensors"):
        path.unlink()
    nearby.gated = True
    assert look_up("google/tiny", None, TOKEN).weights == {}
    with pytest.raises(SourceError) as raised:
        look_up("google/tiny", None, None)
    assert raised.value.error_code == "base_gated"


def test_offline_the_cache_alone_is_asked(nearby: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up("google/tiny", None, None)
    asked = len(nearby.seen)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = look_up("google/tiny", COMMIT, None)
    assert (found.commit, found.weights, found.files) == (COMMIT, {}, frozenset())
    with pytest.raises(Unavailable):
        look_up("google/other", None, None)
    assert len(nearby.seen) == asked


def test_the_hub_can_be_a_process_of_its_own(nearby: Hub) -> None:
    command = [sys.executable, "-m", "infra.local.hub", f"ann/model={nearby.directory}", "--bytes-per-second", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        began = time.monotonic()
        answer = httpx.get(f"{url}/ann/model/resolve/main/config.json")
        took = time.monotonic() - began
        process.terminate()
    assert answer.content == (nearby.directory / "config.json").read_bytes()
    assert len(answer.content) / 2000 * 0.8 < took


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
