"""Ranged reads of a file on the hub, against a hub on loopback that fails in every way that networks do."""

import http.client
import logging
import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import ExportError, SourceError, Unavailable
from exporter.byte_source import ByteSource, read_bytes
from exporter.hub_file import HubFile, Patience
from exporter.hub_http import followed, origin_of
from infra.local.hub_files import stored
from infra.local.servers import in_thread
from tests.exporter.hub import COMMIT, OTHER_TOKEN, TOKEN, Fault, Hub, hub_serving, pointing_at

SIZE = 3_000_000
SOON = Patience(attempts=5, first_seconds=0.01, longest_seconds=0.02, silence_seconds=10.0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "model.safetensors").write_bytes(random.Random(1).randbytes(SIZE))
    (tmp_path / "config.json").write_bytes(b"{}" * 1000)
    with hub_serving(tmp_path) as hub:
        pointing_at(hub, monkeypatch)
        yield hub


def file_of(hub: Hub, name: str = "model.safetensors", token: str | None = TOKEN) -> HubFile:
    told = stored(hub.directory / name)
    return HubFile("google/tiny", COMMIT, name, told.size, told.etag, token, SOON)


def streamed(file: ByteSource, start: int, stop: int, view_bytes: int) -> bytes:
    """What a stream gives, read through views of so many bytes."""
    data = bytearray(stop - start)
    with file.open() as reader, reader.stream(start, stop) as stream:
        for offset in range(0, len(data), view_bytes):
            stream.read_into(memoryview(data)[offset : offset + view_bytes])
    return bytes(data)


def refusal(file: HubFile) -> ExportError:
    with pytest.raises(ExportError) as raised:
        streamed(file, 0, file.size, 1 << 20)
    return raised.value


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_stream_is_one_request_for_the_very_bytes(hub: Hub, name: str) -> None:
    """Of a large file, which another host sends, and of a small one."""
    file, content = file_of(hub, name), (hub.directory / name).read_bytes()
    assert streamed(file, 7, file.size - 5, 333) == content[7:-5]
    gets = [(seen.host, seen.headers["Range"]) for seen in hub.seen]
    wanted = f"bytes=7-{file.size - 6}"
    assert gets == [("hub", wanted), ("storage", wanted)][: 2 if name == "model.safetensors" else 1]
    assert all(seen.headers["Accept-Encoding"] == "identity" for seen in hub.seen)


def test_a_stream_that_is_left_early_takes_no_more(hub: Hub) -> None:
    hub.bytes_per_second = 1_000_000
    began = time.monotonic()
    with file_of(hub).open() as reader, reader.stream(0, SIZE) as stream:
        stream.read_into(memoryview(bytearray(10)))
    assert time.monotonic() - began < 1.5


def test_a_stream_has_an_end(hub: Hub) -> None:
    with file_of(hub).open() as reader, reader.stream(0, 10) as stream, pytest.raises(ValueError, match="byte 11"):
        stream.read_into(memoryview(bytearray(11)))
    assert not hub.seen


@pytest.mark.parametrize("seed", range(5))
def test_whatever_drops_the_bytes_are_right_and_none_is_asked_for_twice(hub: Hub, seed: int) -> None:
    """Connections that end after any number of bytes, none included, at either host."""
    chance = random.Random(seed)
    drops = [chance.choice([0, 1, chance.randrange(1000), chance.randrange(70_000)]) for _ in range(40)]
    hub.faults["storage"] = [Fault(drop_after=count) for count in drops]
    hub.faults["hub"] = [chance.choice([None, Fault(status=503)]) for _ in range(10)]
    content = (hub.directory / "model.safetensors").read_bytes()
    file = replace(file_of(hub), patience=replace(SOON, attempts=60))
    assert streamed(file, 0, SIZE, chance.choice([65_536, 1_000_000, SIZE])) == content
    assert hub.asked() == [(start, SIZE) for start in accumulate(drops, initial=0)]


def test_many_threads_read_at_once_and_share_connections(hub: Hub) -> None:
    content = (hub.directory / "model.safetensors").read_bytes()
    ranges = [(offset, random.Random(offset).randrange(1, 5000)) for offset in range(0, SIZE - 5000, 60_000)]
    with file_of(hub).open() as reader, ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda wanted: read_bytes(reader, *wanted), ranges))
    assert read == [content[offset : offset + length] for offset, length in ranges]
    assert hub.connections["hub"] <= 4
    assert hub.connections["storage"] <= 4


def test_it_gives_up_after_so_many_attempts_without_a_byte(hub: Hub) -> None:
    hub.faults["storage"] = [Fault(drop_after=100), *[Fault(status=500)] * 50]
    error = refusal(file_of(hub))
    assert isinstance(error, Unavailable)
    assert error.error_code == "hub_unavailable"
    assert "model.safetensors" in error.message
    assert "500" in error.message
    assert len(hub.asked()) == SOON.attempts


def test_progress_begins_the_count_of_attempts_anew(hub: Hub) -> None:
    hub.faults["storage"] = [Fault(drop_after=1), Fault(status=502), Fault(drop_after=0)] * 10
    content = (hub.directory / "model.safetensors").read_bytes()
    assert streamed(file_of(hub), 0, SIZE, SIZE) == content


def test_waits_grow_while_no_byte_comes(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="exporter.hub_file")
    hub.faults["storage"] = [Fault(status=500)] * 9
    patience = Patience(attempts=10, first_seconds=0.01, longest_seconds=0.1)
    streamed(replace(file_of(hub), patience=patience), 0, SIZE, SIZE)
    waits = [float(record.args[2]) for record in caplog.records if isinstance(record.args, tuple)]  # type: ignore[arg-type]
    assert len(waits) == 9
    assert all(wait <= min(0.1, 0.01 * 2**number) for number, wait in enumerate(waits))
    assert max(waits) > 0.01
    assert len(set(waits)) > 5


def test_a_host_that_asks_to_be_left_alone_is(hub: Hub) -> None:
    hub.faults["hub"] = [Fault(status=429, headers={"Retry-After": "1"})]
    began = time.monotonic()
    streamed(file_of(hub), 0, SIZE, SIZE)
    assert time.monotonic() - began >= 1


def test_a_host_that_asks_to_be_left_alone_for_too_long_is_not_asked_again(hub: Hub) -> None:
    hub.faults["hub"] = [Fault(status=429, headers={"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"})]
    assert refusal(file_of(hub)).error_code == "hub_unavailable"
    assert len(hub.seen) == 1


@pytest.mark.parametrize("zone", ["GMT", "+" + "9" * 14, "nowhere"])
def test_a_date_that_is_none_or_past_asks_for_no_wait(hub: Hub, zone: str) -> None:
    hub.faults["hub"] = [Fault(status=429, headers={"Retry-After": f"Mon, 01 Jan 2024 00:00:00 {zone}"})]
    assert streamed(file_of(hub), 0, SIZE, SIZE) == (hub.directory / "model.safetensors").read_bytes()


def test_whoever_waits_for_the_hub_can_be_stopped(hub: Hub) -> None:
    """Within about a second, however long the hub asks to be left alone."""
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    hub.faults["hub"] = [Fault(status=429, headers={"Retry-After": "60"})]
    began = time.monotonic()
    threading.Timer(0.2, stop.set).start()
    file = replace(file_of(hub), while_waiting=check)
    with file.open() as reader, reader.stream(0, SIZE) as stream, pytest.raises(KeyboardInterrupt):
        stream.read_into(memoryview(bytearray(10)))
    assert time.monotonic() - began < 5


def test_a_silent_host_is_asked_again_for_the_rest(hub: Hub) -> None:
    """It sends a byte, and then nothing for a second."""
    hub.bytes_per_second = 1
    file = replace(file_of(hub), patience=replace(SOON, silence_seconds=0.2))
    assert streamed(file, 0, 4, 4) == (hub.directory / "model.safetensors").read_bytes()[:4]
    assert hub.asked() == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_hub_that_is_not_there_is_a_passing_fault(hub: Hub) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        hub.storage_url = f"http://localhost:{nobody.getsockname()[1]}"
        assert refusal(file_of(hub)).error_code == "hub_unavailable"


CHANGES = [
    ("hub", Fault(etag="0" * 64)),
    ("hub", Fault(commit="f" * 40)),
    ("storage", Fault(status=416)),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("host", "fault"), CHANGES)
def test_another_version_is_refused_and_never_mixed_in(hub: Hub, host: str, fault: Fault, late: bool) -> None:
    """At once, and when it is found at a connection's end, half-way."""
    if late:
        hub.faults["storage"] = [Fault(drop_after=1000)]
        hub.faults[host] = [*hub.faults[host], None, fault] if host == "hub" else [*hub.faults[host], fault]
    else:
        hub.faults[host] = [fault]
    error = refusal(file_of(hub))
    assert isinstance(error, SourceError)
    assert error.error_code == "base_changed_on_hub"


def test_a_file_of_another_size_is_another_version(hub: Hub) -> None:
    error = refusal(replace(file_of(hub), size=SIZE - 1))
    assert error.error_code == "base_changed_on_hub"
    assert str(SIZE) in error.message


@pytest.mark.parametrize("fault", [Fault(whole=True), Fault(shifted=1)])
def test_an_answer_with_another_range_is_refused(hub: Hub, fault: Fault) -> None:
    """200 instead of 206, and 206 with other bytes than were asked for."""
    hub.faults["storage"] = [Fault(drop_after=10), fault]
    error = refusal(file_of(hub))
    assert isinstance(error, SourceError)
    assert error.error_code == "hub_ranges_unsupported"


def test_a_signed_url_that_ran_out_is_replaced_by_a_new_one(hub: Hub) -> None:
    hub.faults["storage"] = [Fault(drop_after=1000), Fault(status=403)]
    assert streamed(file_of(hub), 0, SIZE, SIZE) == (hub.directory / "model.safetensors").read_bytes()
    signed = [seen.target for seen in hub.seen if seen.host == "storage"]
    assert len(set(signed)) == 3


@pytest.mark.parametrize(
    ("change", "token", "code"),
    [
        ({"gated": True}, None, "base_gated"),
        ({"gated": True}, OTHER_TOKEN, "base_gated"),
        ({"private": True}, OTHER_TOKEN, "base_missing"),
        ({"disabled": True}, TOKEN, "base_disabled"),
        ({"directory": Path("/nowhere")}, TOKEN, "base_changed_on_hub"),
    ],
)
def test_what_is_taken_away_half_way_is_named(hub: Hub, change: dict[str, Any], token: str | None, code: str) -> None:
    with file_of(hub, token=token).open() as reader:
        hub.faults["storage"] = [Fault(drop_after=1000)]
        with reader.stream(0, SIZE) as stream:
            stream.read_into(memoryview(bytearray(1000)))
            for name, value in change.items():
                setattr(hub, name, value)
            with pytest.raises(SourceError) as raised:
                stream.read_into(memoryview(bytearray(1000)))
    assert raised.value.error_code == code
    assert "model.safetensors" in raised.value.message


def test_a_renamed_repository_is_followed_with_the_token(hub: Hub) -> None:
    hub.renamed["google/old"] = "google/tiny"
    hub.gated = True
    file = replace(file_of(hub), model_id="google/old")
    assert streamed(file, 0, SIZE, SIZE) == (hub.directory / "model.safetensors").read_bytes()


def test_neither_token_nor_signature_gets_anywhere(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Not into a URL, a request to the other host, any library's log, a message, an error's chain, or a repr."""
    for name in ("", "httpx", "httpcore", "urllib3", "huggingface_hub", "tenacity"):
        caplog.set_level(logging.DEBUG, logger=name)
    hub.faults["storage"] = [Fault(drop_after=1000), Fault(status=403), *[Fault(status=500)] * 50]
    errors: list[BaseException | None] = [refusal(file_of(hub))]
    hub.faults["storage"] = [Fault(drop_after=10), Fault(whole=True)]
    errors.append(refusal(file_of(hub)))
    hub.gated = True
    errors.append(refusal(file_of(hub, token=OTHER_TOKEN)))
    errors.append(refusal(file_of(hub, token="hf_wrongTokenOfBob")))
    texts = [repr(file_of(hub)), *(record.getMessage() for record in caplog.records)]
    texts += [str(record.exc_info) + str(record.exc_text) for record in caplog.records]
    for error in errors:
        while error is not None:
            texts.append(f"{error!r} {error}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert any("asking again" in text for text in texts)
    assert not [text for text in texts if TOKEN in text or "secret" in text or "TokenOf" in text]
    assert f"Bearer {TOKEN}" in hub.authorizations
    assert not [seen for seen in hub.seen if "TokenOf" in seen.target]
    others = [seen.headers for seen in hub.seen if seen.host == "storage"]
    assert others
    assert not [headers for headers in others if "TokenOf" in str(headers) or "Authorization" in headers]


@pytest.mark.parametrize(
    ("url", "location", "expected"),
    [
        ("https://hub.test/a/b?c", "/d", "https://hub.test/d"),
        ("https://hub.test/a", "https://cdn.test/x?sig=1", "https://cdn.test/x?sig=1"),
        ("http://hub.test/a", "https://hub.test/a", "https://hub.test/a"),
        ("https://hub.test/a", "http://hub.test/a", None),
        ("https://hub.test/a", "http://cdn.test/a", None),
        ("https://hub.test/a", "file:///etc/passwd", None),
        ("https://hub.test/a", "https://hub.test:port/a", None),
        ("https://hub.test/a", "https://evil.test\\@hub.test/a", None),
        ("https://hub.test/a", "\\\\evil.test/a", None),
        ("https://hub.test/a", "https://hub.test@evil.test/a", None),
        ("https://hub.test/a", "https://hub.test\t.evil.test/a", None),
        ("https://hub.test/a", "https://hub.test#@evil.test/a", "https://hub.test#@evil.test/a"),
    ],
)
def test_a_redirect_leads_only_to_http_and_never_off_https(url: str, location: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(http.client.HTTPException):
            followed(url, location)
    else:
        assert followed(url, location) == expected


def test_a_host_that_only_looks_like_the_hub_gets_no_token(hub: Hub) -> None:
    """The storage host sends the client on; what stands before the backslash is who is really connected to."""
    got: list[bytes] = []

    class Evil(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            got.append(self.request.recv(65_536))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Evil) as evil, in_thread(evil):
        there = f"http://127.0.0.1:{evil.server_address[1]}\\@{hub.url.removeprefix('http://')}/x"
        hub.faults["storage"] = [Fault(status=302, headers={"Location": there})] * 50
        assert refusal(file_of(hub)).error_code == "hub_redirect_refused"
    assert got == []


def test_another_port_or_scheme_is_another_host() -> None:
    """That is who is not told the token."""
    origins = ["https://hub.test", "http://hub.test", "https://hub.test:444", "https://cdn.hub.test"]
    assert len({origin_of(url) for url in origins}) == len(origins)
    assert origin_of("https://HUB.test:443/x") == origin_of("https://hub.test/y")
