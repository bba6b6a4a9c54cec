"""Where a caller's Hugging Face token waits for the exporter: never in a message, a record or a log."""

import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from dispatcher.errors import Misconfigured, TokenExpired, Unavailable
from dispatcher.settings import Settings

_SECRET_MANAGER = re.compile(
    r"secretmanager://(?P<project>[a-z0-9][a-z0-9.:-]*)"
    r"(\?emulator=(?P<emulator>(127\.0\.0\.1|localhost|\[::1\]):[1-9][0-9]{0,4}))?"
)


class TokenStore(Protocol):
    """One secret per export. Each method raises Unavailable when the store does not answer."""

    def put(self, export_id: str, token: str) -> str:
        """Store the token; returns the reference that the record may hold.

        A reference handed out before, by a request made at the same time, still leads to that request's token or
        to this one.
        """

    def get(self, ref: str) -> str:
        """The token.

        Raises:
            TokenExpired: It is gone or too old; a new POST with `hf_token` stores another.
        """

    def delete(self, ref: str) -> None:
        """Remove all that is stored for the reference's export; what is gone already is fine."""


class FileTokens:
    """Tokens in 0600 files of a 0700 directory, named by a hash of the export id.

    Args:
        directory: Made when it is needed.
        ttl_seconds: After that, a token counts as gone.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        directory: Path,
        *,
        ttl_seconds: float = Settings.token_ttl_seconds,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._ttl = ttl_seconds
        self._clock = clock

    def put(self, export_id: str, token: str) -> str:
        ref = hashlib.sha256(export_id.encode()).hexdigest()
        temporary = self._directory / f".{ref}.{secrets.token_hex(8)}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._directory.chmod(0o700)  # one made earlier, or under a strange umask
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(token)
                os.replace(temporary, self._directory / ref)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise Unavailable(f"the token store at {self._directory} cannot be written: {error.strerror}") from error
        return ref

    def get(self, ref: str) -> str:
        if not _is_hash(ref):
            raise token_expired()
        try:
            with (self._directory / ref).open(encoding="utf-8") as file:
                age = self._clock() - os.fstat(file.fileno()).st_mtime
                token = file.read()
        except FileNotFoundError as error:
            raise token_expired() from error
        except OSError as error:
            raise Unavailable(f"the token store at {self._directory} cannot be read: {error.strerror}") from error
        if age > self._ttl:
            self.delete(ref)
            raise token_expired()
        return token

    def delete(self, ref: str) -> None:
        if not _is_hash(ref):
            return
        try:
            (self._directory / ref).unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"a token in {self._directory} cannot be removed: {error.strerror}") from error


def _is_hash(ref: str) -> bool:
    """A reference comes from a record; one that is no hash could point outside the directory."""
    return re.fullmatch(r"[0-9a-f]{64}", ref) is not None


class _OpenedOnUse:
    """A store that is opened with the first token: most requests and executions have none."""

    def __init__(self, opener: Callable[[], TokenStore]) -> None:
        self._opener = opener
        self._store: TokenStore | None = None
        self._lock = threading.Lock()

    def put(self, export_id: str, token: str) -> str:
        return self._opened().put(export_id, token)

    def get(self, ref: str) -> str:
        return self._opened().get(ref)

    def delete(self, ref: str) -> None:
        self._opened().delete(ref)

    def _opened(self) -> TokenStore:
        with self._lock:
            if self._store is None:
                self._store = self._opener()
            return self._store


def token_expired() -> TokenExpired:
    """What every store says of a token that it does not have, with the way out."""
    return TokenExpired("the Hugging Face token of this export is gone or expired: POST again with hf_token")


def open_tokens(url: str, *, ttl_seconds: int) -> TokenStore:
    """The token store that a URL selects: `file:///directory` or `secretmanager://project`.

    Args:
        url: Secret Manager's may end with `?emulator=127.0.0.1:PORT`, a server on this machine.
        ttl_seconds: How long a token is kept at most.

    Raises:
        Misconfigured: It selects none; the message says what is expected.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        return FileTokens(Path(unquote(parts.path)), ttl_seconds=ttl_seconds)
    found = _SECRET_MANAGER.fullmatch(url)
    if found is None:
        expected = "file:///directory or secretmanager://PROJECT (and ?emulator=127.0.0.1:PORT for a local server)"
        raise Misconfigured(f"token store {url!r}: expected {expected}")

    def opened() -> TokenStore:
        # Here, since Google's client costs a cold start a good part of a second.
        from dispatcher.secret_manager import SecretManagerTokens

        return SecretManagerTokens(found["project"], ttl_seconds=ttl_seconds, emulator=found["emulator"])

    return _OpenedOnUse(opened)
