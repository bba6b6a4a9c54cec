"""Google's gRPC clients, of the service itself or of a local server: for services whose clients look for no emulator.

Firestore, Pub/Sub and Cloud Storage have a variable of their own for that. For the others a URL of ours may end with
`?emulator=127.0.0.1:PORT`.
"""

from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import grpc

Client = TypeVar("Client")


def emulator_of(url: str) -> str | None:
    """The `host:port` of the local server that a URL names; None is Google's own service."""
    return next(iter(parse_qs(urlsplit(url).query).get("emulator", [])), None)


def connected(client: type[Client], emulator: str | None) -> Client:
    """A client.

    Args:
        client: Its class, one of those that Google generates.
        emulator: `host:port` of a local server, spoken to without TLS and without credentials; None is Google's own
            service.

    Raises:
        google.auth.exceptions.DefaultCredentialsError: There are no credentials, and no local server.
    """
    generated: Any = client  # the generated classes have no common type
    made: Client
    if emulator is None:
        made = generated()
    else:
        # A proxy for the way out knows no server on this machine.
        channel = grpc.insecure_channel(emulator, options=[("grpc.enable_http_proxy", 0)])
        made = generated(transport=generated.get_transport_class("grpc")(channel=channel))
    return made
