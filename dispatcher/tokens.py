"""Where a caller's Hugging Face token waits for the exporter: never in a message, a record or a log."""

import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from dispatcher.errors import Misconfigured, TokenExpired, Unavailable
from dispatcher.settings import Settings

logger = logging.getLogger(__name__)

KEPT_TOKENS = 10
"""Requests made at once each put a token and write its reference to the record, in any order: the record may end
with any of theirs, so as many stay readable."""
_SECRET_MANAGER = re.compile(
    r"secretmanager://(?P<project>[a-z0-9][a-z0-9.:-]*)"
    r"(\?emulator=(?P<emulator>(127\.0\.0\.1|localhost|\[::1\]):[1-9][0-9]{0,4}))?"
)


class TokenStore(Protocol):
    """Tokens by export, the newest last. Each method raises Unavailable when the store does not answer."""

    def put(self, export_id: str, token: str) -> str:
        """Store the token; returns the reference that the record may hold.

        None is handed out twice within its token's time to live, or a late `delete` could hit another token.
        Of each export the last `KEPT_TOKENS` stay readable: of more requests than that at once, the record may end
        with a reference whose token is gone.
        """

    def get(self, ref: str) -> str:
        """The token.

        Raises:
            TokenExpired: It is gone or too old; a new POST with `hf_token` stores another.
        """

    def delete(self, ref: str) -> None:
        """Remove this token and the older ones of its export; what is gone already is fine.

        A newer one stays: it came with a request to do the export again.
        """


class FileTokens:
    """Tokens in 0600 files of a 0700 directory, each named by a hash of its export id, its time and chance.

    Args:
        directory: Made when it is needed.
        ttl_seconds: After that, a token counts as gone; the next `put` removes its file.
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
        export = hashlib.sha256(export_id.encode()).hexdigest()
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._directory.chmod(0o700)  # one made earlier, or under a strange umask
            older = self._files(export)
            # Later than those, whatever the clock says: the order is what `delete` goes by.
            stamp = max([int(self._clock() * 1e6), *(file.stamp + 1 for file in older)])
            ref = f"{export}.{stamp:017d}.{secrets.token_hex(8)}"
            # No temporary name is needed: before the reference is handed out, nobody looks for this one.
            descriptor = os.open(self._directory / ref, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(token)
            except BaseException:
                (self._directory / ref).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise Unavailable(f"the token store at {self._directory} cannot be written: {error.strerror}") from error
        self._purge(export)
        return ref

    def get(self, ref: str) -> str:
        found = _File.of(ref)
        if found is None:
            raise token_expired()
        if self._is_old(found):
            self.delete(ref)
            raise token_expired()
        try:
            return (self._directory / ref).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise token_expired() from error
        except OSError as error:
            raise Unavailable(f"the token store at {self._directory} cannot be read: {error.strerror}") from error

    def delete(self, ref: str) -> None:
        last = _File.of(ref)
        if last is None:
            return
        try:
            for file in self._files(last.export):
                if file.stamp < last.stamp or file.name == ref:
                    (self._directory / file.name).unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"a token in {self._directory} cannot be removed: {error.strerror}") from error

    def _purge(self, export: str) -> None:
        """Remove what is too old, of any export, and what is one too many, of this one."""
        try:
            old = [file for file in self._files() if self._is_old(file)]
            for file in [*old, *self._files(export)[:-KEPT_TOKENS]]:
                (self._directory / file.name).unlink(missing_ok=True)
        except OSError as error:
            # The new token is stored, which is what was asked for.
            logger.warning("old tokens in %s stay for now: %s", self._directory, error.strerror)

    def _files(self, export: str | None = None) -> list["_File"]:
        """Every token's file, or those of one export, the oldest first; anything else there is not ours."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        files = [file for file in map(_File.of, names) if file is not None and export in (None, file.export)]
        return sorted(files, key=lambda file: (file.stamp, file.name))

    def _is_old(self, file: "_File") -> bool:
        return self._clock() - file.stamp / 1e6 > self._ttl


@dataclass(frozen=True)
class _File:
    """What the name of a token's file says, which is also its reference."""

    name: str
    export: str
    stamp: int
    """Microseconds since the epoch."""

    @classmethod
    def of(cls, name: str) -> "_File | None":
        """None for any other name: a reference comes from a record, and could lead out of the directory."""
        match = re.fullmatch(r"([0-9a-f]{64})\.([0-9]{17})\.[0-9a-f]{16}", name)
        return cls(name, match[1], int(match[2])) if match else None


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
