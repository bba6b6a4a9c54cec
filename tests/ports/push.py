"""An endpoint for push subscriptions, which hands each message to a queue's handler."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dispatcher.errors import ExportError
from dispatcher.jobqueue import Handler


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

    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
