"""A hub on loopback: the answers of the Hugging Face hub that the real client asks for, over files of a directory."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from infra.local.servers import HOST, in_thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_goodTokenOfAnn"


@dataclass
class Hub:
    """One repository `google/tiny`, and what was asked of it."""

    directory: Path
    url: str = ""
    gated: bool = False
    broken: bool = False
    authorizations: set[str | None] = field(default_factory=set)
    paths: list[str] = field(default_factory=list)


@contextmanager
def hub_serving(directory: Path) -> Iterator[Hub]:
    """Serve the files of `directory` as `google/tiny` until the block ends."""
    hub = Hub(directory)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            authorization = self.headers.get("Authorization")
            hub.authorizations.add(authorization)
            hub.paths.append(self.path)
            path = self.path.split("?")[0]
            if hub.broken:
                return self._send(503, b"", body, {})
            if authorization not in (None, f"Bearer {TOKEN}"):
                return self._send(401, b"", body, {"X-Error-Message": "Invalid credentials in Authorization header"})
            if "google/tiny" not in path:
                return self._send(404, b"", body, {"X-Error-Code": "RepoNotFound"})
            if hub.gated and authorization is None:
                return self._send(401, b"", body, {"X-Error-Code": "GatedRepo"})
            if path.startswith("/api/models/google/tiny"):
                return self._api(path, body)
            file = hub.directory / path.rpartition("/")[2]
            if not file.is_file():
                return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._send(200, content, body, {"ETag": etag, "X-Repo-Commit": COMMIT})

        def _api(self, path: str, body: bool) -> None:
            files = [file for file in sorted(hub.directory.iterdir()) if file.is_file()]
            answer: object
            if path.endswith("/auth-check"):
                answer = {}
            elif "/tree/" in path:
                answer = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40} for file in files
                ]
            else:
                if "/revision/" in path and path.rpartition("/")[2] not in ("main", COMMIT):
                    return self._send(404, b"", body, {"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": file.name} for file in files]
                answer = {"id": "google/tiny", "modelId": "google/tiny", "sha": COMMIT, "siblings": siblings}
            return self._send(200, json.dumps(answer).encode(), body, {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server, in_thread(server):
        hub.url = f"http://{HOST}:{server.server_port}"
        yield hub
