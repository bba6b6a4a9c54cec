"""Secret Manager on this machine: a server that speaks the API's own gRPC and keeps secrets in memory."""

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import google_crc32c
import grpc
from google.cloud import secretmanager as api
from google.protobuf import empty_pb2

from infra.local.rpc import abort, deny, method, serving

NUMBER = "123456789012"
"""The project's number, which Secret Manager puts into every name it answers, whatever it was asked with."""
_State = api.SecretVersion.State
_SECRET_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")

Request = (
    api.CreateSecretRequest
    | api.GetSecretRequest
    | api.UpdateSecretRequest
    | api.DeleteSecretRequest
    | api.AddSecretVersionRequest
    | api.AccessSecretVersionRequest
    | api.DisableSecretVersionRequest
    | api.DestroySecretVersionRequest
)
_PERMISSIONS: dict[type, str] = {
    api.CreateSecretRequest: "secretmanager.secrets.create",
    api.GetSecretRequest: "secretmanager.secrets.get",
    api.UpdateSecretRequest: "secretmanager.secrets.update",
    api.DeleteSecretRequest: "secretmanager.secrets.delete",
    api.AddSecretVersionRequest: "secretmanager.versions.add",
    api.AccessSecretVersionRequest: "secretmanager.versions.access",
    api.DisableSecretVersionRequest: "secretmanager.versions.disable",
    api.DestroySecretVersionRequest: "secretmanager.versions.destroy",
}


@dataclass
class _Version:
    payload: bytes
    state: int = _State.ENABLED


@dataclass
class _Secret:
    expires: float | None
    """Seconds since the epoch."""
    versions: list[_Version] = field(default_factory=list)
    """Number 1 comes first; a destroyed one stays, without its payload."""


class LocalSecretManager:
    """One project's secrets. Of a secret only its time to live is kept; there are no etags, labels or aliases.

    Args:
        project: The project's id; in requests, `NUMBER` does as well.
        clock: Seconds since the epoch, by which secrets expire.
    """

    def __init__(self, project: str, *, clock: Callable[[], float] = time.time) -> None:
        self.requests: list[Request] = []
        """Every request received, whatever became of it."""
        self.denied: set[str] = set()
        """The permissions that callers lack."""
        self._parents = (f"projects/{project}", f"projects/{NUMBER}")
        self._clock = clock
        self._secrets: dict[str, _Secret] = {}
        self._refusals: deque[tuple[grpc.StatusCode | None, str]] = deque()
        self._answers_to_lose = 0
        self._lingering = 0
        self._damages = False
        self._lock = threading.RLock()

    def payloads(self) -> list[bytes]:
        """What is stored, of every version of every secret."""
        with self._lock:
            self._expire()
            versions = [version for secret in self._secrets.values() for version in secret.versions]
            return [version.payload for version in versions if version.state != _State.DESTROYED]

    def refuse(self, status: grpc.StatusCode, times: int = 1, *, method: str = "", skip: int = 0) -> None:
        """Answer the next calls, of one method or of any, with this status and do nothing; after `skip` others."""
        with self._lock:
            self._refusals.extend([(None, method)] * skip + [(status, method)] * times)

    def lose_answers(self, times: int = 1) -> None:
        """Do what the next AddSecretVersion calls ask for, and then answer UNAVAILABLE."""
        with self._lock:
            self._answers_to_lose += times

    def linger(self, times: int = 1) -> None:
        """Let the next CreateSecret calls find the secret there, as if its deletion had not got around yet."""
        with self._lock:
            self._lingering += times

    def damage_payloads(self) -> None:
        """Let every payload arrive with its first byte changed, at this server and at its clients."""
        self._damages = True

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Listen on a free port and yield `host:port`."""
        with serving(self._service()) as address:
            yield address

    def _service(self) -> grpc.GenericRpcHandler:
        secret, version = api.Secret.serialize, api.SecretVersion.serialize
        accessed = api.AccessSecretVersionResponse.serialize
        nothing = empty_pb2.Empty.SerializeToString
        methods = {
            "CreateSecret": method(self._create, api.CreateSecretRequest, secret),
            "GetSecret": method(self._get, api.GetSecretRequest, secret),
            "UpdateSecret": method(self._update, api.UpdateSecretRequest, secret),
            "DeleteSecret": method(self._delete, api.DeleteSecretRequest, nothing),
            "AddSecretVersion": method(self._add, api.AddSecretVersionRequest, version),
            "AccessSecretVersion": method(self._access, api.AccessSecretVersionRequest, accessed),
            "DisableSecretVersion": method(self._disable, api.DisableSecretVersionRequest, version),
            "DestroySecretVersion": method(self._destroy, api.DestroySecretVersionRequest, version),
        }
        return grpc.method_handlers_generic_handler("google.cloud.secretmanager.v1.SecretManagerService", methods)

    def _create(self, request: api.CreateSecretRequest, context: grpc.ServicerContext) -> api.Secret:
        with self._received(request, context):
            if request.parent not in self._parents:
                abort(context, grpc.StatusCode.PERMISSION_DENIED, f"No access to '{request.parent}', if it exists.")
            if not _SECRET_ID.fullmatch(request.secret_id) or "automatic" not in request.secret.replication:
                abort(context, grpc.StatusCode.INVALID_ARGUMENT, "A secret_id and automatic replication are needed.")
            lingers = self._lingering > 0
            self._lingering -= lingers
            if lingers or request.secret_id in self._secrets:
                abort(context, grpc.StatusCode.ALREADY_EXISTS, f"Secret [{request.secret_id}] already exists.")
            self._secrets[request.secret_id] = _Secret(self._expiry(request.secret, context))
            return self._described(request.secret_id)

    def _get(self, request: api.GetSecretRequest, context: grpc.ServicerContext) -> api.Secret:
        with self._received(request, context):
            return self._described(self._known(request.name, context))

    def _update(self, request: api.UpdateSecretRequest, context: grpc.ServicerContext) -> api.Secret:
        with self._received(request, context):
            if list(request.update_mask.paths) != ["ttl"]:
                abort(context, grpc.StatusCode.INVALID_ARGUMENT, "This server updates the ttl alone.")
            secret_id = self._known(request.secret.name, context)
            self._secrets[secret_id].expires = self._expiry(request.secret, context)
            return self._described(secret_id)

    def _delete(self, request: api.DeleteSecretRequest, context: grpc.ServicerContext) -> empty_pb2.Empty:
        with self._received(request, context):
            del self._secrets[self._known(request.name, context)]
            return empty_pb2.Empty()

    def _add(self, request: api.AddSecretVersionRequest, context: grpc.ServicerContext) -> api.SecretVersion:
        with self._received(request, context):
            secret_id = self._known(request.parent, context)
            data = self._carried(request.payload.data)
            if "data_crc32c" in request.payload and request.payload.data_crc32c != google_crc32c.value(data):
                abort(context, grpc.StatusCode.INVALID_ARGUMENT, "The payload's checksum is another.")
            versions = self._secrets[secret_id].versions
            versions.append(_Version(data))
            lost = self._answers_to_lose > 0
            self._answers_to_lose -= lost
            if lost:
                abort(context, grpc.StatusCode.UNAVAILABLE, "The answer was lost.")
            return api.SecretVersion(name=_name(secret_id, len(versions)), state=versions[-1].state)

    def _access(
        self, request: api.AccessSecretVersionRequest, context: grpc.ServicerContext
    ) -> api.AccessSecretVersionResponse:
        with self._received(request, context):
            name, version = self._version(request.name, context)
            if version.state != _State.ENABLED:
                details = f"Secret Version [{name}] is in {_State(version.state).name} state."
                abort(context, grpc.StatusCode.FAILED_PRECONDITION, details)
            checksum = google_crc32c.value(version.payload)
            payload = api.SecretPayload(data=self._carried(version.payload), data_crc32c=checksum)
            return api.AccessSecretVersionResponse(name=name, payload=payload)

    def _disable(self, request: api.DisableSecretVersionRequest, context: grpc.ServicerContext) -> api.SecretVersion:
        return self._ended(request, context, _State.DISABLED)

    def _destroy(self, request: api.DestroySecretVersionRequest, context: grpc.ServicerContext) -> api.SecretVersion:
        return self._ended(request, context, _State.DESTROYED)

    def _ended(
        self,
        request: api.DisableSecretVersionRequest | api.DestroySecretVersionRequest,
        context: grpc.ServicerContext,
        state: int,
    ) -> api.SecretVersion:
        with self._received(request, context):
            name, version = self._version(request.name, context)
            if version.state == _State.DESTROYED:
                details = f"Secret Version [{name}] is already destroyed."
                abort(context, grpc.StatusCode.FAILED_PRECONDITION, details)
            version.state = state
            if state == _State.DESTROYED:
                version.payload = b""
            return api.SecretVersion(name=name, state=state)

    @contextmanager
    def _received(self, request: Request, context: grpc.ServicerContext) -> Iterator[None]:
        """One call at a time, on what has not expired."""
        with self._lock:
            self.requests.append(request)
            if self._refusals and type(request).__name__.startswith(self._refusals[0][1]):
                status, _ = self._refusals.popleft()
                if status is not None:
                    abort(context, status, "Refused, as a test wants it.")
            if (permission := _PERMISSIONS[type(request)]) in self.denied:
                deny(context, permission, self._parents[0])
            self._expire()
            yield

    def _carried(self, data: bytes) -> bytes:
        return b"?" + data[1:] if self._damages else data

    def _expire(self) -> None:
        now = self._clock()
        gone = [name for name, secret in self._secrets.items() if secret.expires is not None and secret.expires <= now]
        for name in gone:
            del self._secrets[name]

    def _expiry(self, secret: api.Secret, context: grpc.ServicerContext) -> float | None:
        if "ttl" not in secret:
            return None
        seconds = secret.ttl.total_seconds()
        if seconds <= 0:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "The ttl must be positive.")
        return self._clock() + float(seconds)

    def _known(self, name: str, context: grpc.ServicerContext) -> str:
        parent, _, secret_id = name.partition("/secrets/")
        if parent not in self._parents or secret_id not in self._secrets:
            abort(context, grpc.StatusCode.NOT_FOUND, f"Secret [{name}] not found.")
        return secret_id

    def _version(self, name: str, context: grpc.ServicerContext) -> tuple[str, _Version]:
        secret, _, wanted = name.partition("/versions/")
        secret_id = self._known(secret, context)
        versions = self._secrets[secret_id].versions
        number = len(versions) if wanted == "latest" else int(wanted) if wanted.isdecimal() else 0
        if not 1 <= number <= len(versions):
            abort(context, grpc.StatusCode.NOT_FOUND, f"Secret Version [{name}] not found.")
        return _name(secret_id, number), versions[number - 1]

    def _described(self, secret_id: str) -> api.Secret:
        expires = self._secrets[secret_id].expires
        secret = api.Secret(name=_name(secret_id))
        if expires is not None:  # asked for as a ttl, it is answered as a time
            secret.expire_time = datetime.fromtimestamp(expires, UTC)
        return secret


def _name(secret_id: str, version: int | None = None) -> str:
    name = f"projects/{NUMBER}/secrets/{secret_id}"
    return name if version is None else f"{name}/versions/{version}"
