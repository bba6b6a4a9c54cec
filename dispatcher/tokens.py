"""Where a caller's Hugging Face token waits for the exporter: never in a message, a record or a log."""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from dispatcher.errors import Misconfigured, TokenExpired, Unavailable

TOKEN_TTL_SECONDS = 7 * 24 * 3600
"""At least as long as the queue keeps a message, or a replayed message would find its token gone."""


class TokenStore(Protocol):
    """One secret per export."""

    def put(self, export_id: str, token: str) -> str:
        """Store the token, replacing an older one; returns the reference that the record may hold."""

    def get(self, ref: str) -> str:
        """The token.

        Raises:
            TokenExpired: It is gone or too old; a new POST with `hf_token` stores another.
        """

    def delete(self, ref: str) -> None:
        """Remove the token; one that is gone already is fine."""


class FileTokens:
    """Tokens in 0600 files of a 0700 directory, named by a hash of the export id."""

    def __init__(
        self,
        directory: Path,
        *,
        ttl_seconds: float = TOKEN_TTL_SECONDS,
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
        path = self._path(ref)
        try:
            with path.open(encoding="utf-8") as file:
                age = self._clock() - os.fstat(file.fileno()).st_mtime
                token = file.read()
        except FileNotFoundError as error:
            raise _expired() from error
        except OSError as error:
            raise Unavailable(f"the token store at {self._directory} cannot be read: {error.strerror}") from error
        if age > self._ttl:
            self.delete(ref)
            raise _expired()
        return token

    def delete(self, ref: str) -> None:
        try:
            self._path(ref).unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"a token in {self._directory} cannot be removed: {error.strerror}") from error

    def _path(self, ref: str) -> Path:
        # A reference comes from a record; one that is no hash could point outside the directory.
        if not re.fullmatch(r"[0-9a-f]{64}", ref):
            raise _expired()
        return self._directory / ref


def _expired() -> TokenExpired:
    return TokenExpired("the Hugging Face token of this export is gone or expired: POST again with hf_token")


def open_tokens(url: str) -> TokenStore:
    """The token store that a URL selects: `file:///directory` or `secretmanager://project`."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return FileTokens(Path(unquote(parts.path)))
    if parts.scheme == "secretmanager":
        raise Misconfigured(f"token store {url!r}: Secret Manager is not in this build yet", code="not_available_yet")
    raise Misconfigured(f"token store {url!r}: expected file:///directory or secretmanager://project")
