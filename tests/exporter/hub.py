"""A hub on loopback: the answers of the Hugging Face hub that the real client asks for, over files of directories."""

import hashlib
import json
import os
import re
import subprocess
import sys
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
    """Repositories, and what was asked of them."""

    directory: Path
    """The files of `google/tiny`."""
    more: dict[str, Path] = field(default_factory=dict)
    """The files of every other one by its id."""
    url: str = ""
    gated: bool = False
    broken: bool = False
    authorizations: set[str | None] = field(default_factory=set)
    paths: list[str] = field(default_factory=list)
    fetched: set[str] = field(default_factory=set)
    """The files that were sent whole, as `owner/name/file`; of others, parts at most."""
    tags: set[tuple[str, str]] = field(default_factory=set)
    """Revisions besides `main` and the commit: of which repository, and their name."""

    def repository(self, path: str) -> tuple[str, Path] | None:
        """The id and directory that a request's path is about."""
        known = {"google/tiny": self.directory, **self.more}
        found = re.match(r"/(?:api/models/)?([^/]+/[^/]+)", path)
        return (found[1], known[found[1]]) if found and found[1] in known else None


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
            repository = hub.repository(path)
            if repository is None:
                return self._send(404, b"", body, {"X-Error-Code": "RepoNotFound"})
            model_id, directory = repository
            if hub.gated and authorization is None:
                return self._send(401, b"", body, {"X-Error-Code": "GatedRepo"})
            if path.startswith("/api/models/"):
                return self._api(path, body, model_id, directory)
            file = directory / path.rpartition("/")[2]
            if not file.is_file():
                return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted:
                first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content = content[first : last + 1]
            elif body:
                hub.fetched.add(f"{model_id}/{file.name}")
            return self._send(206 if wanted else 200, content, body, headers)

        def _api(self, path: str, body: bool, model_id: str, directory: Path) -> None:
            files = [file for file in sorted(directory.iterdir()) if file.is_file()]
            answer: object
            if path.endswith("/auth-check"):
                answer = {}
            elif "/tree/" in path:
                answer = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40} for file in files
                ]
            else:
                revision = path.partition("/revision/")[2]
                if revision not in ("", "main", COMMIT) and (model_id, revision) not in hub.tags:
                    return self._send(404, b"", body, {"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": file.name} for file in files]
                answer = {"id": model_id, "modelId": model_id, "sha": COMMIT, "siblings": siblings}
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


def in_a_process(hub: Hub, cache: Path, code: str, *arguments: str) -> list[str]:
    """What a program prints that speaks to this hub; a process of its own, as the client reads its settings once."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
