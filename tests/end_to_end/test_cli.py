"""`gemma-export` at a laptop, as a real process with real output."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dispatcher.contract import ExportRequest, ExportType, Lease, State
from dispatcher.lifecycle import Actor, noted, requested, transition
from tests.end_to_end.laptop import Laptop


@pytest.fixture
def laptop(tmp_path: Path) -> Laptop:
    return Laptop(tmp_path)


def registered(laptop: Laptop, job_id: str = "job") -> str:
    """A job whose base directory holds no model."""
    (laptop.root / "empty-base").mkdir(exist_ok=True)
    laptop.bad_adapter()
    (said,) = laptop.lines("register", "--base", "empty-base", "--adapter", "bad-adapter", "--job-id", job_id)
    return str(said["job_id"])


def test_a_job_is_registered_and_its_id_printed(laptop: Laptop) -> None:
    """With absolute paths, so that it can be exported from anywhere; a new id when none is given."""
    laptop.bad_adapter()
    (laptop.root / "base").mkdir()
    done = laptop.run("register", "--base", "base", "--adapter", "bad-adapter", "--user", "ann")
    job_id = done.stdout.strip()
    assert done.returncode == 0
    with laptop.records() as records:
        job = records.get_job(job_id)
    assert job is not None
    assert (job.user_id, job.status, job.provider) == ("ann", "completed", "huggingface")
    assert job.base_model_id == str(laptop.root / "base")
    assert job.adapter_path == str(laptop.root / "bad-adapter")


def test_a_base_from_the_hub_keeps_its_revision(laptop: Laptop) -> None:
    """`model@revision`."""
    adapter = str(laptop.bad_adapter())
    laptop.lines("register", "--base", "unsloth/gemma-3-1b-it@abc", "--adapter", adapter, "--job-id", "job")
    with laptop.records() as records:
        job = records.get_job("job")
    assert job is not None
    assert (job.base_model_id, job.base_model_revision, job.provider) == ("unsloth/gemma-3-1b-it", "abc", "unsloth")


@pytest.mark.parametrize(
    ("job_id", "adapter", "code"),
    [
        ("../job", "bad-adapter", "job_id_invalid"),
        ("a,b", "bad-adapter", "job_id_invalid"),
        ("x" * 300, "bad-adapter", "job_id_invalid"),
        ("job", "nowhere", "adapter_gone"),
        ("job", "gs://bucket/adapter", "uri_unsupported"),
        ("taken", "bad-adapter", "job_exists"),
    ],
)
def test_what_cannot_be_registered_is_said(laptop: Laptop, job_id: str, adapter: str, code: str) -> None:
    """One problem object, and a nonzero exit."""
    registered(laptop, "taken")
    (said,) = laptop.lines("register", "--base", "b", "--adapter", adapter, "--job-id", job_id, code=1)
    assert said["code"] == code


def test_an_adapter_is_exported_at_once(laptop: Laptop) -> None:
    """The path is all that is printed."""
    job_id = registered(laptop)
    done = laptop.run("export", job_id, "--type", "adapter")
    assert (done.returncode, done.stdout.strip()) == (0, str(laptop.root / "bad-adapter"))
    (said,) = laptop.lines("export", job_id, "--type", "adapter")
    assert (said["status"], said["adapter_path"]) == ("completed", str(laptop.root / "bad-adapter"))


def test_an_export_that_fails_says_why(laptop: Laptop) -> None:
    """Followed to its end in the exporter's process; the reason is the record's."""
    job_id = registered(laptop)
    *_, last = laptop.lines("export", job_id, "--type", "merged", code=1)
    assert last["state"] == "failed"
    assert last["error"]["code"]
    done = laptop.run("status", "job.merged")
    assert json.loads(done.stdout)["error"] == last["error"]
    again = laptop.run("export", job_id, "--type", "merged")
    assert again.returncode == 1
    assert last["error"]["code"] in again.stderr
    assert laptop.lines("list")[0]["export_id"] == "job.merged"
    assert laptop.lines("status") == [{"failed": 1}]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("export", "unknown", "--type", "merged"), "job_not_found"),
        (("export", "../job", "--type", "merged"), "invalid_request"),
        (("export", "job", "--type", "gguf", "--quantization", "iq2_xs"), "invalid_request"),
        (("export", "job", "--type", "merged", "--quantization", "q8_0"), "invalid_request"),
        (("export", "job", "--type", "merged", "--user", "bob"), "not_yours"),
        (("export", "job", "--type", "merged", "--url", "http://127.0.0.1:9"), "unavailable"),
        (("export", "job", "--type", "merged", "--url", "nonsense"), "invalid_request"),
        (("status", "job.merged"), "export_not_found"),
        (("cancel", "job.merged"), "export_not_found"),
    ],
)
def test_a_refusal_is_a_problem_object_and_a_nonzero_exit(
    laptop: Laptop, arguments: tuple[str, ...], code: str
) -> None:
    """The same codes as over HTTP."""
    registered(laptop)
    (said,) = laptop.lines(*arguments, code=1)
    assert said["code"] == code
    assert said["detail"]


def test_a_bad_setting_is_named(laptop: Laptop) -> None:
    """Before anything is opened."""
    done = laptop.run("list", LEASE_SECONDS="soon")
    assert done.returncode == 1
    assert "LEASE_SECONDS" in done.stderr


def test_serve_refuses_with_a_cloud_setting(laptop: Laptop) -> None:
    """A forgotten variable cannot open the door."""
    done = laptop.run("serve", "--port", "0", "--json", K_SERVICE="s")
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == "misconfigured"


def test_a_sweep_reports_what_it_did(laptop: Laptop) -> None:
    """Nothing, on a fresh state directory."""
    assert laptop.lines("sweep") == [{"requeued": 0, "failed": 0, "published": 0, "collected": 0}]
    assert laptop.lines("list") == []


def test_a_topic_keeps_its_messages_so_a_sweep_sends_none_again(laptop: Laptop) -> None:
    """An embedded queue forgot them with its process; Pub/Sub, which is not even asked here, did not."""
    job_id = registered(laptop)
    request = ExportRequest(job_id=job_id, export_type=ExportType.MERGED)
    now = datetime.now(UTC)
    queued = requested(request, user_id="local", adapter_fingerprint="f", token_ref=None, now=now)
    with laptop.records() as records:
        assert records.create_export(noted(queued, now, published_at=now))
    nowhere = {"QUEUE_URL": "pubsub://p/t", "PUBSUB_EMULATOR_HOST": "127.0.0.1:1"}
    done = laptop.run("sweep", "--json", **nowhere)
    assert json.loads(done.stdout) == {"requeued": 0, "failed": 0, "published": 0, "collected": 0}
    with laptop.records() as records:
        assert records.get_export(queued.export_id) == noted(queued, now, published_at=now)
    (said,) = laptop.lines("sweep")
    assert said["published"] == 1


def test_the_counts_of_a_status_show_no_dead_lease_as_running(laptop: Laptop) -> None:
    """It waits for a sweep, and so it is counted."""
    job_id = registered(laptop)
    request = ExportRequest(job_id=job_id, export_type=ExportType.MERGED)
    then = datetime.now(UTC) - timedelta(minutes=1)
    queued = requested(request, user_id="local", adapter_fingerprint="f", token_ref=None, now=then)
    lease = Lease(lease_id="l", owner="o", expires_at=then)
    with laptop.records() as records:
        assert records.create_export(transition(queued, State.RUNNING, by=Actor.EXPORTER, now=then, lease=lease))
    assert laptop.lines("status") == [{"queued": 1}]
    assert [said["state"] for said in laptop.lines("list")] == ["queued"]
