"""A Hugging Face hub on this machine: what the real client and our own ranged reads ask for, over files of directories.

Large files are not sent by the hub itself: as the real one does, it sends the client on to another host, here a second
port, with a signed URL. `python -m infra.local.hub google/tiny=DIRECTORY` serves until it is interrupted.
Source: https://huggingface.co/docs/hub/api, and the headers that huggingface_hub/file_download.py reads.
"""

import argparse
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from infra.local.hub_files import StoredFile, range_of, send, stored
from infra.local.hub_state import COMMIT, NARROW_TOKEN, OTHER_TOKEN, TOKEN, Fault, Hub, Seen
from infra.local.servers import HOST, in_thread

_INVALID = "Invalid credentials in Authorization header"


class _Handler(BaseHTTPRequestHandler):
    """What both servers have in common."""

    protocol_version = "HTTP/1.1"
    timeout = 600
    disable_nagle_algorithm = True  # or the body waits 40 ms for the headers' acknowledgement
    host: str
    hub: Hub

    def setup(self) -> None:
        super().setup()
        self.hub.connections[self.host] += 1

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has had enough
            super().handle()

    def do_GET(self) -> None:
        self._begin(body=True)

    def do_HEAD(self) -> None:
        self._begin(body=False)

    def _begin(self, *, body: bool) -> None:
        seen = Seen(self.host, self.command, self.path, dict(self.headers.items()))
        self.hub.seen.append(seen)
        self.hub.before(seen)
        if self.hub.broken:
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE)
        return self._respond(unquote(urlsplit(self.path).path), body)

    def _respond(self, path: str, body: bool) -> None:
        raise NotImplementedError

    def _answer(self, status: int, headers: Mapping[str, str] | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_file(self, file: StoredFile, headers: Mapping[str, str], fault: Fault, body: bool) -> bool:
        """Send a file or the range asked for; whether it was the whole file that was asked for."""
        wanted = None if fault.whole else range_of(self.headers.get("Range"), file.size)
        start, stop = wanted or (0, file.size)
        start = min(start + fault.shifted, stop)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{file.size}")
        for name, value in {**headers, "Accept-Ranges": "bytes", "Content-Length": str(stop - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.flush()
            if fault.drop_after is not None and fault.drop_after < stop - start:
                stop = start + fault.drop_after
                self.close_connection = True
            send(self.connection, file.path, start, stop, self.hub.bytes_per_second)
        return wanted is None

    def log_message(self, format: str, *args: object) -> None:
        pass


class _HubHandler(_Handler):
    """The hub itself: who may see what, what repositories are, small files, and where large ones are."""

    host = "hub"

    def _respond(self, path: str, body: bool) -> None:
        hub, authorization = self.hub, self.headers.get("Authorization")
        hub.authorizations.add(authorization)
        known = {None, *(f"Bearer {token}" for token in (TOKEN, OTHER_TOKEN, NARROW_TOKEN))}
        if authorization not in known:
            return self._answer(HTTPStatus.UNAUTHORIZED, {"X-Error-Message": _INVALID})
        if hub.expired and authorization:
            return self._answer(HTTPStatus.UNAUTHORIZED, {"X-Error-Message": 'User Access Token "ann" is expired'})
        if path == "/api/whoami-v2":
            if authorization is None:
                return self._answer(HTTPStatus.UNAUTHORIZED, {"X-Error-Message": _INVALID})
            name = "eve" if authorization == f"Bearer {OTHER_TOKEN}" else "ann"
            return self._answer(HTTPStatus.OK, content=json.dumps({"type": "user", "name": name}).encode())
        for old, new in hub.renamed.items():
            if f"/{old}/" in f"{path}/":
                moved = self.path.replace(old, new, 1)
                return self._answer(HTTPStatus.TEMPORARY_REDIRECT, {"Location": moved})
        repository = hub.repository(path)
        if repository is None or (hub.private and authorization != f"Bearer {TOKEN}"):
            status = HTTPStatus.NOT_FOUND if authorization else HTTPStatus.UNAUTHORIZED
            return self._answer(status, {"X-Error-Code": "RepoNotFound"})
        if hub.disabled:
            return self._answer(HTTPStatus.FORBIDDEN, {"X-Error-Message": "Access to this resource is disabled."})
        model_id, directory = repository
        revision = re.search(r"/(?:revision|resolve|tree)/([^/]+)", path)
        if revision and revision[1] not in ("main", COMMIT) and (model_id, revision[1]) not in hub.tags:
            return self._answer(HTTPStatus.NOT_FOUND, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/"):
            return self._api(path, model_id, directory)
        refusal = self._refusal(authorization)
        return self._answer(*refusal) if refusal else self._resolve(path, body, model_id, directory)

    def _refusal(self, authorization: str | None) -> tuple[int, dict[str, str]] | None:
        """Why these files are not for this account."""
        if authorization == f"Bearer {NARROW_TOKEN}":
            message = "Please enable access to public gated repositories in your fine-grained token settings"
            return HTTPStatus.FORBIDDEN, {"X-Error-Message": message}
        if self.hub.gated and authorization != f"Bearer {TOKEN}":
            status = HTTPStatus.FORBIDDEN if authorization else HTTPStatus.UNAUTHORIZED
            return status, {"X-Error-Code": "GatedRepo"}
        return None

    def _resolve(self, path: str, body: bool, model_id: str, directory: Path) -> None:
        name = path.partition("/resolve/")[2].partition("/")[2]
        # A name with a folder in it is none of ours: directories are served without theirs.
        if not name or "/" in name or not (directory / name).is_file():
            return self._answer(HTTPStatus.NOT_FOUND, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        file = stored(directory / name)
        fault = self.hub.fault("hub") if body and self.headers.get("Range") else Fault()
        if fault.status is not None:
            return self._answer(fault.status, fault.headers)
        etag = fault.etag or file.etag
        headers = {"X-Repo-Commit": fault.commit or COMMIT}
        if file.is_large:
            query = f"file={model_id}/{name}&X-Amz-Signature=secret{next(self.hub.signatures)}"
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(file.size)}
            return self._answer(
                HTTPStatus.FOUND, {**headers, "Location": f"{self.hub.storage_url}/{file.etag}?{query}"}, b"Found."
            )
        if self._send_file(file, {**headers, "ETag": f'"{etag}"'}, fault, body) and body:
            self.hub.fetched.add(f"{model_id}/{name}")
        return None

    def _api(self, path: str, model_id: str, directory: Path) -> None:
        files = [stored(file) for file in sorted(directory.iterdir()) if file.is_file()]
        answer: object
        if path.endswith("/auth-check"):
            refusal = self._refusal(self.headers.get("Authorization"))
            if refusal:
                return self._answer(*refusal)
            answer = {}
        elif "/tree/" in path:
            answer = [file.in_tree() for file in files]
            answer += [{**file, "type": "file", "path": file["rfilename"], "oid": "0" * 40} for file in self.hub.listed]
        else:
            blobs = "blobs" in parse_qs(urlsplit(self.path).query) and not self.hub.unlisted
            siblings = [file.as_sibling() if blobs else {"rfilename": file.path.name} for file in files]
            siblings += self.hub.listed
            answer = {"id": model_id, "modelId": model_id, "sha": COMMIT, "siblings": siblings}
        return self._answer(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(answer).encode())


class _StorageHandler(_Handler):
    """The other host, which knows no accounts: who has a signed URL gets the bytes."""

    host = "storage"

    def _respond(self, path: str, body: bool) -> None:
        query = parse_qs(urlsplit(self.path).query)
        model_id, _, name = query.get("file", [""])[0].rpartition("/")
        found = self.hub.repository(f"/{model_id}")
        if found is None or "X-Amz-Signature" not in query or self.headers.get("Authorization"):
            return self._answer(HTTPStatus.FORBIDDEN, content=b"<Code>AccessDenied</Code>")
        fault = self.hub.fault("storage") if self.headers.get("Range") else Fault()
        if fault.status is not None:
            return self._answer(fault.status, fault.headers)
        if self._send_file(stored(found[1] / name), {"ETag": '"of-the-other-host"'}, fault, body) and body:
            self.hub.fetched.add(f"{model_id}/{name}")
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a throttled body would hold up the end for minutes


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve its repositories on two free ports until the block ends; `url` and `storage_url` are set."""
    with ExitStack() as stack:
        addresses = []
        # Another name too: huggingface_hub takes every port of the hub's own host for the hub, and sends it the token.
        for name, handler in ((HOST, _HubHandler), ("localhost", _StorageHandler)):
            server = stack.enter_context(_Server((HOST, 0), type(handler.__name__, (handler,), {"hub": hub})))
            stack.enter_context(in_thread(server))
            addresses.append(f"http://{name}:{server.server_port}")
        hub.url, hub.storage_url = addresses
        yield hub


def main(arguments: list[str]) -> None:
    """Serve until the process is ended; the first line printed is the URL, for HF_ENDPOINT."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.hub", description=__doc__)
    parser.add_argument("repositories", nargs="+", metavar="OWNER/NAME=DIRECTORY")
    parser.add_argument("--bytes-per-second", type=int, help="of each connection; no limit if left out")
    given = parser.parse_args(arguments)
    directories = {}
    for text in given.repositories:
        model_id, _, directory = text.partition("=")
        if not Path(directory).is_dir() or not re.fullmatch(r"[^/]+/[^/]+", model_id):
            parser.error(f"{text!r} is not OWNER/NAME=DIRECTORY")
        directories[model_id] = Path(directory)
    first = next(iter(directories.values()))
    with serving(Hub(first, directories, bytes_per_second=given.bytes_per_second)) as hub:
        print(hub.url, flush=True)  # noqa: T201  # what the caller waits for
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
