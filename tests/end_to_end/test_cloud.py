"""The whole chain against Google's servers: function, Firestore, Pub/Sub push, function, RunJob, exporter, bucket."""

import base64
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.cloud import firestore, pubsub_v1, storage

from dispatcher.contract import ExportRecord, JobMessage, State
from dispatcher.records import open_records
from infra.local import servers
from infra.local.cloud import BUCKET, PROJECT, TOPIC, Cloud, gateway_header, local_cloud, push_endpoint
from tests.conftest import missing
from tests.exporter.exporting import training_document
from tests.exporter.hub import TOKEN, Hub, hub_serving
from tests.gemmas import make_adapter, save_base
from tests.waiting import until

pytestmark = pytest.mark.xdist_group("cloud")
LEASE_SECONDS = 8
TRACE = "ab" * 16
WATCHED = """
import json, os, pathlib, sys
seen = {"arguments": sys.argv, "environment": dict(os.environ)}
pathlib.Path(%r, f"exporter-{os.getpid()}.json").write_text(json.dumps(seen))
os.execv(sys.executable, [sys.executable, "-P", "-m", "exporter", *sys.argv[1:]])
"""
"""An exporter that first writes down what it was given."""


class Deployment:
    """A running deployment with one training service's worth of models in it."""

    def __init__(self, root: Path, cloud: Cloud, hub: Hub) -> None:
        self.root = root
        self.cloud = cloud
        self.hub = hub
        self.records = open_records(f"firestore://{PROJECT}/(default)")
        self.http = httpx.Client(base_url=cloud.url, headers=gateway_header("ann"), timeout=60)

    def job(self, job_id: str, base: Path | str) -> str:
        """A completed training job whose adapter lies in the bucket."""
        place = f"adapters/{job_id}"
        client = storage.Client(project=PROJECT)
        for file in sorted((self.root / "adapter").iterdir()):
            client.bucket(BUCKET).blob(f"{place}/{file.name}").upload_from_filename(str(file))
        client.close()
        assert self.records.put_job(job_id, training_document(base, f"gs://{BUCKET}/{place}"))
        return job_id

    def post(self, job_id: str, **headers: str) -> dict[str, Any]:
        answer = self.http.post("/export", json={"job_id": job_id, "export_type": "merged"}, headers=headers)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def record(self, job_id: str) -> ExportRecord:
        found = self.records.get_export(f"{job_id}.merged")
        assert found is not None
        return found

    def finished(self, job_id: str) -> ExportRecord:
        """The record of a job's export, once that is completed."""
        until(lambda: self.record(job_id).state in (State.COMPLETED, State.FAILED), "the export's end", seconds=120)
        record = self.record(job_id)
        assert record.state is State.COMPLETED, record.error
        return record

    def runs(self, job_id: str) -> int:
        """How many executions there were for a job."""
        return sum(job_id in execution_arguments(seen) for seen in self.root.glob("seen/*.json"))

    def log(self, name: str) -> list[dict[str, Any]]:
        """The JSON lines of a function or an execution."""
        text = (self.cloud.logs / f"{name}.log").read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def execution_arguments(seen: Path) -> list[str]:
    arguments: list[str] = json.loads(seen.read_text())["arguments"]
    return arguments


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("cloud")
    model = save_base("gemma3_text", root / "base")
    make_adapter("gemma3_text", model, root / "adapter")
    (root / "seen").mkdir()
    (root / "watched.py").write_text(WATCHED % str(root / "seen"))
    with hub_serving(root / "base") as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "hf"), "LEASE_SECONDS": str(LEASE_SECONDS)}
        try:
            program = (sys.executable, str(root / "watched.py"))
            with local_cloud(root, settings=settings, program=program) as cloud:
                deployment = Deployment(root, cloud, hub)
                yield deployment
                deployment.http.close()
                deployment.records.close()
        except servers.MissingServerError as error:
            missing(error)


def test_a_request_becomes_a_model_and_one_trace_runs_through_every_line(deployment: Deployment) -> None:
    """From the HTTP function to the exporter, with the ids that each line is about."""
    deployment.job("job-traced", deployment.root / "base")
    deployment.post("job-traced", traceparent=f"00-{TRACE}-{'cd' * 8}-01")
    record = deployment.finished("job-traced")
    answer = deployment.http.get("/exports/job-traced.merged").json()
    assert answer["merged_path"] == record.path
    assert {"model.safetensors", "config.json", "export.json"} <= {file["name"] for file in answer["downloads"]}
    (weights,) = (file for file in answer["downloads"] if file["name"] == "model.safetensors")
    assert len(httpx.get(weights["url"]).content) == weights["bytes"]
    assert record.execution is not None
    job = deployment.records.get_job("job-traced")
    assert job is not None
    trace = f"projects/{PROJECT}/traces/{TRACE}"
    for name, logger in (("export_api", "dispatcher"), ("start_export", "dispatcher"), (record.execution, "exporter")):
        lines = [line for line in deployment.log(name) if line.get("logging.googleapis.com/trace") == trace]
        assert lines, name
        assert all(line["logger"].startswith(logger) and line["severity"] for line in lines)
    claimed = next(line for line in deployment.log(record.execution) if "claimed" in line["message"])
    assert (claimed["job_id"], claimed["export_id"]) == ("job-traced", "job-traced.merged")
    assert claimed["execution"] == record.execution


def test_firestore_is_not_written_more_than_about_once_a_second(deployment: Deployment) -> None:
    """Every write of a record raises its revision by one."""
    deployment.job("job-counted", deployment.root / "base")
    deployment.post("job-counted")
    record = deployment.finished("job-counted")
    seconds = (record.updated_at - record.created_at).total_seconds()
    assert record.revision <= 6 + seconds / 2


def test_a_hundred_copies_of_one_message_start_one_execution(deployment: Deployment) -> None:
    """Delivered at the same time, each until it is acknowledged."""
    deployment.job("job-copied", deployment.root / "base")
    message = JobMessage(job_id="job-copied", export_id="job-copied.merged").model_dump_json().encode()
    pushed = {"message": {"data": base64.b64encode(message).decode(), "messageId": "1"}, "subscription": "s"}
    endpoint = push_endpoint(deployment.cloud.functions["start_export"], TOPIC)
    answers: Counter[int] = Counter()
    together = threading.Barrier(100)

    def deliver(_: int) -> None:
        with httpx.Client(timeout=60) as client:
            together.wait()
            while (status := client.post(endpoint, json=pushed).status_code) != 200:
                answers[status] += 1

    deployment.cloud.run.gate.clear()
    deployment.post("job-copied")
    before = len(deployment.cloud.run.requests)
    with ThreadPoolExecutor(100) as threads:
        copies = [threads.submit(deliver, number) for number in range(100)]
        until(lambda: answers[503] >= 50, "copies that came while the launch was under way")
        deployment.cloud.run.gate.set()
        for copy in copies:
            copy.result()
    assert set(answers) == {503}
    deployment.finished("job-copied")
    assert len(deployment.cloud.run.requests) <= before + 1
    assert deployment.runs("job-copied") == 1


def test_a_launch_that_died_before_run_job_comes_back_by_redelivery(deployment: Deployment) -> None:
    """The function is killed between taking the lease and RunJob; what it leaves is launched again after its lease.

    Until then the message is refused so often that it is dead: nothing is lost by that.
    """
    deployment.job("job-killed", deployment.root / "base")
    run = deployment.cloud.run
    run.gate.clear()
    run.hung_up.clear()
    asked = len(run.requests)
    deployment.post("job-killed")
    until(lambda: len(run.requests) > asked, "RunJob")
    assert deployment.record("job-killed").state is State.STARTING
    for worker in workers(deployment.cloud.functions["start_export"].pid):
        os.kill(worker, signal.SIGKILL)
    assert run.hung_up.wait(30)
    run.gate.set()
    record = deployment.finished("job-killed")
    assert (record.updated_at - record.created_at).total_seconds() > LEASE_SECONDS
    assert deployment.runs("job-killed") == 1


def test_a_token_is_nowhere_but_in_its_secret_and_in_the_end_not_even_there(deployment: Deployment) -> None:
    """A gated base, which only the token opens; then everything that was kept anywhere is searched."""
    deployment.hub.gated = True
    deployment.hub.authorizations.clear()
    deployment.job("job-gated", "google/tiny")
    cloud = deployment.cloud
    with messages_of(TOPIC) as messages:
        cloud.run.gate.clear()
        body = {"job_id": "job-gated", "export_type": "merged", "hf_token": TOKEN}
        assert deployment.http.post("/export", json=body).status_code == 202
        until(lambda: deployment.record("job-gated").state is State.STARTING, "the launch")
        assert TOKEN.encode() in cloud.secrets.payloads()
        cloud.run.gate.set()
        deployment.finished("job-gated")
        until(lambda: cloud.secrets.payloads() == [], "the secret to be deleted")
        kept = {
            "Firestore": str(documents()),
            "messages": str(messages()),
            "requests to Cloud Run": str(cloud.run.requests),
            **{
                str(path): read(path)
                for folder in (cloud.objects, cloud.logs, deployment.root)
                for path in files(folder)
            },
        }
    assert f"Bearer {TOKEN}" in deployment.hub.authorizations
    assert "job-gated" in kept["Firestore"]
    assert "job-gated" in kept["messages"]
    assert "job-gated" in kept["requests to Cloud Run"]
    assert deployment.runs("job-gated") == 1
    assert [
        where for where, text in kept.items() if TOKEN in text or base64.b64encode(TOKEN.encode()).decode() in text
    ] == []


def workers(pid: int) -> list[int]:
    """The processes that a server started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children
    return [int(child) for child in children]


def documents() -> list[dict[str, Any] | None]:
    """Every document of every collection."""
    client = firestore.Client(project=PROJECT)
    found = [document.to_dict() for collection in client.collections() for document in collection.stream()]
    client.close()
    return found


@contextmanager
def messages_of(topic: str) -> Iterator[Callable[[], list[Any]]]:
    """Gives every message that a topic gets meanwhile, through a subscription of its own."""
    with pubsub_v1.SubscriberClient() as client:
        path = client.subscription_path(PROJECT, f"{topic}-watched")
        client.create_subscription(name=path, topic=client.topic_path(PROJECT, topic))
        yield lambda: list(client.pull(subscription=path, max_messages=1000).received_messages)
        client.delete_subscription(subscription=path)


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def read(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")
