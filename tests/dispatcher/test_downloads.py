"""Where a finished export's files can be fetched, as its status answer says it."""

import logging
import threading
import time
from datetime import timedelta
from pathlib import Path
from urllib.request import urlopen

import pytest

from dispatcher import answers
from dispatcher.artifacts import SMALL_FILE_LIMIT, path_of
from dispatcher.downloads import MAX_FILES, RETRY_AFTER, DownloadLinks, Downloads
from dispatcher.errors import Unavailable
from dispatcher.local_artifacts import LocalArtifacts
from tests.dispatcher.server import served
from tests.dispatcher.world import World

LIFE = timedelta(hours=1)


class Signing(LocalArtifacts):
    """A directory whose URLs are told apart; refuses to sign, or does not answer, while it is told to.

    Attributes:
        signed: How many URLs were made.
        refusing: Whether to refuse.
        answers: Waited for before a file is read, and before one is signed.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.signed = 0
        self.refusing = False
        self.answers = {"read": threading.Event(), "sign": threading.Event()}
        for answer in self.answers.values():
            answer.set()

    def read(self, uri: str, *, limit: int = SMALL_FILE_LIMIT) -> bytes:
        self.answers["read"].wait()
        return super().read(uri, limit=limit)

    def download_url(self, uri: str, expires: timedelta) -> str | None:
        self.answers["sign"].wait()
        if self.refusing:
            raise Unavailable("nobody signs")
        self.signed += 1
        return f"{super().download_url(uri, expires)}?{self.signed}"


@pytest.fixture
def store(world: World) -> Signing:
    return Signing(world.home / "artifacts")


@pytest.fixture
def links(world: World, store: Signing) -> DownloadLinks:
    return DownloadLinks(store, LIFE, world.clock)


def completed(world: World) -> None:
    world.job()
    world.launched()
    world.claim()
    world.complete()


def urls(found: Downloads | None) -> list[str | None]:
    assert found is not None
    return [file.url for file in found.files]


def test_a_finished_export_says_where_each_of_its_files_is(world: World) -> None:
    """Those that its manifest lists, and the manifest; with sizes that hold."""
    completed(world)
    record = world.record()
    answer = answers.status(record, world.clock(), world.service.downloads(record))
    assert [file["name"] for file in answer["downloads"]] == ["export.json", "model.safetensors"]
    for file in answer["downloads"]:
        with urlopen(file["url"]) as content:  # noqa: S310  # a file of ours
            assert len(content.read()) == file["bytes"]
    assert answer["downloads_expire_at"] == (world.clock() + LIFE).isoformat()


def test_the_status_over_http_has_downloads_and_a_listing_has_none(world: World) -> None:
    """A page of exports would ask for thousands of signatures."""
    completed(world)
    with served(world) as http:
        status = http.get("/exports/job.merged").json()
        (listed,) = http.get("/exports").json()["exports"]
    assert [file["name"] for file in status["downloads"]] == ["export.json", "model.safetensors"]
    assert not listed.keys() & {"downloads", "downloads_expire_at"}


def test_a_gguf_is_offered_with_all_that_lies_beside_it(world: World) -> None:
    """`gguf_path` is the one file, and a download of its own."""
    world.job()
    world.submit(export_type="gguf")
    world.queue.deliver_all(world.trigger)
    world.claim("job.gguf.q8_0")
    record = world.complete("job.gguf.q8_0")
    answer = answers.status(record, world.clock(), world.service.downloads(record))
    files = {file["name"]: file for file in answer["downloads"]}
    assert list(files) == ["export.json", "model-Q8_0.gguf"]
    assert answer["gguf_path"] == files["model-Q8_0.gguf"]["url"]
    assert path_of(answer["gguf_path"]).read_bytes() == b"weights"


def test_an_adapter_is_told_by_what_lies_there(world: World) -> None:
    """It has no manifest of ours; any name of a file leads to it."""
    world.job()
    (world.home / "adapter-job" / "a #1?.txt").write_text("odd")
    record = world.submit(export_type="adapter")
    found = world.service.downloads(record)
    assert found is not None
    assert [file.name for file in found.files] == ["a #1?.txt", "adapter_config.json", "adapter_model.safetensors"]
    assert found.files[0].url is not None
    with urlopen(found.files[0].url) as content:  # noqa: S310  # a file of ours
        assert content.read() == b"odd"


def test_an_unfinished_export_has_no_downloads(world: World) -> None:
    """Nor does its answer speak of any."""
    world.job()
    record = world.submit()
    assert world.service.downloads(record) is None
    assert "downloads" not in answers.status(record, world.clock(), None)


def test_urls_are_kept_for_half_of_their_life(world: World, store: Signing, links: DownloadLinks) -> None:
    """So that polling signs nothing, and that whoever is given one has half of its life left."""
    completed(world)
    first = links.of(world.record())
    world.clock.pass_seconds(LIFE.total_seconds() / 2 - 1)
    assert links.of(world.record()) == first
    assert store.signed == 2
    world.clock.pass_seconds(1)
    second = links.of(world.record())
    assert set(urls(second)).isdisjoint(urls(first))
    assert second is not None
    assert second.expire_at == world.clock() + LIFE


def test_what_nobody_signs_fails_no_status(
    world: World, store: Signing, links: DownloadLinks, caplog: pytest.LogCaptureFixture
) -> None:
    """Its files have no URL then, and that is logged; a minute later they may."""
    completed(world)
    store.refusing = True
    assert urls(links.of(world.record())) == [None, None]
    assert "nobody signs" in caplog.text
    store.refusing = False
    assert urls(links.of(world.record())) == [None, None]
    world.clock.pass_seconds(RETRY_AFTER.total_seconds())
    assert None not in urls(links.of(world.record()))


@pytest.mark.parametrize("hanging", ["read", "sign"])
def test_a_store_that_hangs_holds_up_no_status(
    world: World, store: Signing, caplog: pytest.LogCaptureFixture, hanging: str
) -> None:
    """The files are not told, or have no URL; which is remembered, so that the next status waits for nothing."""
    completed(world)
    links = DownloadLinks(store, LIFE, world.clock, patience=0.1)
    store.answers[hanging].clear()
    try:
        start = time.monotonic()
        found = links.of(world.record())
        assert time.monotonic() - start < 1
        assert found is None if hanging == "read" else urls(found) == [None, None]
        assert "no answer in time" in caplog.text
        caplog.clear()
        assert links.of(world.record()) == found
        assert caplog.text == ""
    finally:
        store.answers[hanging].set()
    world.clock.pass_seconds(RETRY_AFTER.total_seconds())
    assert None not in urls(links.of(world.record()))


def test_a_folder_of_very_many_files_is_offered_in_part(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The adapter itself first, the checkpoints that somebody left beside it as there is room; and it is said."""
    world.job()
    for number in range(MAX_FILES):
        folder = world.home / "adapter-job" / f"a-{number:04d}"
        folder.mkdir()
        (folder / "state.json").write_text("{}")
    record = world.submit(export_type="adapter")
    with caplog.at_level(logging.INFO):
        answer = answers.status(record, world.clock(), world.service.downloads(record))
    names = [file["name"] for file in answer["downloads"]]
    assert names[:3] == ["adapter_config.json", "adapter_model.safetensors", "a-0000/state.json"]
    assert (len(names), answer["downloads_left_out"]) == (MAX_FILES, 2)
    assert f"{MAX_FILES} are offered" in caplog.text


def test_a_damaged_export_still_has_a_status(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Only its files cannot be told."""
    completed(world)
    manifest = next((world.home / "artifacts").rglob("export.json"))
    manifest.write_text("damaged")
    assert world.service.downloads(world.record()) is None
    manifest.unlink()
    world.clock.pass_seconds(RETRY_AFTER.total_seconds())
    assert world.service.downloads(world.record()) is None
    assert caplog.text.count("cannot be told") == 2
