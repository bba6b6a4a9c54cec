"""A laptop: a state directory, the real command line, and a server that can be killed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dispatcher.sqlite_records import SqliteRecords

CLI = [sys.executable, "-c", "from dispatcher.cli import main; main()"]


class Laptop:
    """Runs `gemma-export` as its user would, on a state directory of its own."""

    def __init__(self, root: Path, **environment: str) -> None:
        self.root = root
        self.home = root / "home"
        self.environment = {**os.environ, "GEMMA_EXPORT_HOME": str(self.home), **environment}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One command to its end."""
        return subprocess.run(
            [*CLI, *arguments],
            capture_output=True,
            text=True,
            env=self.environment | environment,
            cwd=self.root,
            timeout=120,
            check=False,
        )

    def lines(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        """What a command says with --json; every line of it is one object."""
        done = self.run(*arguments, "--json")
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def bad_adapter(self) -> Path:
        """A directory that is taken for an adapter until someone reads it."""
        directory = self.root / "bad-adapter"
        directory.mkdir(exist_ok=True)
        (directory / "adapter_config.json").write_text("{}")
        (directory / "adapter_model.safetensors").write_bytes(b"damaged")
        return directory

    @contextmanager
    def records(self) -> Iterator[SqliteRecords]:
        store = SqliteRecords(self.home / "records.db")
        try:
            yield store
        finally:
            store.close()

    @contextmanager
    def serving(self, *arguments: str) -> "Iterator[tuple[subprocess.Popen[str], str]]":
        """`gemma-export serve` on a free port, once it listens, and its URL; killed at the end."""
        with subprocess.Popen(
            [*CLI, "serve", "--port", "0", "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment,
            cwd=self.root,
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                yield process, json.loads(line)["url"]
            finally:
                process.kill()
