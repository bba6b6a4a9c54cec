"""What holds for every test: no hub, and libraries that stay quiet; and the servers that several of them share."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn, TypeVar

import pytest
from hypothesis import settings

from infra.local import servers, storage

# Set before any of these libraries is imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)

# Each comparison of logits takes whole models and the seconds to import what loads them; the tests of the logits, the
# matrix and the demo ask for it.
os.environ.setdefault("VERIFY_LOGITS", "never")

# A busy machine is no reason for a property test to fail.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

MISSING = "MISSING SERVER"
Server = TypeVar("Server")


@contextmanager
def shared(
    start: Callable[[], AbstractContextManager[Server]], variable: str, address: Callable[[Server], str] = str
) -> Iterator[Server]:
    """A server for the whole session, whose address clients find in an environment variable.

    Where it is missing, tests that need it are skipped, and fail in CI.
    """
    try:
        with start() as server, pytest.MonkeyPatch.context() as patch:
            patch.setenv(variable, address(server))
            yield server
    except servers.MissingServerError as error:
        missing(error)


def missing(error: servers.MissingServerError) -> NoReturn:
    """Skip a test that needs a server which is not here; in CI, where it has to be, fail it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{MISSING} {error}")


@pytest.fixture(scope="session")
def firestore_server() -> Iterator[str]:
    """Firestore's emulator; projects are made by naming them."""
    with shared(servers.firestore, "FIRESTORE_EMULATOR_HOST") as address:
        yield address


@pytest.fixture(scope="session")
def pubsub_server() -> Iterator[str]:
    """Pub/Sub's emulator; projects are made by naming them."""
    with shared(servers.pubsub, "PUBSUB_EMULATOR_HOST") as address:
        yield address


@pytest.fixture(scope="session")
def storage_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[storage.StorageProxy]:
    """Cloud Storage, with faults on demand; buckets have to be made."""
    directory = tmp_path_factory.mktemp("storage")
    with shared(lambda: storage.storage_proxy(directory), "STORAGE_EMULATOR_HOST", lambda proxy: proxy.url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def storage_server(storage_proxy: storage.StorageProxy) -> str:
    """Cloud Storage's URL."""
    return storage_proxy.url


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One loud line for all that was skipped for want of a server."""
    skipped = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []) if report.longrepr]
    missing = sorted({reason.partition(MISSING)[2].strip() for reason in skipped if MISSING in reason})
    if missing:
        count = sum(MISSING in reason for reason in skipped)
        line = f"{count} TESTS AGAINST GOOGLE'S SERVERS WERE SKIPPED: {'; '.join(missing)}"
        terminalreporter.write_line(line, red=True, bold=True)
