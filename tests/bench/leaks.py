"""Where a token is that should be with the hub alone: searches whatever exports left, on disks and with servers."""

import shutil
import subprocess
from pathlib import Path

from requests.structures import CaseInsensitiveDict

from tests.bench.servers import Noted

SIGNED = "X-Amz-Signature=secret"
"""What the local hub's signed URLs have: whoever has one has the file, so these are no text for a log either."""


def leaks(token: str, root: Path, noted: Noted) -> list[str]:
    """Every place where a token was found that is neither the token store nor the hub's Authorization header.

    Searched are the URLs and headers of all requests to the hub, to the host it redirects to and to the bucket, the
    bodies sent to the bucket, and every file under `root` (see `files_with`), where signed URLs are looked for too.

    Args:
        token: As it was given.
        root: A deployment's.
        noted: The servers.
    """
    found = [f"the body of a request to the bucket: {target}" for target in noted.storage.bodies_with]
    for seen in noted.hub.seen:
        headers = CaseInsensitiveDict(seen.headers)
        if seen.host == "hub":
            headers.pop("Authorization", None)
        if token in f"{seen.target} {headers}":
            found.append(f"a request to the hub's {seen.host}: {seen.method} {seen.target}")
    found += [
        f"a request to the bucket: {request.method} {request.target}"
        for request in noted.storage.seen
        if token in f"{request.target} {dict(request.headers)}"
    ]
    return found + files_with((token, SIGNED), root)


def files_with(texts: tuple[str, ...], root: Path) -> list[str]:
    """The files under a deployment's root, but for its token store, that have one of these texts.

    These are what processes printed, records, objects and tasks' disks.

    Raises:
        RuntimeError: There is no grep, or it could not read something.
    """
    grep = shutil.which("grep")
    if grep is None:
        raise RuntimeError("no grep on this machine")
    patterns = [part for text in texts for part in ("-e", text)]
    # Not read by this process: closing a database's file would end the locks that its connections have on it
    # (https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_).
    command = [grep, "--recursive", "--files-with-matches", "--fixed-strings", "--text", "--exclude-dir=tokens"]
    done = subprocess.run([*command, *patterns, str(root)], capture_output=True, text=True, check=False)
    if done.returncode > 1:
        raise RuntimeError(f"grep: {done.stderr.strip()[:500]}")
    return done.stdout.splitlines()


def is_used(token: str, noted: Noted) -> bool:
    """Whether the hub was shown the token, and then sent bytes from its other host."""
    return f"Bearer {token}" in noted.hub.authorizations and any(seen.host == "storage" for seen in noted.hub.seen)
