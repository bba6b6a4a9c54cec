"""What the local gRPC servers share: a method of a service, and the refusals of a call."""

from collections.abc import Callable
from typing import Any, NoReturn

import grpc


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
