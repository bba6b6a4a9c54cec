"""`make demo-cloud`: the demo with every Google implementation on, against real servers on this machine.

POST to the function, Firestore, Pub/Sub push, function, RunJob, exporter process, objects and record, status answer;
then what an operator does: a rerun, and a replay.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import httpx
from google.cloud import storage
from rich.console import Console
from rich.markup import escape

from dispatcher.client import HttpClient
from dispatcher.demo import QUANTIZATION, compare, export, followed, judge, recite, register, step, train, typed
from dispatcher.errors import ExportError
from dispatcher.runner import open_runner
from infra.local.cloud import BUCKET, JOB, PROJECT, REGION, Cloud, gateway_header, local_cloud
from infra.local.servers import MissingServerError
from infra.local.topics import seek

USER = "local"
FIRST, SECOND = "demo", "demo-refused"
WAIT_SECONDS = 90


def main() -> int:
    """Show it in a temporary directory; 0 when merged model and GGUF recite what only the adapter knew."""
    with tempfile.TemporaryDirectory(prefix="gemma-export-demo-cloud-") as temporary:
        try:
            run(Path(temporary))
        except (ExportError, MissingServerError) as error:
            Console().print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
            return 1
    return 0


def run(directory: Path) -> None:
    """Show a deployment working, under a directory.

    Raises:
        ExportError: Something did not go as it should (`demo_failed`, or the dispatcher's own code).
        MissingServerError: A server is not on this machine.
    """
    console = Console(highlight=False)
    started = time.monotonic()
    step(console, "1/6", "Firestore, Pub/Sub, Cloud Storage, Cloud Run, Secret Manager and three functions come up")
    with local_cloud(directory, settings={"HF_HUB_OFFLINE": "1"}) as cloud:
        client = HttpClient(cloud.url, headers=gateway_header(USER))
        try:
            merged, gguf = _exported(console, cloud, client, directory)
            _rerun(console, cloud)
            _replayed(console, cloud, client)
        finally:
            client.close()
        step(console, "6/6", "merged model and GGUF are downloaded, and all are asked the same question")
        compare(directory, _downloaded(console, merged, directory / "merged"), cloud.environment)
        (file,) = _downloaded(console, gguf, directory / "gguf").glob("*.gguf")
        recite(file, cloud.environment)
    console.print(f"\n[green]It works.[/] {time.monotonic() - started:.0f} s in all.")


def _exported(console: Console, cloud: Cloud, client: HttpClient, directory: Path) -> list[list[dict[str, str]]]:
    """Train and export; the downloads of merged model and GGUF."""
    step(console, "2/6", "a tiny Gemma 3 learns one sentence, by LoRA; adapter and job are stored as a platform does")
    train(console, directory, cloud.environment)
    adapter = _uploaded(directory / "adapter")
    for job_id in (FIRST, SECOND):
        register(console, job_id, directory / "base", adapter, cloud.environment)
    step(console, "3/6", "three exports are asked for, as API Gateway would pass it on")
    export(console, client, cloud.url, FIRST, "adapter")
    export(console, client, cloud.url, FIRST, "merged")
    export(console, client, cloud.url, FIRST, "gguf", QUANTIZATION)
    found = [client.status(f"{FIRST}.{kind}") for kind in ("merged", f"gguf.{QUANTIZATION}")]
    for execution, status in zip(cloud.run.executions, found, strict=True):
        console.print(f"     execution {execution}, attempt {status['attempt']}, log {status['log_uri']}")
    return [status["downloads"] for status in found]


def _rerun(console: Console, cloud: Cloud) -> None:
    step(console, "4/6", "an operator runs the job again: nothing is left to do, and nothing changes")
    typed(console, "gcloud", ["run", "jobs", "execute", JOB, f"--region={REGION}", f"--args={FIRST}"])
    before = _objects(cloud)
    runner = open_runner(cloud.environment["RUNNER_URL"], log_dir=cloud.logs, environment={})
    execution = runner.start(FIRST, {})
    runner.close()
    code = cloud.run.wait(execution.name, WAIT_SECONDS)
    if code != 0 or _objects(cloud) != before:
        raise ExportError(f"the rerun ended with {code} and changed objects", code="demo_failed")
    console.print(f"     execution {execution.name} ended with 0; {len(before)} objects, as before")


def _replayed(console: Console, cloud: Cloud, client: HttpClient) -> None:
    step(
        console, "5/6", "Cloud Run has no quota left: the message is dead-lettered; then it has, and a day is replayed"
    )
    cloud.run.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, times=1000)
    client.submit({"job_id": SECOND, "export_type": "merged"})
    refused = followed(client, f"{SECOND}.merged")
    if refused["state"] != "failed" or refused["error"]["code"] != "could_not_start":
        raise ExportError(f"an export that cannot start is {refused['state']}", code="demo_failed")
    console.print(f"     failed: {refused['error']['message']} ({refused['error']['code']})", soft_wrap=True)
    cloud.run.heal()
    executions, completed = len(cloud.run.executions), client.status(f"{FIRST}.merged")
    back = datetime.now(UTC) - timedelta(hours=1)
    typed(
        console,
        "gcloud",
        ["pubsub", "subscriptions", "seek", cloud.subscription, f"--time={back:%Y-%m-%dT%H:%M:%SZ}"],
    )
    seek(cloud.subscription, back)
    _until(lambda: client.status(f"{SECOND}.merged")["state"] != "failed", "the replay")
    judge(followed(client, f"{SECOND}.merged"))
    if (
        len(cloud.run.executions) != executions + 1
        or client.status(f"{FIRST}.merged")["updated_at"] != completed["updated_at"]
    ):
        raise ExportError("the replay touched what was finished", code="demo_failed")
    console.print("     the finished export was acknowledged, the failed one was made, by one execution")


def _uploaded(adapter: Path) -> str:
    """Put an adapter where a training service keeps it; returns its URI."""
    client = storage.Client(project=PROJECT)
    for file in sorted(adapter.iterdir()):
        client.bucket(BUCKET).blob(f"adapters/{FIRST}/{file.name}").upload_from_filename(str(file))
    client.close()
    return f"gs://{BUCKET}/adapters/{FIRST}"


def _downloaded(console: Console, downloads: list[dict[str, str]], directory: Path) -> Path:
    typed(console, "curl", ["-O", downloads[0]["url"]])
    for file in downloads:
        target = directory / file["name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        with httpx.stream("GET", file["url"]) as response, target.open("wb") as output:
            response.raise_for_status()
            for block in response.iter_bytes():
                output.write(block)
    return directory


def _objects(cloud: Cloud) -> list[Path]:
    return sorted(path for path in cloud.objects.rglob("*") if path.is_file())


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise ExportError(f"waited {WAIT_SECONDS} s in vain for {what}", code="demo_failed")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
