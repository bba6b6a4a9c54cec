"""Runs what `infra.images_build` built, as Cloud Run would: the image's environment and user, and nothing else."""

import base64
import http.client
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from infra.functions import SIGNATURES
from infra.images_build import Image
from infra.images_report import Report, StepFailed
from infra.local import servers

HEAVY = ("torch", "transformers", "safetensors", "peft", "numpy", "exporter")
"""Nothing of the exporter's may be in the dispatcher's image."""
_PUSH = "/projects/local-project/topics/gemma-export"
"""functions-framework knows a raw push of Pub/Sub's by this form of the path."""
_SECONDS = 60


def check_dispatcher(image: Image, report: Report, root: Path) -> None:
    """Serve each function, and ask it something.

    Raises:
        StepFailed: The image holds what it must not, or a function does not answer as it should.
    """
    with report.step("dispatcher runs: it knows its version, and has nothing of the exporter's and no pip"):
        _knows_its_version(image, report, root)
        _knows_its_user(image, report)
        _lacks(image, report, (*HEAVY, "pip"))
    asked: Mapping[str, Callable[[int], None]] = {
        "export_api": lambda port: _expect(port, "GET", "/health", None, (200,)),
        "start_export": lambda port: _expect(port, "POST", _PUSH, _message("no-such-job"), (200,)),
        "fail_export": lambda port: _expect(port, "POST", _PUSH, _message("no-such-job"), (200,)),
        "sweep": lambda port: _expect(port, "POST", "/", None, (200,)),
    }
    for target, ask in asked.items():
        with report.step(f"dispatcher runs: FUNCTION_TARGET={target}"), _served(image, target) as port:
            ask(port)
    report.left()


@contextmanager
def _served(image: Image, target: str) -> Iterator[int]:
    """A function, started as the image starts it; yields its port."""
    environment = _environment(image) | {
        "FUNCTION_TARGET": target,
        "FUNCTION_SIGNATURE_TYPE": SIGNATURES[target],
        "HOST": servers.HOST,  # in a container it is 0.0.0.0, which here would be the whole network
    }
    command = _command(image, image.entrypoint)

    def on(port: int) -> list[str]:
        # The port is told by the environment alone, as Cloud Run does.
        return ["env", "-C", str(image.workdir), f"PORT={port}", *command]

    path = "/health" if target == "export_api" else "/"
    log = image.root.parent / f"{target}.log"
    with servers.running(f"the function {target}", on, path=path, environment=environment, log=log) as server:
        yield server.port


def check_exporter(image: Image, report: Report, root: Path) -> None:
    """Ask the exporter for its help, and have it make real exports of a tiny model.

    Raises:
        StepFailed: The image holds Unsloth, or the exporter does not do its work.
    """
    python = image.entrypoint[0]
    with report.step("exporter   runs: it knows its version, and has no Unsloth and no pip"):
        _knows_its_version(image, report, root)
        _knows_its_user(image, report)
        _lacks(image, report, ("unsloth", "unsloth_zoo", "pip"))
    with report.step("exporter   runs: python -m exporter --help"):
        said = _run(image, report, [*image.entrypoint, "--help"])
        if "JOB_ID" not in said:
            raise StepFailed(f"its help does not speak of a JOB_ID: {said[:500]}")
    with report.step("exporter   runs: gemma-export demo, which exports an adapter, a merged model and a GGUF"):
        said = _run(image, report, [python, "-c", "from dispatcher.cli import main; main()", "demo"])
        if "It works." not in said:
            raise StepFailed(f"the demo ends without saying that it works: {said[-1000:]}")


def _knows_its_version(image: Image, report: Report, root: Path) -> None:
    expected = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    code = "import importlib.metadata as m, dispatcher.openapi as o; print(m.version('gemma-export'), o.__file__)"
    version, _, file = _run(image, report, [image.entrypoint[0], "-c", code]).strip().partition(" ")
    if version != expected or not file.startswith(str(image.root)):
        raise StepFailed(f"expected gemma-export {expected} under {image.root}, found {version} at {file}")


def _lacks(image: Image, report: Report, modules: tuple[str, ...]) -> None:
    code = f"from importlib.util import find_spec; print(*[name for name in {modules!r} if find_spec(name)])"
    found = _run(image, report, [image.entrypoint[0], "-c", code]).strip()
    if found:
        raise StepFailed(f"the image holds {found}")


def _knows_its_user(image: Image, report: Report) -> None:
    """The user is a number, which no file has a name for; torch asks for one, and fails without."""
    name = _run(image, report, [image.entrypoint[0], "-c", "import getpass; print(getpass.getuser())"]).strip()
    if name != image.environment.get("LOGNAME"):
        raise StepFailed(f"the image has no LOGNAME: its user is called {name}, which is this machine's name for it")


def _run(image: Image, report: Report, command: list[str]) -> str:
    return report.run(_command(image, command), environment=_environment(image), place=image.workdir)


def _environment(image: Image) -> dict[str, str]:
    """The image's own, and this machine's scratch directory for the one that an image's root would have."""
    return {**image.environment, "TMPDIR": image.environment["HOME"]}


def _command(image: Image, command: list[str]) -> list[str]:
    """A command as the image's user, where this process may become one.

    It may read what that user may not, for this machine's Python can lie in somebody's home; write it may not.
    """
    program = shutil.which(command[0], path=image.environment["PATH"])
    if program is None:
        raise StepFailed(f"there is no {command[0]} in the image")
    command = [program, *command[1:]]
    if os.geteuid() != 0:
        return command
    user, _, group = image.user.partition(":")
    reading = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    return ["setpriv", f"--reuid={user}", f"--regid={group or user}", "--clear-groups", *reading, *command]


def _message(job_id: str) -> bytes:
    """A push of Pub/Sub's, of an export that nobody asked for: it is acknowledged, and nothing is started."""
    body = json.dumps({"schema_version": 1, "job_id": job_id, "export_id": f"{job_id}.merged"}).encode()
    message = {"data": base64.b64encode(body).decode(), "attributes": {}, "messageId": "1"}
    return json.dumps({"message": message, "subscription": "local"}).encode()


def _expect(port: int, method: str, path: str, body: bytes | None, statuses: tuple[int, ...]) -> None:
    connection = http.client.HTTPConnection(servers.HOST, port, timeout=_SECONDS)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        text = response.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise StepFailed(f"{method} {path}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if response.status not in statuses:
        raise StepFailed(f"{method} {path}: {response.status}, where {statuses} was expected: {text}")
    if "gunicorn" not in (response.getheader("Server") or ""):
        raise StepFailed(f"{method} {path} is answered by {response.getheader('Server')}, not by gunicorn")
