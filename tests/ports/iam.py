"""IAM's signBlob and a machine's metadata server, spoken to over HTTP: what signs download URLs without a key.

- https://cloud.google.com/iam/docs/reference/credentials/rest/v1/projects.serviceAccounts/signBlob
- https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from google.auth.transport import Response
from google.auth.transport.requests import Request

from infra.local.servers import in_thread

MACHINE_ACCOUNT = "machine@project.iam.gserviceaccount.com"
TOKEN = "access-token"  # made up


class Iam(ThreadingHTTPServer):
    """Signs for whoever shows the token.

    Attributes:
        url: Where it answers.
        signed: The account of every signature so far.
        refusing: Whether it answers 403 instead.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.signed: list[str] = []
        self.refusing = False
        self._key = generate_private_key(public_exponent=65537, key_size=2048)

    def sign(self, payload: bytes) -> bytes:
        """A signature by the service's own key (PKCS #1 v1.5, SHA-256)."""
        return self._key.sign(payload, PKCS1v15(), SHA256())

    def verify(self, signature: bytes, payload: bytes) -> None:
        """Check a signature.

        Raises:
            cryptography.exceptions.InvalidSignature: It is of another payload or key.
        """
        self._key.public_key().verify(signature, payload, PKCS1v15(), SHA256())


class Routed(Request):
    """Sends what is meant for Google to the double."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def __call__(
        self,
        url: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10,
        **more: Any,
    ) -> Response:
        parts = urlsplit(url)
        target = f"{self._url}{parts.path}" + (f"?{parts.query}" if parts.query else "")
        call: Callable[..., Response] = super().__call__
        return call(target, method, body, headers, timeout, **more)


@contextmanager
def iam() -> Iterator[Iam]:
    """The double, for as long as the `with` statement."""
    with Iam() as server, in_thread(server):
        yield server


class _Handler(BaseHTTPRequestHandler):
    server: Iam

    def do_GET(self) -> None:
        accounts = "/computeMetadata/v1/instance/service-accounts/"
        path = urlsplit(self.path).path
        if self.headers.get("Metadata-Flavor") != "Google" or not path.startswith(accounts):
            self._answer(HTTPStatus.FORBIDDEN, {})
        elif path.endswith("/token"):
            self._answer(HTTPStatus.OK, {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
        else:
            self._answer(HTTPStatus.OK, {"email": MACHINE_ACCOUNT, "scopes": [], "aliases": ["default"]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        account, _, verb = self.path.rpartition("/")[2].partition(":")
        if verb != "signBlob" or self.headers["Authorization"] != f"Bearer {TOKEN}" or self.server.refusing:
            self._answer(HTTPStatus.FORBIDDEN, {"error": {"code": 403, "status": "PERMISSION_DENIED"}})
            return
        self.server.signed.append(account)
        signature = self.server.sign(base64.b64decode(body["payload"]))
        self._answer(HTTPStatus.OK, {"keyId": "1", "signedBlob": base64.b64encode(signature).decode()})

    def _answer(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response_only(status)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
