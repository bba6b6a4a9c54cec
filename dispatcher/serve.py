"""`gemma-export serve`: the dispatcher on loopback, for the one user of this machine."""

import logging
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import functions_framework
from werkzeug.serving import WSGIRequestHandler, make_server

from dispatcher import bootstrap, main
from dispatcher.errors import ExportError, Misconfigured
from dispatcher.sweep import swept

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from werkzeug.serving import BaseWSGIServer

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
LONGEST_SWEEP_SECONDS = 30.0


class _QuietHandler(WSGIRequestHandler):
    """Without werkzeug's own line per request: the dispatcher logs each as JSON."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def local_app(user: str | None) -> "WSGIApplication":
    """The HTTP target as functions-framework serves it, with `user` as whoever comes without an identity.

    A page in this machine's browser can reach loopback too, so a request that names another host, or that
    comes from another origin, has no local user.
    """
    app = functions_framework.create_app("export_api", str(Path(main.__file__)), "http")

    def with_user(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if user and _is_local(environ):
            environ[main.LOCAL_USER_KEY] = user
        answer: Iterable[bytes] = app(environ, start_response)
        return answer

    return with_user


def _is_local(environ: "WSGIEnvironment") -> bool:
    host = str(environ.get("HTTP_HOST", ""))
    origin = environ.get("HTTP_ORIGIN")
    name = host.rpartition(":")[0] or host
    return name in ("127.0.0.1", "localhost") and (origin is None or origin == f"http://{host}")


def open_server(app: "WSGIApplication", port: int) -> "BaseWSGIServer":
    """A threaded server that listens on loopback already; port 0 takes a free one.

    Raises:
        Misconfigured: The port is taken.
    """
    try:
        return make_server(HOST, port, app, threaded=True, request_handler=_QuietHandler)
    except (OSError, SystemExit) as error:  # werkzeug prints and exits when the port is taken
        raise Misconfigured(f"port {port} on {HOST} cannot be had: {error}", code="port_taken") from error


def serve(stack: bootstrap.Stack, *, user: str, port: int, listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; what waited in the records when the last one ended is started first.

    Args:
        stack: The embedded stack; closed at the end.
        user: Who a caller without an identity is.
        port: TCP port on loopback; 0 takes a free one.
        listening: Told the bound URL, once it can be reached.

    Raises:
        Misconfigured: A cloud setting is there, with which there must be no local user.
    """
    if not stack.settings.embedded:
        raise Misconfigured("serve is for this machine alone: unset PROJECT_ID and every other cloud setting")
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    previous: dict[int, Any] = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    bootstrap.install(stack)
    server = open_server(local_app(user), port)
    thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    try:
        thread.start()
        listening(f"http://{HOST}:{server.server_port}")
        _sweep(stack, lost_messages=True)
        while not stop.wait(min(stack.settings.lease_seconds / 4, LONGEST_SWEEP_SECONDS)):
            _sweep(stack)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        bootstrap.install(None)
        stack.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _sweep(stack: bootstrap.Stack, *, lost_messages: bool = False) -> None:
    try:
        done = swept(stack.trigger, stack.collector, lost_messages=lost_messages)
    except ExportError as error:
        logger.warning("the sweep did not get through, the next one may: %s", error)
    else:
        if any(done.values()):
            logger.info("swept", extra=done)
