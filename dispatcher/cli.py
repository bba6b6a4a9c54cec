"""`gemma-export`: the dispatcher's verbs at a laptop. Each command imports what it needs when it runs."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dispatcher.bootstrap import Stack
    from dispatcher.client import Client

TYPES = ("adapter", "merged", "gguf")
IDENTITIES = ("dispatcher", "trigger", "sweeper", "exporter")
QUIET = logging.WARNING


def _say(text: str, *, error: bool = False) -> None:
    click.echo(text, err=error)


def _reported(command: Callable[..., int | None]) -> Callable[..., None]:
    """Turns an error into its reason on stderr (with --json its problem on stdout) and a nonzero exit."""

    @wraps(command)
    def run(*args: Any, as_json: bool, **options: Any) -> None:
        from dispatcher import logs
        from dispatcher.errors import ExportError

        logs.configure(sys.stderr, level=QUIET)
        try:
            code = command(*args, as_json=as_json, **options)
        except ExportError as error:
            told = json.dumps(error.problem()) if as_json else logs.clean(f"{error.message} ({error.error_code})")
            _say(told, error=not as_json)
            code = 1
        except KeyboardInterrupt:
            _say("interrupted; an exporter that was started goes on, see `gemma-export list`", error=True)
            code = 130
        sys.exit(code or 0)

    return click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")(run)


_user = click.option("--user", default="local", show_default=True, help="Who asks, on this machine.")
_url = click.option("--url", help="A dispatcher to ask over HTTP; without it, this machine's own state.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-export")
def main() -> None:
    """Fine-tuned Gemma models out of training and into the world."""


@main.command()
@click.option("--base", required=True, help="Base model: hub id (optionally @revision) or directory.")
@click.option("--adapter", required=True, help="LoRA adapter: directory or URI.")
@click.option("--job-id", help="Default: a new one.")
@click.option("--provider", type=click.Choice(["unsloth", "huggingface"]), help="What it was trained with.")
@_user
@_reported
def register(base: str, adapter: str, job_id: str | None, provider: str | None, user: str, *, as_json: bool) -> None:
    """Write down a completed training job, and print its id."""
    from dispatcher.registration import register as write_down

    with _stack() as stack:
        job_id = write_down(
            stack.records, stack.artifacts, base=base, adapter=adapter, user=user, job_id=job_id, provider=provider
        )
    _say(json.dumps({"job_id": job_id}) if as_json else job_id)


@main.command()
@click.argument("job_id")
@click.option("--type", "export_type", type=click.Choice(TYPES), required=True)
@click.option("--quantization", help="With --type gguf: q8_0 (the default), q4_k_m, bf16, …; README has all.")
@click.option("--send-hf-token", is_flag=True, help="Send HF_TOKEN along, for a base model behind a gate.")
@click.option("--wait/--no-wait", default=True, help="Stay until it is finished (the default).")
@_url
@_user
@_reported
def export(
    job_id: str,
    export_type: str,
    quantization: str | None,
    send_hf_token: bool,
    wait: bool,
    url: str | None,
    user: str,
    *,
    as_json: bool,
) -> int | None:
    """Ask for an export and follow it to its end; prints the path of the result."""
    from dispatcher.client import follow
    from dispatcher.logs import clean
    from dispatcher.progress import shown
    from dispatcher.settings import Settings

    body: dict[str, Any] = {"job_id": job_id, "export_type": export_type}
    body |= {"quantization": quantization} if quantization else {}
    body |= {"hf_token": Settings.from_env().hf_token} if send_hf_token else {}
    with _client(url, user) as client:
        answer = client.submit(body)
        if not wait or answer["status"] == "completed":
            _say(json.dumps(answer) if as_json else _result(answer) or f"{answer['export_id']} {answer['status']}")
            return 0
        with shown(answer["export_id"], as_json=as_json) as show:
            final = follow(client, answer["export_id"], show=show)
    if final["state"] == "completed":
        if not as_json:
            _say(_result(final) or "")
        return 0
    error = final["error"] or {"code": final["state"], "message": f"the export was {final['state']}"}
    if not as_json:
        _say(clean(f"{error['message']} ({error['code']})"), error=True)
    return 1


@main.command()
@click.argument("export_id", required=False)
@_url
@_user
@_reported
def status(export_id: str | None, url: str | None, user: str, *, as_json: bool) -> None:
    """Show one export, or how many there are in each state."""
    with _client(url, user) as client:
        if export_id is not None:
            document = client.status(export_id)
            _say(json.dumps(document) if as_json else json.dumps(document, indent=2))
            return
        counts: dict[str, int] = {}
        for document in client.list_exports(None):
            counts[document["state"]] = counts.get(document["state"], 0) + 1
    plain = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    _say(json.dumps(counts) if as_json else plain or "no exports")


@main.command(name="list")
@click.option("--job-id", help="Only this job's.")
@_url
@_user
@_reported
def list_(job_id: str | None, url: str | None, user: str, *, as_json: bool) -> None:
    """List your exports."""
    with _client(url, user) as client:
        documents = client.list_exports(job_id)
    for document in documents:
        line = f"{document['export_id']}  {document['state']}  {document['progress']:.0%}  {_result(document) or ''}"
        _say(json.dumps(document) if as_json else line.rstrip())


@main.command()
@click.argument("export_id")
@_url
@_user
@_reported
def cancel(export_id: str, url: str | None, user: str, *, as_json: bool) -> None:
    """Stop an unfinished export."""
    with _client(url, user) as client:
        document = client.cancel(export_id)
    _say(json.dumps(document) if as_json else f"{export_id} {document['state']}")


@main.command()
@click.option("--port", default=8080, show_default=True, help="On 127.0.0.1; 0 takes a free one.")
@_user
@_reported
def serve(port: int, user: str, *, as_json: bool) -> None:
    """Run the dispatcher on this machine, for this machine alone."""
    from dispatcher import logs
    from dispatcher.bootstrap import build
    from dispatcher.serve import serve as run
    from dispatcher.settings import Settings

    def listening(url: str) -> None:
        _say(json.dumps({"url": url}) if as_json else f"listening on {url}")
        sys.stdout.flush()

    logs.configure(sys.stderr, {"service": "dispatcher"})
    run(build(Settings.from_env()), user=user, port=port, listening=listening)


@main.command()
@_reported
def sweep(*, as_json: bool) -> None:
    """Put right what died: take back dead leases, start again what waits, remove what nobody needs any more."""
    from dispatcher.sweep import swept

    with _stack() as stack:
        # What waited in an embedded queue was lost with the process that had it; a topic keeps its messages.
        lost = stack.settings.queue_url == "inline:"
        done = swept(stack.trigger, stack.collector, lost_messages=lost)
    _say(json.dumps(done) if as_json else ", ".join(f"{number} {what}" for what, number in done.items()))


@main.command()
@click.option("--as", "identities", type=click.Choice(IDENTITIES), multiple=True, help="Whose needs; default: all.")
@click.option("--adapters", metavar="gs://BUCKET/PREFIX", multiple=True, help="Where training jobs keep adapters.")
@_reported
def doctor(identities: tuple[str, ...], adapters: tuple[str, ...], *, as_json: bool) -> int:
    """Check each permission and connection that a deployment needs, and say what is missing.

    The deployment is the one that the environment names, as for its functions: PROJECT_ID and so on. With nothing
    set, it is this machine. Nothing is left behind but a secret without a payload, which expires in five minutes.

    Asked is what the credentials at hand may do. So for an exact answer, ask as each service account by itself:

    \b
      gcloud auth application-default login --impersonate-service-account=EMAIL
      gemma-export doctor --as dispatcher

    Exits with 0 where nothing is missing, and with 1 where something is, or is set up wrong.
    """
    from dispatcher.doctor import told
    from dispatcher.settings import Settings

    return told(Settings.from_env(), identities, adapters, as_json=as_json, say=_say)


@main.command()
def openapi() -> None:
    """Print the OpenAPI document of the HTTP API, as JSON."""
    from dispatcher.openapi import document

    _say(json.dumps(document(), indent=2))


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", help="Base model: hub id (optionally @revision) or directory; default: what the adapter names.")
@_reported
def inspect(adapter: Path, base: str | None, *, as_json: bool) -> int:
    """Say what merging ADAPTER would do, or why it is refused; nothing is written."""
    from dispatcher.inspection import inspected, told
    from dispatcher.logs import clean

    report = inspected(adapter, base)
    _say(json.dumps(report) if as_json else clean(told(report), limit=sys.maxsize, lines=True))
    return int(report["outcome"] == "refused")


@main.command()
@click.option("--directory", type=click.Path(path_type=Path), help="Where to work; default: a temporary one.")
@_reported
def demo(directory: Path | None, *, as_json: bool) -> int:
    """Train a tiny Gemma, export it, and hear it recite."""
    from dispatcher.demo import run

    return run(directory)


@contextmanager
def _stack() -> "Iterator[Stack]":
    from dispatcher.bootstrap import build
    from dispatcher.settings import Settings

    stack = build(Settings.from_env())
    try:
        yield stack
    finally:
        stack.close()


@contextmanager
def _client(url: str | None, user: str) -> "Iterator[Client]":
    from dispatcher.client import EmbeddedClient, HttpClient
    from dispatcher.settings import Settings

    if url:
        client: Client = HttpClient(url, Settings.from_env().id_token)
        try:
            yield client
        finally:
            client.close()
    else:
        with _stack() as stack:
            yield EmbeddedClient(stack, user)


def _result(document: dict[str, Any]) -> str | None:
    """The path of a finished export, as other programs on this machine take it."""
    from dispatcher.artifacts import path_of

    path = document.get(f"{document['export_type']}_path")
    return str(path_of(path)) if isinstance(path, str) and path.startswith("file://") else path
