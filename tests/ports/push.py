"""An endpoint for push subscriptions, which hands each message to a queue's handler."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dispatcher.errors import ExportError
from dispatcher.jobqueue import Handler
from infra.local.servers import HOST, in_thread


@contextmanager
def listening(handler: Handler) -> Iterator[str]:
    """Serves on a free port; yields the URL. A message that the handler refuses is answered with 503."""

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["message"]
            try:
                handler(base64.b64decode(message["data"]), message.get("attributes", {}))
            except ExportError:
                self.send_response(503)
            else:
                self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Endpoint) as server, in_thread(server):
        yield f"http://{HOST}:{server.server_port}/"
