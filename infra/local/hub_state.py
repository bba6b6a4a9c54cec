"""What the hub on this machine holds, what is to happen to requests, and what was asked of it."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_goodTokenOfAnn"  # noqa: S105  # the account that has access to everything
OTHER_TOKEN = "hf_goodTokenOfEve"  # noqa: S105  # an account without access to what is gated
NARROW_TOKEN = "hf_narrowTokenOfAnn"  # noqa: S105  # fine-grained, without the permission to read


@dataclass(frozen=True)
class Fault:
    """What is to happen to a request for a file's bytes, one of these."""

    drop_after: int | None = None
    """The connection ends after so many bytes of the body."""
    status: int | None = None
    """The answer is this, with `headers`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    """The range is ignored: 200, and the file from its beginning."""
    etag: str | None = None
    """The hub tells this one instead."""
    commit: str | None = None
    """So too."""
    shifted: int = 0
    """The range that is sent begins so many bytes later than the one that was asked for."""


@dataclass(frozen=True)
class Seen:
    """A request, and which of the two servers it came to."""

    host: str
    """`hub` or `storage`"""
    method: str
    target: str
    headers: Mapping[str, str]


@dataclass
class Hub:
    """Repositories, and what was asked of them."""

    directory: Path
    """The files of `google/tiny`."""
    more: dict[str, Path] = field(default_factory=dict)
    """The files of every other one by its id."""
    url: str = ""
    storage_url: str = ""
    """Where large files are sent from."""
    gated: bool = False
    """Files need a token of an account with access; what the repositories are, anybody may know."""
    private: bool = False
    """Nothing is told without a token."""
    disabled: bool = False
    expired: bool = False
    """All tokens are."""
    unlisted: bool = False
    """The listing has names alone, as that of some mirrors."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """What the listings have besides, of files that are not there: each a name (`rfilename`) and a size."""
    broken: bool = False
    """503 to everything."""
    bytes_per_second: int | None = None
    """Of each connection."""
    before: Callable[[Seen], object] = lambda seen: None
    """Called before each request is answered; while it does not return, the hub says nothing."""
    authorizations: set[str | None] = field(default_factory=set)
    """What came to the hub's own port."""
    seen: list[Seen] = field(default_factory=list)
    fetched: set[str] = field(default_factory=set)
    """The files that were sent whole to who asked for no range, as `owner/name/file`."""
    tags: set[tuple[str, str]] = field(default_factory=set)
    """Revisions besides `main` and the commit: of which repository, and their name."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Of old ids the new one, to which the hub redirects."""
    faults: dict[str, list[Fault | None]] = field(default_factory=lambda: {"hub": [], "storage": []})
    """What happens to the next requests for ranges, in order; None lets one pass."""
    connections: dict[str, int] = field(default_factory=lambda: {"hub": 0, "storage": 0})
    """How many came to each of the two."""
    signatures: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def paths(self) -> list[str]:
        """The targets of all requests to the hub's own port."""
        return [seen.target for seen in self.seen if seen.host == "hub"]

    def repository(self, path: str) -> tuple[str, Path] | None:
        """The id and directory that a request's path is about."""
        known = {"google/tiny": self.directory, **self.more}
        found = re.match(r"/(?:api/models/)?([^/]+/[^/]+)", path)
        return (found[1], known[found[1]]) if found and found[1] in known else None

    def fault(self, host: str) -> Fault:
        """What is to happen to a request for a range that came to `host`."""
        try:
            return self.faults[host].pop(0) or Fault()
        except IndexError:
            return Fault()

    def asked(self) -> list[tuple[int, int]]:
        """The ranges that were asked of the second host: first byte and the one after the last."""
        ranges = [seen.headers.get("Range", "") for seen in self.seen if seen.host == "storage"]
        found = [re.fullmatch(r"bytes=(\d+)-(\d+)", text) for text in ranges]
        return [(int(match[1]), int(match[2]) + 1) for match in found if match]
