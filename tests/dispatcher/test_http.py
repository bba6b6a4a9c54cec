"""Every row of the contract's answer table, over real HTTP."""

import base64
import json
import logging
import socket
import sqlite3
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dispatcher.contract import State
from dispatcher.identity import USERINFO_HEADER
from tests.dispatcher.server import served
from tests.dispatcher.test_contract import BAD_JOB_IDS
from tests.dispatcher.world import World

TOKEN = "hf_" + "aB3" * 11
MERGED = {"job_id": "job", "export_type": "merged"}


@pytest.fixture
def http(world: World) -> Iterator[httpx.Client]:
    with served(world) as client:
        yield client


def as_user(name: str) -> dict[str, str]:
    claims = base64.urlsafe_b64encode(json.dumps({"sub": name}).encode()).decode().rstrip("=")
    return {USERINFO_HEADER: claims}


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of a refusal that is one in every respect."""
    document: dict[str, Any] = response.json()
    assert response.headers["Content-Type"] == "application/problem+json"
    assert (response.status_code, document["code"]) == (status, code), document
    assert document["status"] == status
    assert document["detail"]
    assert document["title"]
    return document


def test_health_needs_nobody(world: World) -> None:
    """And no store either."""
    with served(world, user=None) as http:
        response = http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "healthy", "service": "export"})


def test_an_adapter_is_answered_with_200_and_its_path(world: World, http: httpx.Client) -> None:
    """At once, and the same again."""
    world.job()
    for _ in range(2):
        response = http.post("/export", json={"job_id": "job", "export_type": "adapter"})
        assert response.status_code == 200
        assert response.json() == {
            "success": True,
            "job_id": "job",
            "export_type": "adapter",
            "export_id": "job.adapter",
            "status": "completed",
            "adapter_path": str(world.home / "adapter-job"),
        }


def test_a_merge_is_accepted_and_followed_to_its_end(world: World, http: httpx.Client) -> None:
    """202 and a Location while it waits, starts and runs; 200 with the path once it is there."""
    world.job()
    response = http.post("/export", json={**MERGED, "hf_token": TOKEN})
    assert response.status_code == 202
    assert response.headers["Location"] == "/exports/job.merged"
    assert response.json() == {
        "success": True,
        "job_id": "job",
        "export_type": "merged",
        "export_id": "job.merged",
        "status": "queued",
    }
    world.queue.deliver_all(world.trigger)
    assert http.post("/export", json=MERGED).json()["status"] == "starting"
    world.claim()
    assert http.post("/export", json=MERGED).json()["status"] == "running"
    done = world.complete()
    response = http.post("/export", json=MERGED)
    assert (response.status_code, response.json()["merged_path"]) == (200, done.path)
    status = http.get("/exports/job.merged").json()
    assert (status["state"], status["progress"], status["merged_path"]) == ("completed", 1.0, done.path)
    assert status["artifacts"][0]["manifest"].endswith("export.json")
    assert TOKEN not in json.dumps(status)


def test_a_dead_lease_is_never_shown_as_running(world: World, http: httpx.Client) -> None:
    """What nobody works on waits its turn."""
    world.job()
    world.launched()
    world.claim()
    assert http.get("/exports/job.merged").json()["state"] == "running"
    world.clock.pass_seconds(121)
    assert http.get("/exports/job.merged").json()["state"] == "queued"


def test_a_failure_is_told_in_the_status(world: World, http: httpx.Client) -> None:
    """Code, message, and whether asking again can help."""
    world.job()
    world.launched()
    world.claim()
    world.fail()
    status = http.get("/exports/job.merged").json()
    assert status["state"] == "failed"
    assert status["error"] == {"code": "adapter_mismatch", "message": "does not fit", "retryable": False}


def test_the_callers_own_exports_are_listed(world: World, http: httpx.Client) -> None:
    """Of one job or of all; nobody else's."""
    for job_id, user in (("a", "ann"), ("b", "ann"), ("c", "bob")):
        world.job(job_id, user=user)
        world.submit(job_id, user=user)
    assert [found["export_id"] for found in http.get("/exports").json()["exports"]] == ["a.merged", "b.merged"]
    assert [found["export_id"] for found in http.get("/exports?job_id=b").json()["exports"]] == ["b.merged"]
    assert http.get("/exports?job_id=c").json() == {"exports": [], "next": None}
    assert http.get("/exports?after=a.merged").json()["exports"][0]["export_id"] == "b.merged"
    problem(http.get("/exports?job_id=../c"), 400, "invalid_request")
    problem(http.get("/exports?after=x"), 400, "invalid_request")


def test_an_export_may_be_cancelled_twice_but_not_once_it_is_finished(world: World, http: httpx.Client) -> None:
    """Whoever got no answer asks again; a finished one keeps its artifact: 409."""
    world.job()
    http.post("/export", json=MERGED)
    for _ in range(2):
        assert http.post("/exports/job.merged/cancel").json()["state"] == "cancelled"
    http.post("/export", json=MERGED)
    world.queue.deliver_all(world.trigger)
    world.claim()
    world.complete()
    problem(http.post("/exports/job.merged/cancel"), 409, "conflict")
    assert http.get("/exports/job.merged").json()["state"] == "completed"


@pytest.mark.parametrize("job_id", BAD_JOB_IDS)
def test_a_job_id_of_another_form_is_refused_by_name(http: httpx.Client, job_id: str) -> None:
    """400, and the detail names the field."""
    refusal = problem(http.post("/export", json={"job_id": job_id, "export_type": "merged"}), 400, "invalid_request")
    assert "job_id" in refusal["detail"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSON"),
        (b"no json", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"{", "JSON"),
        (b'{"job_id": "\xe4"}', "JSON"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b"null", "object"),
        (b"7", "object"),
        (b"9" * 10_000, "JSON"),
        (b"[" * 60_000, "nested"),
        (b'{"a":' * 10_000, "nested"),
        ({}, "job_id"),
        ({"job_id": "job"}, "export_type"),
        ({"export_type": "merged"}, "job_id"),
        ({**MERGED, "colour": "red"}, "colour"),
        ({**MERGED, "job_id": 7}, "job_id"),
        ({**MERGED, "job_id": None}, "job_id"),
        ({**MERGED, "job_id": ["job"]}, "job_id"),
        ({**MERGED, "export_type": "onnx"}, "export_type"),
        ({**MERGED, "export_type": 1}, "export_type"),
        ({**MERGED, "export_type": "MERGED"}, "export_type"),
        ({"job_id": "job", "export_type": "gguf", "quantization": "q9_9"}, "quantization"),
        ({"job_id": "job", "export_type": "gguf", "quantization": {}}, "quantization"),
        ({**MERGED, "quantization": "q8_0"}, "quantization"),
        ({**MERGED, "hf_token": f"{TOKEN} with spaces"}, "hf_token"),
        ({**MERGED, "hf_token": ""}, "hf_token"),
        ({**MERGED, "hf_token": [TOKEN]}, "hf_token"),
        ({**MERGED, "hf_token": TOKEN * 20}, "hf_token"),
        ({**MERGED, "job_id": 7, "hf_token": TOKEN}, "job_id"),
        ({**MERGED, TOKEN: TOKEN}, "permitted"),
    ],
)
def test_a_bad_body_is_refused_by_name_and_its_token_not_repeated(
    http: httpx.Client, caplog: pytest.LogCaptureFixture, body: bytes | dict[str, Any], named: str
) -> None:
    """400: the detail says which field, and neither answer nor log repeats a token."""
    caplog.set_level(logging.DEBUG)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.post("/export", content=content)
    assert named in problem(response, 400, "invalid_request")["detail"]
    assert TOKEN not in response.text + caplog.text


def test_a_repeated_key_and_nulls_are_fine(world: World, http: httpx.Client) -> None:
    """The last one counts, as everywhere in JSON; null is as if it were not there."""
    world.job()
    body = b'{"job_id": "other", "job_id": "job", "export_type": "merged", "hf_token": null, "quantization": null}'
    assert http.post("/export", content=body).status_code == 202


def test_a_job_is_unknown_someone_elses_not_completed_or_without_adapter(world: World, http: httpx.Client) -> None:
    """404, 403, 400 and 404, each with its code."""
    world.job("bobs", user="bob")
    world.job("running", status="running")
    world.job("gone", adapter_path="/nowhere")
    for job_id, status, code in (
        ("unknown", 404, "job_not_found"),
        ("bobs", 403, "not_yours"),
        ("running", 400, "job_not_completed"),
        ("gone", 404, "adapter_gone"),
    ):
        problem(http.post("/export", json={"job_id": job_id, "export_type": "merged"}), status, code)


def test_an_export_is_unknown_or_someone_elses(world: World, http: httpx.Client) -> None:
    """To look at and to cancel."""
    world.job("bobs", user="bob")
    world.submit("bobs", user="bob")
    for export_id in ("unknown.merged", "no%20id", "%2e%2e.merged", "x" * 2000):
        problem(http.get(f"/exports/{export_id}"), 404, "export_not_found")
        problem(http.post(f"/exports/{export_id}/cancel"), 404, "export_not_found")
    problem(http.get("/exports/bobs.merged"), 403, "not_yours")
    problem(http.post("/exports/bobs.merged/cancel"), 403, "not_yours")


def test_a_gguf_is_queued_and_its_file_answered_when_it_is_there(world: World, http: httpx.Client) -> None:
    """`gguf_path` is the file, not its directory."""
    world.job()
    body = {"job_id": "job", "export_type": "gguf", "quantization": "q4_k_m"}
    response = http.post("/export", json=body)
    assert response.status_code == 202
    assert response.headers["Location"] == "/exports/job.gguf.q4_k_m"
    assert "gguf_path" not in response.json()
    world.queue.deliver_all(world.trigger)
    world.claim("job.gguf.q4_k_m")
    made = world.complete("job.gguf.q4_k_m")
    response = http.post("/export", json=body)
    assert response.status_code == 200
    assert response.json()["gguf_path"] == f"{made.artifacts[0].uri}/model-Q4_K_M.gguf"
    assert http.get("/exports/job.gguf.q4_k_m").json()["quantization"] == "q4_k_m"


@pytest.mark.parametrize(
    ("quantization", "said"), [("iq2_xs", "ask for q2_k"), ("iq3_xxs", "ask for q3_k_s"), ("q9_9", "'iq4_xs'")]
)
def test_a_quantization_that_is_not_made_is_refused_with_one_that_is(
    world: World, http: httpx.Client, quantization: str, said: str
) -> None:
    """By name, where it would need an importance matrix; of another, the ones that are made are listed."""
    world.job()
    body = {"job_id": "job", "export_type": "gguf", "quantization": quantization}
    assert said in problem(http.post("/export", json=body), 400, "invalid_request")["detail"]


def test_nobody_gets_in_without_an_identity(world: World) -> None:
    """401 on every route but health, and nothing is read before."""
    with served(world, user=None) as http:
        for method, path in (
            ("POST", "/export"),
            ("GET", "/exports"),
            ("GET", "/exports/job.merged"),
            ("POST", "/exports/job.merged/cancel"),
        ):
            response = http.request(method, path)
            problem(response, 401, "unauthenticated")
            assert response.headers["WWW-Authenticate"]


def test_the_local_user_is_who_calls_only_where_the_gateway_is_silent(world: World, http: httpx.Client) -> None:
    """A garbled header is nobody."""
    world.job("bobs", user="bob")
    body = {"job_id": "bobs", "export_type": "merged"}
    assert http.post("/export", json=body, headers=as_user("bob")).status_code == 202
    problem(http.post("/export", json=body), 403, "not_yours")
    problem(http.post("/export", json=body, headers={USERINFO_HEADER: "garbled"}), 401, "unauthenticated")


@pytest.mark.parametrize("environ", [{"PROJECT_ID": "p"}, {"QUEUE_URL": "pubsub://p/topic"}])
def test_with_a_cloud_setting_there_is_no_local_user(world: World, environ: dict[str, str]) -> None:
    """Even where a server tries to name one."""
    with served(world, environ=environ) as http:
        problem(http.get("/exports"), 401, "unauthenticated")


@pytest.mark.parametrize(
    "headers",
    [
        {"Gemma-Export.Local-User": "ann"},
        {"gemma_export.local_user": "ann"},
        {"X-Forwarded-User": "ann"},
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
def test_no_header_makes_one_a_local_user(world: World, headers: dict[str, str]) -> None:
    """Nor does a page in the browser of this machine: foreign host and origin are nobody."""
    foreign = "Host" in headers or "Origin" in headers
    with served(world, user="ann" if foreign else None) as http:
        problem(http.get("/exports", headers=headers), 401, "unauthenticated")


@pytest.mark.parametrize("path", ["/", "/exports/", "/export/", "/exports/a/b", "/exports/a/cancel/b", "/Export", "/x"])
def test_there_is_no_other_route(http: httpx.Client, path: str) -> None:
    """404 for every method."""
    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        problem(http.request(method, path), 404, "route_not_found")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/export", "OPTIONS, POST"),
        ("/exports", "GET, HEAD, OPTIONS"),
        ("/exports/job.merged", "GET, HEAD, OPTIONS"),
        ("/exports/job.merged/cancel", "OPTIONS, POST"),
        ("/health", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_wrong_method_is_405_and_allow_says_which_are_right(http: httpx.Client, path: str, allowed: str) -> None:
    """OPTIONS asks for just that; HEAD is GET without a body."""
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "BREW", "POST" if "GET" in allowed else "GET"):
        response = http.request(method, path)
        problem(response, 405, "method_not_allowed")
        assert response.headers["Allow"] == allowed
    options = http.options(path)
    assert (options.status_code, options.headers["Allow"], options.content) == (204, allowed, b"")
    if "HEAD" in allowed:
        assert http.head(path).content == b""


@pytest.mark.parametrize("size", [64 * 1024 + 1, 500_000, 5_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_64_kib_is_413(http: httpx.Client, size: int, chunked: bool) -> None:
    """Whether its length is announced or not."""
    content = (b" " * 1000 for _ in range(size // 1000 + 1)) if chunked else b" " * size
    try:
        response = http.post("/export", content=content)
    except httpx.WriteError:
        # Far over the limit the server stops listening; a client that does not read meanwhile sees only that.
        assert size == 5_000_000
        return
    problem(response, 413, "body_too_large")


def test_a_body_of_just_64_kib_is_read(world: World, http: httpx.Client) -> None:
    """Also when it comes in chunks."""
    world.job()
    body = json.dumps(MERGED).encode().ljust(64 * 1024)
    assert http.post("/export", content=body).status_code == 202
    assert http.post("/export", content=iter([body[:10], body[10:]])).status_code == 202


def test_a_lying_content_length_is_no_crash(http: httpx.Client) -> None:
    """Negative, no number, or more than comes."""
    port = http.base_url.port
    assert port is not None
    for length in ("-1", "many", "10"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
            raw.sendall(f"POST /export HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{{".encode())
            raw.shutdown(socket.SHUT_WR)
            answer = raw.makefile("rb").readline()
        assert answer.split()[1] in (b"400", b"413")


def test_too_many_unfinished_exports_are_429(world: World, http: httpx.Client) -> None:
    """With the seconds to wait."""
    for number in range(21):
        world.job(f"job{number}")
    for number in range(20):
        assert http.post("/export", json={"job_id": f"job{number}", "export_type": "merged"}).status_code == 202
    response = http.post("/export", json={"job_id": "job20", "export_type": "merged"})
    problem(response, 429, "too_many_exports")
    assert int(response.headers["Retry-After"]) > 0


def test_a_queue_that_is_down_is_503_and_nothing_is_lost(world: World, http: httpx.Client) -> None:
    """Asking again goes through."""
    world.job()
    world.queue.down = True
    problem(http.post("/export", json=MERGED), 503, "unavailable")
    assert http.get("/exports/job.merged").json()["state"] == "queued"
    world.queue.down = False
    assert http.post("/export", json=MERGED).status_code == 202


def test_a_record_store_that_does_not_answer_is_503(world: World, http: httpx.Client) -> None:
    """The file is damaged, say."""
    world.job()
    world.records.close()
    for path in world.home.glob("records.db*"):
        path.write_bytes(b"damaged" * 1000)
    problem(http.post("/export", json=MERGED), 503, "unavailable")


def test_a_fault_of_ours_is_500_with_an_id_that_is_logged(
    world: World, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer does not describe it, the log does."""
    world.job()
    http.post("/export", json=MERGED)
    other = sqlite3.connect(world.home / "records.db", isolation_level=None)
    other.execute("UPDATE exports SET document = json_set(document, '$.state', 'secret_state')")
    other.close()
    document = problem(http.get("/exports/job.merged"), 500, "record_invalid")
    assert "secret_state" not in json.dumps(document)
    fault_id = document["instance"].removeprefix("urn:uuid:")
    assert fault_id in document["detail"]
    assert fault_id in caplog.text
    assert "secret_state" in caplog.text


def test_a_bug_is_500_too(world: World, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised, the answer is a problem document."""
    monkeypatch.setattr(world.service, "list_exports", lambda *_, **__: 1 / 0)
    document = problem(http.get("/exports"), 500, "internal")
    assert "ZeroDivision" not in json.dumps(document)


def test_a_request_leaves_one_line_in_the_log(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """Method, path, status, duration."""
    caplog.set_level(logging.INFO, logger="dispatcher")
    http.get("/health")
    assert [record.getMessage().rsplit(" in ")[0] for record in caplog.records] == ["GET /health -> 200"]


def test_work_is_shown_by_its_state_in_the_record(world: World, http: httpx.Client) -> None:
    """Stage and fraction come from the exporter's heartbeat."""
    world.job()
    world.launched()
    world.claim()
    status = http.get("/exports/job.merged").json()
    assert (status["state"], status["stage"], status["attempt"]) == (State.RUNNING, "claimed", 1)
    assert "lease" not in status
