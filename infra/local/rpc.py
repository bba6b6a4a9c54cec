"""What the local gRPC servers share: a server on a free port, a method of a service, and the refusals of a call."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc

from infra.local.servers import HOST

CALLS_AT_ONCE = 32


@contextmanager
def serving(*services: grpc.GenericRpcHandler) -> Iterator[str]:
    """A server on a free port, in threads of this process; yields its `host:port`."""
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers(services)
        port = server.add_insecure_port(f"{HOST}:0")
        server.start()
        try:
            yield f"{HOST}:{port}"
        finally:
            server.stop(grace=None).wait()


def method(answer: Callable[..., object], request: Any, serializer: Callable[..., bytes]) -> grpc.RpcMethodHandler:
    """A method that takes one message and gives one.

    Args:
        answer: Called with the request and its `grpc.ServicerContext`.
        request: The request's class, of proto-plus.
        serializer: Makes bytes of what `answer` returns.
    """
    return grpc.unary_unary_rpc_method_handler(
        answer, request_deserializer=request.deserialize, response_serializer=serializer
    )


def abort(context: grpc.ServicerContext, status: grpc.StatusCode, details: str) -> NoReturn:
    """End the call with this status."""
    context.abort(status, details)
    raise AssertionError("gRPC's abort always raises")


def deny(context: grpc.ServicerContext, permission: str, resource: str) -> NoReturn:
    """End the call as IAM does, which looks for no resource before it has looked at the permission."""
    details = f"Permission '{permission}' denied on resource '{resource}' (or it may not exist)."
    abort(context, grpc.StatusCode.PERMISSION_DENIED, details)
