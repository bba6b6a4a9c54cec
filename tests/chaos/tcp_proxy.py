"""A TCP proxy on this machine that can be cut, and connected again: what a server looks like that is away."""

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import BaseRequestHandler, ThreadingTCPServer

from infra.local.servers import HOST, in_thread

BLOCK = 1 << 16
POLL_SECONDS = 0.05


class TcpProxy(ThreadingTCPServer):
    """Passes bytes on in both directions.

    Args:
        upstream: `host:port`.

    Attributes:
        address: `host:port` where it listens.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, upstream: str) -> None:
        super().__init__((HOST, 0), _Connection)
        host, _, port = upstream.rpartition(":")
        self.upstream = (host, int(port))
        self.address = f"{HOST}:{self.server_address[1]}"
        self.away = threading.Event()
        """While it is set, connections end, and new ones too."""


class _Connection(BaseRequestHandler):
    server: TcpProxy

    def handle(self) -> None:
        if self.server.away.is_set():
            return
        with socket.create_connection(self.server.upstream) as upstream:
            to = {self.request: upstream, upstream: self.request}
            while not self.server.away.is_set():
                for ready in select.select(list(to), [], [], POLL_SECONDS)[0]:
                    try:
                        data = ready.recv(BLOCK)
                        to[ready].sendall(data)
                    except OSError:
                        return
                    if not data:
                        return


@contextmanager
def tcp_proxy(upstream: str) -> Iterator[TcpProxy]:
    """A proxy that listens until the `with` statement ends."""
    with TcpProxy(upstream) as proxy, in_thread(proxy):
        yield proxy
        proxy.away.set()
