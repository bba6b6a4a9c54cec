"""The dispatcher behind real HTTP: functions-framework's app on a free port of this machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from dispatcher import bootstrap
from dispatcher.serve import local_app, open_server
from dispatcher.settings import Settings
from infra.local.servers import HOST, in_thread
from tests.dispatcher.world import World


def stack_of(world: World, settings: Settings) -> bootstrap.Stack:
    """A world as the targets find it."""
    return bootstrap.Stack(
        settings=settings,
        records=world.records,
        artifacts=world.artifacts,
        tokens=world.tokens,
        queue=world.queue,
        runner=world.machines,
        trigger=world.trigger,
        service=world.service,
    )


@contextmanager
def served(world: World, *, user: str | None = "ann", environ: dict[str, str] | None = None) -> Iterator[httpx.Client]:
    """Serves a world's stores; `user` is the local user, `environ` what the settings are read from."""
    settings = Settings.from_env(environ or {"GEMMA_EXPORT_HOME": str(world.home)})
    bootstrap.install(stack_of(world, settings))
    server = open_server(local_app(user), 0)
    url = f"http://{HOST}:{server.server_port}"
    try:
        with in_thread(server), httpx.Client(base_url=url, timeout=30) as client:
            yield client
    finally:
        server.server_close()
        bootstrap.install(None)
