"""`gemma-export demo`: the whole product on one machine, from a fine-tuning to a merged model and a GGUF that know it.

Everything happens as it does for a user: the dispatcher is a process of its own and is spoken to over HTTP, and the
models are made and asked in `exporter.demo` and `exporter.demo_llama`, since nothing here may load torch.
"""

import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.markup import escape

from dispatcher.artifacts import path_of
from dispatcher.client import HttpClient, follow
from dispatcher.errors import ExportError
from dispatcher.progress import shown
from dispatcher.settings import Settings

JOB_ID = "demo"
QUANTIZATION = "q8_0"
CLI = (sys.executable, "-c", "from dispatcher.cli import main; main()")
ELSEWHERE = ("PROJECT_ID", "GCS_EXPORT_BUCKET_NAME", "K_SERVICE", "CLOUD_RUN_JOB", "EXPORT_ID", "LEASE_ID")
"""Variables of a deployment or of another run; with the first four there is no local user."""
START_SECONDS = 30
EXPORT_SECONDS = 90
STOP_SECONDS = 10


def run(directory: Path | None = None) -> int:
    """Show the product working; 0 when merged model and GGUF recite what only the adapter knew.

    Args:
        directory: Where models, state and artifacts go and stay; without it, a temporary one that is removed.

    Raises:
        ExportError: A step failed (`demo_failed`, or the dispatcher's own code).
    """
    if directory is not None:
        return _show(directory.absolute())
    with tempfile.TemporaryDirectory(prefix="gemma-export-demo-") as temporary:
        return _show(Path(temporary))


def _show(directory: Path) -> int:
    console = Console(highlight=False)
    started = time.monotonic()
    home = directory / "home"
    if home.exists():
        raise ExportError(f"{home} is there already: name another directory", code="demo_failed")
    directory.mkdir(parents=True, exist_ok=True)
    environment = _environment(home)

    step(console, "1/5", "a tiny Gemma 3 with random weights learns one sentence, by LoRA")
    train(console, directory, environment)
    step(console, "2/5", "the fine-tuning is registered as a completed training job")
    register(console, JOB_ID, directory / "base", directory / "adapter", environment)
    step(console, "3/5", "the dispatcher starts, and is asked for two exports")
    with _dispatcher(console, directory, environment) as url:
        client = HttpClient(url)
        try:
            export(console, client, url, JOB_ID, "adapter")
            merged = export(console, client, url, JOB_ID, "merged")["merged_path"]
            step(console, "4/5", "all three models are asked the same question")
            compare(directory, path_of(merged), environment)
            step(console, "5/5", "a GGUF is asked for, and llama.cpp recites with that file alone")
            recite(path_of(export(console, client, url, JOB_ID, "gguf", QUANTIZATION)["gguf_path"]), environment)
        finally:
            client.close()
    console.print(f"\n[green]It works.[/] {time.monotonic() - started:.0f} s in all.")
    return 0


def step(console: Console, number: str, what: str) -> None:
    """Announce what comes next."""
    console.print(f"\n[bold]{number}[/]  {what}")


def typed(console: Console, program: str, arguments: Sequence[str]) -> None:
    """Show a command as a user would type it."""
    console.print(f"     [cyan]$ {escape(shlex.join([program, *arguments]))}[/]", soft_wrap=True)


def _environment(home: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The children's environment: everything embedded under `home`, whatever is set around the demo."""
    kept = {name: value for name, value in environ.items() if name not in ELSEWHERE}
    stores = Settings.from_env({"GEMMA_EXPORT_HOME": str(home)}).to_environment()
    return {**kept, **stores, "HF_HUB_OFFLINE": "1"}


def train(console: Console, directory: Path, environment: Mapping[str, str]) -> None:
    """Make `base` and `adapter` in a directory.

    Raises:
        ExportError: The training failed (`demo_failed`).
    """
    command = [sys.executable, "-m", "exporter.demo", "train", str(directory)]
    tail: deque[str] = deque(maxlen=20)
    with (
        console.status("loading torch") as status,
        subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as trainer,
    ):
        for line in trainer.stdout or ():
            tail.append(line)
            status.update(escape(line.strip()))
    if trainer.returncode != 0:
        raise ExportError(f"the training failed ({trainer.returncode}):\n{''.join(tail)}", code="demo_failed")
    console.print(f"     {escape(tail[-1].strip())}" if tail else "")


def register(console: Console, job_id: str, base: Path, adapter: Path | str, environment: Mapping[str, str]) -> None:
    """Write down a training job, with the stores that an environment names.

    Raises:
        ExportError: It was refused (`demo_failed`).
    """
    arguments = ["register", "--base", str(base), "--adapter", str(adapter), "--job-id", job_id]
    typed(console, "gemma-export", arguments)
    done = subprocess.run([*CLI, *arguments], env=environment, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise ExportError(f"the job could not be registered: {done.stderr.strip()}", code="demo_failed")


def compare(directory: Path, merged: Path, environment: Mapping[str, str]) -> None:
    """Ask the base, the base with its adapter, and a merged model the same question.

    Raises:
        ExportError: They did not answer as they should (`demo_failed`).
    """
    command = [sys.executable, "-m", "exporter.demo", "compare", str(directory), str(merged)]
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise ExportError("the models did not answer as they should; see the table", code="demo_failed")


def recite(file: Path, environment: Mapping[str, str]) -> None:
    """Let llama.cpp answer the question with a GGUF.

    Raises:
        ExportError: It did not recite (`demo_failed`).
    """
    command = [sys.executable, "-m", "exporter.demo_llama", str(file)]
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise ExportError("llama.cpp did not recite the sentence; see above", code="demo_failed")


@contextmanager
def _dispatcher(console: Console, directory: Path, environment: dict[str, str]) -> Iterator[str]:
    """`gemma-export serve` on a free port; yields its URL, and stops it however the block ends."""
    log = directory / "dispatcher.log"
    arguments = ["serve", "--port", "0"]
    typed(console, "gemma-export", arguments)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*CLI, *arguments, "--json"], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield _url(process.stdout, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _url(output: IO[str] | None, log: Path) -> str:
    ready = output is not None and select.select([output], [], [], START_SECONDS)[0]
    line = output.readline() if output is not None and ready else ""
    if not line:
        said = log.read_text(errors="replace")[-2000:].strip()
        raise ExportError(f"the dispatcher did not start; its log says: {said or 'nothing'}", code="demo_failed")
    return str(json.loads(line)["url"])


def export(
    console: Console, client: HttpClient, url: str, job_id: str, export_type: str, quantization: str | None = None
) -> dict[str, Any]:
    """Ask for one export and follow it to its end; returns the last answer.

    Raises:
        ExportError: It did not complete.
    """
    body = {"job_id": job_id, "export_type": export_type}
    body |= {"quantization": quantization} if quantization else {}
    sent = [part for name, text in client.headers.items() for part in ("-H", f"{name}: {text}")]
    typed(console, "curl", [*sent, "-d", json.dumps(body), "-H", "content-type: application/json", f"{url}/export"])
    answer = client.submit(body)
    console.print(f"     {answer['status']}")
    if answer["status"] != "completed":
        typed(console, "curl", [*sent, f"{url}/exports/{answer['export_id']}"])
        answer |= followed(client, answer["export_id"])
        judge(answer)
        console.print(f"     {answer['state']}")
    place = str(answer[f"{export_type}_path"])
    console.print(f"     {export_type}_path: {escape(place)}", soft_wrap=True)
    return answer


def followed(client: HttpClient, export_id: str) -> dict[str, Any]:
    """The last status of an export, shown as it moves on.

    Raises:
        ExportError: It takes too long (`demo_failed`).
    """
    deadline = time.monotonic() + EXPORT_SECONDS
    with shown(export_id, as_json=False) as show:
        return follow(client, export_id, show=show, sleep=lambda seconds: _pause(seconds, deadline))


def judge(document: dict[str, Any]) -> None:
    """Refuse a last status that is not `completed`.

    Raises:
        ExportError: With the export's own code.
    """
    if document["state"] == "completed":
        return
    error = document["error"] or {"code": "demo_failed", "message": "it was cancelled"}
    message = f"the {document['export_type']} export is {document['state']}: {error['message']}"
    raise ExportError(f"{message}; its log is {document['log_uri']}", code=error["code"])


def _pause(seconds: float, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise ExportError(f"the export is not finished after {EXPORT_SECONDS} s", code="demo_failed")
    time.sleep(seconds)
