"""Cloud Storage on this machine: fake-gcs-server, behind a proxy that adds what the real service does and it lacks.

That is: preconditions, lost answers of resumable uploads, checksums, what is set of a bucket; and for tests and
benches, faults and a speed.
Source: https://cloud.google.com/storage/docs/request-preconditions
"""

import argparse
import http.client
import json
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from requests.structures import CaseInsensitiveDict

from infra.local.composing import compose_fault
from infra.local.faults import Fault as Fault
from infra.local.faults import Faults
from infra.local.pace import Pace
from infra.local.placing import place
from infra.local.servers import HOST, fake_gcs, in_thread
from infra.local.uploads import Answer, Session, Upload, generation_in, multipart_fault, refusal

_HOP_BY_HOP = frozenset({"connection", "content-length", "date", "keep-alive", "transfer-encoding"})
_BUCKET = re.compile(r"/storage/v1/b/([^/]+)")
_OBJECT = re.compile(r"(?:/download)?(/storage/v1/b/[^/]+/o/[^/]+)")
_COMPOSED = re.compile(r"(/storage/v1/b/[^/]+/o/)[^/]+/compose")
_UPLOADS = re.compile(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o")
_REFUSED = refusal(HTTPStatus.PRECONDITION_FAILED, "At least one of the pre-conditions you specified did not hold.")


@dataclass(frozen=True)
class Request:
    """An HTTP request, whole."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def query(self, name: str) -> str | None:
        return parse_qs(urlsplit(self.target).query).get(name, [None])[0]


class StorageProxy(ThreadingHTTPServer):
    """What clients talk to.

    Attributes:
        url: Where it answers.
        upstream: `host:port` of fake-gcs-server.
        directory: Where that keeps its buckets; None is in memory.
        bytes_per_second: How many each connection carries, in each direction; None is as many as can.
        requests: Every request so far, as method, target and size of the body in bytes.
    """

    daemon_threads = True

    def __init__(self, bytes_per_second: float | None = None) -> None:
        super().__init__((HOST, 0), _Handler)
        self.bytes_per_second = bytes_per_second
        self.url = f"http://{HOST}:{self.server_port}"
        self.upstream = ""
        self.directory: Path | None = None
        self.requests: list[tuple[str, str, int]] = []
        self._faults = Faults()
        self._sessions: dict[str, Session] = {}
        self._buckets: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._composing = threading.Lock()

    def fail(self, fault: Fault | HTTPStatus, method: str, part: str, *, skip: int = 0, times: int = 1) -> None:
        """As `Faults.plan`."""
        self._faults.plan(fault, method, part, skip=skip, times=times)

    def server_close(self) -> None:
        super().server_close()
        for session in self._sessions.values():
            session.close()

    def heal(self) -> None:
        """Forget all faults that did not happen yet, and the requests so far."""
        self._faults.forget()
        with self._lock:
            self.requests.clear()

    def fault_of(self, request: Request) -> Fault | HTTPStatus | None:
        """Note a request; what is to happen to it."""
        with self._lock:
            self.requests.append((request.method, request.target, len(request.body)))
        return self._faults.next(request.method, request.target)

    def answer(self, request: Request) -> Answer:
        """Do what a request asks for."""
        upload_id, wanted = request.query("upload_id"), request.query("ifGenerationMatch")
        if upload_id is not None:
            session = self._sessions.get(upload_id)
            if session is None:
                return refusal(HTTPStatus.NOT_FOUND, "no such upload")
            return session.cancel() if request.method == "DELETE" else session.put(request.headers, request.body)
        if (composed := _COMPOSED.fullmatch(request.path)) and request.method == "POST":
            return self._composed(request, composed[1], wanted)
        if request.path == "/storage/v1/b" and request.method == "POST":
            return self._described(request, json.loads(request.body)["name"])
        if (bucket := _BUCKET.fullmatch(request.path)) and request.method in ("GET", "PATCH"):
            return self._described(request, bucket[1])
        uploads, named = _UPLOADS.fullmatch(request.path), _OBJECT.fullmatch(request.path)
        if uploads and request.method == "POST" and request.query("uploadType") == "resumable":
            return self._initiated(request, uploads[1], wanted)
        if uploads and request.query("uploadType") == "multipart":
            return multipart_fault(request.headers.get("Content-Type", ""), request.body) or self._forwarded(request)
        if named is None or wanted is None:
            return self._forwarded(request)
        if request.method == "DELETE":
            return self._forwarded(request) if self._generation(named[1]) == wanted else _REFUSED
        answer = self._forwarded(request)
        # Told by the answer itself, so that nothing can be replaced between check and read.
        there = answer.headers.get("X-Goog-Generation") or generation_in(answer.body)
        return _REFUSED if answer.status < HTTPStatus.BAD_REQUEST and there != wanted else answer

    def _described(self, request: Request, bucket: str) -> Answer:
        """A bucket with all that was set of it since we came up; fake-gcs-server keeps its name."""
        answer = self._forwarded(request)
        if answer.status != HTTPStatus.OK:
            return answer
        with self._lock:
            kept = self._buckets.setdefault(bucket, {})
            kept.update(json.loads(request.body or b"{}"))
            return replace(answer, body=json.dumps({**json.loads(answer.body), **kept}).encode())

    def _initiated(self, request: Request, bucket: str, wanted: str | None) -> Answer:
        metadata = json.loads(request.body or b"{}")
        metadata["name"] = request.query("name") or metadata.get("name")
        metadata["contentType"] = request.headers.get("x-upload-content-type", "application/octet-stream")
        target = f"/storage/v1/b/{bucket}"
        if self._forwarded(Request("GET", target, {}, b"")).status != HTTPStatus.OK:
            return refusal(HTTPStatus.NOT_FOUND, "The specified bucket does not exist.")
        if wanted is not None and self._generation(f"{target}/o/{quote(metadata['name'], safe='')}") != wanted:
            return _REFUSED

        def publish(upload: Upload) -> Answer:
            if (placed := self._placed(bucket, upload, wanted)) is not None:
                return placed
            condition = "" if wanted is None else f"&ifGenerationMatch={wanted}"
            return self._sent("POST", f"/upload{target}/o?uploadType=multipart{condition}", *upload.as_multipart())

        session = Session(metadata, publish, self.directory)
        with self._lock:
            self._sessions[session.id] = session
        location = f"{self.url}{request.path}?uploadType=resumable&upload_id={session.id}"
        return Answer(HTTPStatus.OK, {"Location": location})

    def _composed(self, request: Request, objects: str, wanted: str | None) -> Answer:
        with self._composing:  # else two could find the same name free
            fault = compose_fault(request.body, lambda name: self._generation(f"{objects}{quote(name, safe='')}"))
            if fault is not None:
                return fault
            if wanted is not None and self._generation(request.path.removesuffix("/compose")) != wanted:
                return _REFUSED
            return self._forwarded(request)

    def _placed(self, bucket: str, upload: Upload, wanted: str | None) -> Answer | None:
        """The answer to a finished upload whose file was made the object; None where it has to be sent."""
        if self.directory is None:
            return None
        target = f"/storage/v1/b/{bucket}/o/{quote(upload.metadata['name'], safe='')}"
        with self._composing:
            if wanted not in (None, "0") and self._generation(target) != wanted:
                return _REFUSED
            try:
                done = place(upload.file, self.directory, bucket, upload.metadata, upload.crc, new=wanted == "0")
            except FileExistsError:
                return _REFUSED
        return self._forwarded(Request("GET", target, {}, b"")) if done else None

    def _generation(self, target: str) -> str:
        """The live generation of an object; 0 where there is none."""
        answer = self._forwarded(Request("GET", target, {}, b""))
        return "0" if answer.status == HTTPStatus.NOT_FOUND else generation_in(answer.body)

    def _forwarded(self, request: Request) -> Answer:
        headers = {name: text for name, text in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        return self._sent(request.method, request.target, headers, request.body or None)

    def _sent(
        self, method: str, target: str, headers: Mapping[str, str], body: Iterator[bytes] | bytes | None
    ) -> Answer:
        connection = http.client.HTTPConnection(self.upstream)
        try:
            connection.request(method, target, body, dict(headers))
            response = connection.getresponse()
            content = response.read()
            kept = {name: text for name, text in response.getheaders() if name.lower() not in _HOP_BY_HOP}
            return Answer(response.status, kept, content)
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client's, kept alive."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: StorageProxy

    def setup(self) -> None:
        super().setup()
        self._in, self._out = (Pace(self.server.bytes_per_second) for _ in range(2))

    def _serve(self) -> None:
        body = self._in.read(self.rfile, int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, CaseInsensitiveDict(self.headers.items()), body)
        fault = self.server.fault_of(request)
        if fault is Fault.DROPPED:
            self.close_connection = True
            return
        status = HTTPStatus.SERVICE_UNAVAILABLE if fault is Fault.REFUSED else fault
        answer = refusal(status, "as asked") if isinstance(status, HTTPStatus) else self.server.answer(request)
        if fault is Fault.ANSWER_LOST:
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, text in answer.headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self._out.write(self.wfile, answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve


@contextmanager
def storage_proxy(directory: Path | None, *, bytes_per_second: float | None = None) -> Iterator[StorageProxy]:
    """Cloud Storage with its objects under a directory, or in memory; for tests, which want faults.

    Args:
        directory: Where objects lie; None keeps them in memory.
        bytes_per_second: How many each connection carries, in each direction; None is as many as can.

    Raises:
        MissingServerError: fake-gcs-server is not on this machine.
    """
    with StorageProxy(bytes_per_second) as proxy, fake_gcs(directory, public_url=proxy.url) as upstream:
        proxy.upstream, proxy.directory = urlsplit(upstream).netloc, directory
        with in_thread(proxy):
            yield proxy


@contextmanager
def cloud_storage(directory: Path | None) -> Iterator[str]:
    """As `storage_proxy`; yields its URL, which clients find by STORAGE_EMULATOR_HOST."""
    with storage_proxy(directory) as proxy:
        yield proxy.url


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a bucket until SIGTERM or Ctrl-C; prints the server's URL when it answers."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.storage")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="where objects lie")
    parser.add_argument("--bucket", required=True, help="made if it is not there")
    parser.add_argument("--bytes-per-second", type=float, help="of each connection, in each direction")
    args = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with storage_proxy(args.directory, bytes_per_second=args.bytes_per_second) as proxy:
        request = Request("POST", "/storage/v1/b?project=local", {}, json.dumps({"name": args.bucket}).encode())
        made = proxy.answer(request).status
        if made not in (HTTPStatus.OK, HTTPStatus.CONFLICT):
            raise RuntimeError(f"bucket {args.bucket!r} cannot be made: {made}")
        print(proxy.url, flush=True)  # noqa: T201  # this is the output
        stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
