"""What `docker build` is sent of this repository: all that .dockerignore does not leave out.

https://docs.docker.com/build/concepts/context/#dockerignore-files
"""

import re
from collections.abc import Iterator
from pathlib import Path


class Context:
    """A directory seen through its .dockerignore."""

    def __init__(self, root: Path) -> None:
        """Read the directory's .dockerignore, if it has one."""
        self.root = root
        path = root / ".dockerignore"
        lines = path.read_text().splitlines() if path.exists() else []
        patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        self._rules = [(_regex(pattern.removeprefix("!")), not pattern.startswith("!")) for pattern in patterns]

    def ignores(self, path: str) -> bool:
        """Whether a file is left out: the last pattern decides that matches it, or a directory it is in."""
        parts = path.split("/")
        parents = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        ignored = False
        for regex, leaves_out in self._rules:
            if any(regex.fullmatch(parent) for parent in parents):
                ignored = leaves_out
        return ignored

    def matching(self, pattern: str) -> list[Path]:
        """The files that a source of a COPY names, relative to the root."""
        found = sorted(path.relative_to(self.root) for path in self._files(pattern))
        return [path for path in found if not self.ignores(path.as_posix())]

    def _files(self, pattern: str) -> Iterator[Path]:
        for path in self.root.glob(pattern):
            yield from (one for one in path.rglob("*") if one.is_file()) if path.is_dir() else (path,)


def _regex(pattern: str) -> re.Pattern[str]:
    """Go's filepath.Match, and `**` for any number of directories."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.strip("/"))
    return re.compile("".join(parts.get(piece, re.escape(piece)) for piece in pieces))
