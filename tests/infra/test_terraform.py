"""The configuration of a deployment, read by the real `terraform` against the schema of the real providers."""

import base64
import json
import re
import shlex
from typing import Any

import pytest
import yaml

from dispatcher.openapi import document
from dispatcher.settings import Settings
from tests.infra.conftest import Find
from tests.infra.test_environment import environments
from tests.terraform import provider
from tests.terraform.provider import SCHEMA
from tests.terraform.running import INFRA, PROJECT, Resource, Terraform, TerraformError

CONFIGURATION = "\n".join(path.read_text() for path in sorted(INFRA.glob("*.tf")))
VARIABLES = dict(re.findall(r'^variable "(\w+)" \{\n(.*?)^\}', (INFRA / "variables.tf").read_text(), re.M | re.S))
GOOD: dict[str, Any] = {
    "gpu": False,
    "bucket_name": "a-bucket",
    "adapter_sources": ["gs://training-runs", "gs://other/deep/prefix"],
    "create_firestore_database": False,
    "firestore_database": "exports",
    "exporter_cpu": 8,
    "exporter_memory_gib": 32,
    "task_timeout_seconds": 86400,
    "memory_budget_mib": 16384,
    "alert_emails": ["a@example.com"],
    "notification_channels": ["projects/p/notificationChannels/12"],
    "billing_account": "0123AB-456789-CDEF01",
    "budget_amount": 5000,
    "labels": {"team": "export"},
    "gateway_region": "europe-west1",
    "build_region": "global",
    "parallelism": 4,
}
BAD: dict[str, list[Any]] = {
    "project_id": ["Some Project", "p"],
    "region": ["us", "us-central1-a"],
    "gateway_region": ["europe"],
    "build_region": ["europe"],
    "parallelism": [0, 2.5],
    "labels": [{"Team": "x"}, {"team": "X y"}],
    "bucket_name": ["-b", "B"],
    "bucket_location": ["us/eu"],
    "adapter_sources": [["training"], ["gs://b/*"], ["s3://bucket"]],
    "firestore_database": ["(other)", "Ex"],
    "firestore_location": ["US"],
    "gpu_type": ["nvidia-h100"],
    "exporter_cpu": [3, 2, 20],
    "exporter_memory_gib": [15.5, 8, 64],
    "memory_budget_mib": [32, 15 * 1024],
    "task_timeout_seconds": [60, 7200, 100_000, 600.5],
    "max_attempts": [0, 12, 1.5],
    "engine": ["magic"],
    "hf_token_secret": ["a/b", "gemma-export-token"],
    "max_instances": [0, 1000, 1.5],
    "max_unfinished_per_user": [0, 1.5],
    "lease_seconds": [5, 3600, 30.5],
    "clock_skew_seconds": [-1, 3600, 1.5],
    "collect_after_days": [0, 1000, 1.5],
    "download_url_seconds": [1, 50_000, 60.5],
    "message_retention_days": [0, 32, 1.5],
    "jwt_issuer": ["http://issuer", "https://only.the.issuer"],
    "jwt_jwks_url": ["keys"],
    "jwt_audience": ["a,b"],
    "alert_emails": [["nobody"]],
    "notification_channels": [["a@example.com"]],
    "failed_exports_per_hour": [0, 1.5],
    "oldest_queued_minutes": [5, 10.5],
    "budget_amount": [-1, 0.5],
    "billing_account": ["my account"],
}
"""Of each variable, values that are refused where all others have their defaults."""
JUDGED_WITH_OTHERS = {"exporter_cpu", "exporter_memory_gib", "memory_budget_mib", "jwt_issuer", "engine"}
"""A rule that looks at another variable too is not looked at where that one is wrong."""


def test_it_is_formatted(deployment: Terraform) -> None:
    """As `terraform fmt` would have it."""
    assert deployment.run("fmt", "-check", "-diff") == ""


def test_every_argument_is_one_of_the_providers(deployment: Terraform) -> None:
    """And every block, type and reference, those in `dynamic` blocks included."""
    deployment.validate()


@pytest.fixture
def no_billing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A project whose billing account Google does not tell."""
    monkeypatch.setattr(provider, "BILLING_ACCOUNT", "")


@pytest.mark.parametrize(
    ("file", "right", "wrong", "said"),
    [
        ("messages.tf", "ack_deadline_seconds ", "ack_deadline_second ", "Unsupported argument"),
        ("messages.tf", "retry_policy {", "retry_policies {", "Unsupported block type"),
        ("exporter.tf", "accelerator = node", "accelerators = node", "Unsupported argument"),
        ("exporter.tf", 'dynamic "node_selector"', 'dynamic "node_selectors"', "Unsupported block type"),
        ("functions.tf", "value = env.value", "values = env.value", "Unsupported argument"),
        ("data.tf", "field_path = fields.value", "field = fields.value", "Unsupported argument"),
        ("data.tf", 'dynamic "fields"', 'dynamic "field"', "Unsupported block type"),
        ("alerts.tf", "threshold_percent = threshold_rules.value", "percent = 1", "Unsupported argument"),
        ("outputs.tf", "exports.default_hostname", "exports.hostname", "Unsupported attribute"),
        ("messages.tf", "].uri}/", "].url}/", "Unsupported attribute"),
        ("access.tf", 'role_id     = "gemma', 'id = "gemma', "Missing required argument"),
    ],
)
def test_a_slip_is_found(deployment: Terraform, file: str, right: str, wrong: str, said: str) -> None:
    """One in a block's content too; what could not be found, no test of this kind would show."""
    path = deployment.directory / file
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    try:
        with pytest.raises(TerraformError, match=said):
            deployment.validate()
    finally:
        path.write_text(text)


def test_the_schema_is_that_of_the_pinned_providers() -> None:
    """Extracted anew when the pin is changed: `python -m tests.terraform.extract`."""
    pinned = dict(re.findall(r'source  = "hashicorp/([\w-]+)"\s+version = "([\d.]+)"', CONFIGURATION))
    assert pinned == {name: told["version"] for name, told in SCHEMA.items()}
    used = {kind for _, kind in re.findall(r'^(resource|data) "(\w+)"', CONFIGURATION, re.M)}
    assert used == {kind for told in SCHEMA.values() for block in ("resource", "data") for kind in told[block]}


def test_all_variables_are_described_and_have_a_default_and_bounds() -> None:
    """But for the project, which has no default, and switches, which have no bounds."""
    assert VARIABLES
    for name, text in VARIABLES.items():
        assert re.search(r'^  description = ".{20,}"$', text, re.M), name
        assert ("\n  default " in text) == (name != "project_id"), name
        assert ("validation {" in text) == ("= bool" not in text), name


def variable_at(lines: list[str], line: int) -> str:
    """The variable that a line of variables.tf, counted from 1, is about."""
    return next(text.split('"')[1] for text in reversed(lines[:line]) if text.startswith("variable "))


def test_each_bound_refuses_what_is_beyond_it(deployment: Terraform) -> None:
    """Every rule there is; Terraform says all that is wrong at once, so a few plans see every value."""
    lines = (INFRA / "variables.tf").read_text().splitlines()
    broken = set[int]()
    alone = [{name: value} for name, values in BAD.items() if name in JUDGED_WITH_OTHERS for value in values]
    others = {name: values for name, values in BAD.items() if name not in JUDGED_WITH_OTHERS}
    together: list[dict[str, Any]] = [
        {name: values[number] for name, values in others.items() if len(values) > number}
        for number in range(max(map(len, others.values())))
    ]
    for wrong in [*alone, *together, {"engine": "unsloth", "gpu": False}]:
        with pytest.raises(TerraformError) as refused:
            deployment.plan(**wrong)
        told = {int(line) for line in re.findall(r"rule at\s+variables\.tf:(\d+)", str(refused.value))}
        assert {variable_at(lines, line) for line in told} >= wrong.keys() - {"gpu"}
        broken |= told
    rules = {number for number, line in enumerate(lines, 1) if line == "  validation {"}
    assert broken == rules


def test_what_is_said_within_bounds_is_taken(deployment: Terraform) -> None:
    """Every one at once."""
    assert deployment.plan(**GOOD)


def test_the_lane_without_a_gpu(deployment: Terraform, plan: list[Resource]) -> None:
    """The same job but for the GPU, and a task may take a day."""
    (lane,) = (
        each.values["template"][0]["template"][0]
        for each in deployment.plan(gpu=False, task_timeout_seconds=86400)
        if each.kind == "google_cloud_run_v2_job"
    )
    (usual,) = (each.values["template"][0]["template"][0] for each in plan if each.kind == "google_cloud_run_v2_job")
    assert usual["node_selector"] == [{"accelerator": "nvidia-l4"}]
    assert usual["containers"][0]["resources"][0]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert (usual["gpu_zonal_redundancy_disabled"], usual["timeout"]) == (True, "3600s")
    assert usual["execution_environment"] == "EXECUTION_ENVIRONMENT_GEN2"
    assert lane["node_selector"] == []
    assert lane["containers"][0]["resources"][0]["limits"] == {"cpu": "4", "memory": "16Gi"}
    assert (lane["gpu_zonal_redundancy_disabled"], lane["timeout"]) == (None, "86400s")
    assert lane["containers"][0]["env"] == usual["containers"][0]["env"]


def test_a_larger_gpu_brings_a_newer_driver(deployment: Terraform) -> None:
    """Which is to be found before what the image brings for an older one."""
    said = {"gpu_type": "nvidia-rtx-pro-6000", "exporter_cpu": 20, "exporter_memory_gib": 80}
    (job,) = (each.values for each in deployment.plan(**said) if each.kind == "google_cloud_run_v2_job")
    (task,) = job["template"][0]["template"]
    variables = {each["name"]: each["value"] for each in task["containers"][0]["env"]}
    assert variables["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert (job["launch_stage"], task["node_selector"]) == ("BETA", [{"accelerator": "nvidia-rtx-pro-6000"}])


@pytest.mark.parametrize("tasks", [3, 4])
def test_as_many_tasks_run_at_once_as_there_may_be_gpus(deployment: Terraform, tasks: int) -> None:
    """Three, unless more is said; the trigger says how many there are in all."""
    said = {} if tasks == 3 else {"parallelism": tasks}
    (job,) = (each.values for each in deployment.plan(**said) if each.kind == "google_cloud_run_v2_job")
    assert (job["template"][0]["parallelism"], job["template"][0]["task_count"]) == (tasks, 1)


def test_every_call_counts_against_the_project() -> None:
    """A person's own credentials name none, and some APIs refuse such calls."""
    providers = re.findall(r'^provider "[\w-]+" \{.*?^\}', CONFIGURATION, re.M | re.S)
    assert len(providers) == 2
    for text in providers:
        assert re.search(r"billing_project +=\s+var.project_id", text)
        assert re.search(r"user_project_override += true", text)


def test_the_build_is_told_the_lane(deployment: Terraform) -> None:
    """The image with Unsloth is for the GPU."""
    assert "_VARIANT=gpu" in deployment.outputs()["build"]
    assert "_VARIANT=cpu" in deployment.outputs(gpu=False)["build"]


def test_a_task_is_retried_as_often_as_the_exporter_counts(find: Find) -> None:
    """`MAX_ATTEMPTS` is the first try and the job's retries."""
    (task,) = find("google_cloud_run_v2_job.exporter").values["template"][0]["template"]
    tries = {each["name"]: each["value"] for each in task["containers"][0]["env"]}["MAX_ATTEMPTS"]
    assert task["max_retries"] == int(tries) - 1 == 3


def test_no_rule_of_the_bucket_can_match_an_artifact(find: Find) -> None:
    """Collection is the sweep's work; nothing is public, and what was deleted by mistake is there for a week."""
    bucket = find("google_storage_bucket.artifacts").values
    assert bucket["lifecycle_rule"] == []
    assert bucket["retention_policy"] == []
    assert (bucket["uniform_bucket_level_access"], bucket["public_access_prevention"]) == (True, "enforced")
    assert bucket["force_destroy"] is False
    assert bucket["soft_delete_policy"][0]["retention_duration_seconds"] == 604800


def test_the_database_has_the_indexes_of_the_file(plan: list[Resource]) -> None:
    """Those that queries need, and none on fields that nobody asks for."""
    file = json.loads((INFRA / "firestore.indexes.json").read_text())
    indexes = [each.values for each in plan if each.kind == "google_firestore_index"]
    planned = [[(field["field_path"], field["order"]) for field in index["fields"]] for index in indexes]
    assert sorted(planned) == sorted(
        [(field["fieldPath"], field["order"]) for field in index["fields"]] for index in file["indexes"]
    )
    bare = [each.values for each in plan if each.kind == "google_firestore_field"]
    assert {field["field"] for field in bare} == {field["fieldPath"] for field in file["fieldOverrides"]}
    assert all(field["index_config"] == [{"indexes": []}] for field in bare)
    assert {each["collection"] for each in indexes + bare} == {"exports"}


def test_the_database_is_made_only_where_it_is_not_there(deployment: Terraform, find: Find) -> None:
    """The training service may have made it; what is made cannot be deleted by an oversight."""
    assert find("google_firestore_database.records").values["delete_protection_state"] == "DELETE_PROTECTION_ENABLED"
    kinds = {each.kind for each in deployment.plan(create_firestore_database=False)}
    assert "google_firestore_database" not in kinds
    assert "google_firestore_index" in kinds


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def test_deliveries_outlast_a_launch_that_died(find: Find) -> None:
    """A message is refused while a launch's lease is good, and must come again after it."""
    start = find("google_pubsub_subscription.start").values
    (retry,), (dead,) = start["retry_policy"], start["dead_letter_policy"]
    first, most = seconds(retry["minimum_backoff"]), seconds(retry["maximum_backoff"])
    assert find("google_pubsub_subscription.fail").values["retry_policy"] == [retry]
    waited = sum(min(first * 2**number, most) for number in range(dead["max_delivery_attempts"] - 1))
    longest = Settings.lease_seconds + 120
    assert waited > 2 * longest
    assert start["ack_deadline_seconds"] == 120


def test_a_day_can_be_replayed_for_as_long_as_tokens_live(deployment: Terraform) -> None:
    """Acknowledged messages are kept, by topic and subscription, and no subscription expires."""
    for days in (7, 31):
        plan = deployment.plan(message_retention_days=days)
        subscriptions = {each.name: each.values for each in plan if each.kind == "google_pubsub_subscription"}
        topics = [each.values for each in plan if each.kind == "google_pubsub_topic"]
        kept = {each["message_retention_duration"] for each in [*subscriptions.values(), *topics]}
        assert kept == {f"{days * 86400}s"}
        assert subscriptions["start"]["retain_acked_messages"] is True
        assert all(each["expiration_policy"] == [{"ttl": ""}] for each in subscriptions.values())


def account(name: str) -> str:
    return f"gemma-export-{name}@{PROJECT}.iam.gserviceaccount.com"


def test_each_caller_shows_itself(find: Find) -> None:
    """Who may call a function is who calls it: the gateway, Pub/Sub and Cloud Scheduler, each as its own account."""
    (backend,) = find("google_api_gateway_api_config.exports").values["gateway_config"]
    assert backend["backend_config"] == [{"google_service_account": account("gateway")}]
    (scheduled,) = find("google_cloud_scheduler_job.sweep").values["http_target"]
    assert scheduled["oidc_token"][0]["service_account_email"] == account("scheduler")
    for name in ("start", "fail"):
        (push,) = find(f"google_pubsub_subscription.{name}").values["push_config"]
        assert push["oidc_token"][0]["service_account_email"] == account("push")


def test_each_subscription_is_of_its_topic(find: Find) -> None:
    """Messages start exports; dead letters fail them, and are kept to be read."""
    jobs, dead = (find(f"google_pubsub_topic.{name}").values["id"] for name in ("jobs", "dead_letters"))
    topics = {
        name: find(f"google_pubsub_subscription.{name}").values["topic"] for name in ("start", "fail", "dead_letters")
    }
    assert topics == {"start": jobs, "fail": dead, "dead_letters": dead}
    assert find("google_pubsub_subscription.dead_letters").values["push_config"] == []


def test_messages_are_pushed_to_who_takes_them(find: Find) -> None:
    """With a token for that very function, under the path by which functions-framework knows a raw push."""
    for name, target, topic in (("start", "start_export", "jobs"), ("fail", "fail_export", "dead_letters")):
        (push,) = find(f"google_pubsub_subscription.{name}").values["push_config"]
        url = find(f'google_cloud_run_v2_service.function["{target}"]').values["uri"]
        topic_id = find(f"google_pubsub_topic.{topic}").values["id"]
        assert push["push_endpoint"] == f"{url}/{topic_id}"
        assert re.fullmatch(r"https://[^/]+/projects/[^/]+/topics/[^/]+", push["push_endpoint"])
        assert push["oidc_token"][0]["audience"] == url
    dead = find("google_pubsub_subscription.start").values["dead_letter_policy"][0]["dead_letter_topic"]
    assert dead == find("google_pubsub_topic.dead_letters").values["id"]


def test_a_push_is_answered_before_it_counts_as_unanswered(plan: list[Resource], find: Find) -> None:
    """The function's own limit is no more than the deadline of the acknowledgement."""
    services = {each.key: each.values for each in plan if each.kind == "google_cloud_run_v2_service"}
    for name, target in (("start", "start_export"), ("fail", "fail_export")):
        deadline = find(f"google_pubsub_subscription.{name}").values["ack_deadline_seconds"]
        assert seconds(services[target]["template"][0]["timeout"]) <= deadline <= 600


def test_the_sweep_is_called_every_five_minutes(find: Find) -> None:
    """By POST, with a token for it, and given as long as it may take."""
    job = find("google_cloud_scheduler_job.sweep").values
    service = find('google_cloud_run_v2_service.function["sweep"]').values
    (target,) = job["http_target"]
    assert (job["schedule"], target["http_method"], target["uri"]) == ("*/5 * * * *", "POST", f"{service['uri']}/")
    assert target["oidc_token"][0]["audience"] == service["uri"]
    assert seconds(job["attempt_deadline"]) == seconds(service["template"][0]["timeout"])
    template = service["template"][0]
    assert (template["scaling"][0]["max_instance_count"], template["max_instance_request_concurrency"]) == (1, 1)


def test_a_function_has_what_it_needs(plan: list[Resource]) -> None:
    """Half a gigabyte, which a cold start with every client of Google's takes a fifth of, and a burst to start with."""
    for each in plan:
        if each.kind == "google_cloud_run_v2_service":
            (resources,) = each.values["template"][0]["containers"][0]["resources"]
            assert resources == {"limits": {"cpu": "1", "memory": "512Mi"}, "cpu_idle": True, "startup_cpu_boost": True}


def test_no_image_is_whatever_is_the_latest(plan: list[Resource]) -> None:
    """The build deploys by digest, and Terraform leaves its images alone."""
    images = set()
    for each in plan:
        if each.kind == "google_cloud_run_v2_service":
            images.add(each.values["template"][0]["containers"][0]["image"])
        elif each.kind == "google_cloud_run_v2_job":
            images.add(each.values["template"][0]["template"][0]["containers"][0]["image"])
    # Google's own, which do nothing, and have no versions; only until the first build.
    assert images == {f"us-docker.pkg.dev/cloudrun/container/{name}" for name in ("hello", "job")}
    ignored = re.findall(r"ignore_changes = \[(.*)\]", CONFIGURATION)
    assert ignored == [
        "template[0].template[0].containers[0].image, template[0].labels, client, client_version",
        "template[0].containers[0].image, template[0].labels, template[0].revision, client, client_version",
    ]


def test_the_gateway_is_told_the_contract(find: Find) -> None:
    """The very file in infra/, with the function's address and the issuer filled in."""
    (config,) = find("google_api_gateway_api_config.exports").values["openapi_documents"]
    told = yaml.safe_load(base64.b64decode(config["document"][0]["contents"]))
    url = find('google_cloud_run_v2_service.function["export_api"]').values["uri"]
    (scheme,) = told["securityDefinitions"].values()
    assert json.dumps(told).count(url) >= 1
    assert scheme["x-google-issuer"] == "https://securetoken.google.com/some-project"
    assert scheme["x-google-audiences"] == "some-project"
    assert told["paths"].keys() == document()["paths"].keys()


def test_a_budget_needs_a_billing_account_and_can_be_left_out(deployment: Terraform, find: Find) -> None:
    """The project's own, unless another is named."""
    assert find("google_billing_budget.project").values["billing_account"] == "012345-6789AB-CDEF01"
    mailed = {each.kind: each.values for each in deployment.plan(alert_emails=["a@example.com"])}
    budget = mailed["google_billing_budget"]
    assert budget["all_updates_rule"][0]["monitoring_notification_channels"] == [
        "projects/some-project/notificationChannels/1"
    ]
    assert budget["budget_filter"][0]["projects"] == [f"projects/{provider.PROJECT_NUMBER}"]
    assert budget["amount"][0]["specified_amount"][0]["units"] == "100"
    rules = [(rule["threshold_percent"], rule["spend_basis"]) for rule in budget["threshold_rules"]]
    assert rules == [(0.5, None), (0.9, None), (1, None), (1, "FORECASTED_SPEND")]
    assert "google_billing_budget" not in {each.kind for each in deployment.plan(budget_amount=0)}


def test_a_budget_of_nobody_knows_what_is_refused_with_what_to_do(deployment: Terraform, no_billing: None) -> None:
    """Google says nothing of a project's billing account where one may not see it."""
    with pytest.raises(TerraformError, match=r"set\s+billing_account,\s+or\s+budget_amount = 0"):
        deployment.plan()
    assert deployment.plan(billing_account="012345-6789AB-CDEF01")
    assert deployment.plan(budget_amount=0)


def test_alerts_that_reach_nobody_are_said_to(deployment: Terraform) -> None:
    """A warning, since somebody may look at the console."""
    warning = "Alerts reach nobody"
    deployment.plan()
    assert warning in deployment.run("plan", "-input=false")
    deployment.plan(alert_emails=["a@example.com"])
    assert warning not in deployment.run("plan", "-input=false")


def test_an_alert_waits_for_its_metric(plan: list[Resource]) -> None:
    """Cloud Monitoring refuses a policy on a metric that was made a moment ago, for up to ten minutes."""
    (wait,) = (each.values for each in plan if each.kind == "time_sleep")
    counting = ("google_logging_metric.failed_exports", "google_logging_metric.sweeps")
    names = {each.values["name"] for each in plan if each.address in counting}
    assert wait["create_duration"] == "600s"
    assert set(wait["triggers"]["names"].split()) == names
    policies = re.findall(r'^resource "google_monitoring_alert_policy".*?^\}', CONFIGURATION, re.M | re.S)
    assert len(policies) == 2
    assert all("depends_on = [time_sleep.metrics]" in policy for policy in policies)


def test_the_gateway_waits_for_its_agents_role() -> None:
    """In a new project API Gateway's agent has none, and a gateway is refused."""
    (api,) = re.findall(r'^resource "google_api_gateway_api" .*?^\}', CONFIGURATION, re.M | re.S)
    assert "google_project_iam_member.gateway_agent" in api


def test_the_gateway_is_where_it_is_said_to_be(deployment: Terraform) -> None:
    """API Gateway is in fewer regions than Cloud Run."""
    for said, region in (({}, "us-central1"), ({"gateway_region": "europe-west1"}, "europe-west1")):
        (gateway,) = (each for each in deployment.plan(**said) if each.kind == "google_api_gateway_gateway")
        assert gateway.values["region"] == region


def test_the_build_is_told_where(deployment: Terraform) -> None:
    """It runs in a region that has builds, and deploys in that of the deployment."""
    build = deployment.outputs(region="europe-west4", build_region="global")["build"]
    assert "--region=global" in build
    assert "_REGION=europe-west4" in build
    assert "--region=europe-west4" in deployment.outputs(region="europe-west4")["build"]


def test_the_command_of_doctor_is_told_all_settings(deployment: Terraform) -> None:
    """Those of functions and job, whatever is in them, so that doctor compares the two."""
    said = {"jwt_issuer": "https://it's.example", "jwt_jwks_url": "https://keys.example", "jwt_audience": "$(x)"}
    source = "gs://training/o'brien; x"
    words = shlex.split(deployment.outputs(**said, adapter_sources=[source])["doctor"])
    end = words.index("gemma-export")
    unset = ["HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"]
    cleared = [word for name in unset for word in ("-u", name)]
    assert words[: 1 + len(cleared)] == ["env", *cleared]
    environment = dict(word.split("=", 1) for word in words[1 + len(cleared) : end])
    places = ["--adapters", "gs://some-project-gemma-export/adapters", "--adapters", source]
    assert words[end:] == ["gemma-export", "doctor", *places]
    given = environments(deployment.plan(**said))
    expected = {**given["job"], **given["export_api"]}
    assert environment == {name: value for name, value in expected.items() if not name.startswith("FUNCTION_")}
    assert Settings.from_env(environment).jwt == Settings.from_env(given["export_api"]).jwt


def test_what_is_made_is_private_and_can_be_restored(find: Find) -> None:
    """Uploads of the build too; and the database's last week."""
    builds = find("google_storage_bucket.builds").values
    assert (builds["uniform_bucket_level_access"], builds["public_access_prevention"]) == (True, "enforced")
    database = find("google_firestore_database.records").values
    assert database["point_in_time_recovery_enablement"] == "POINT_IN_TIME_RECOVERY_ENABLED"
    assert database["type"] == "FIRESTORE_NATIVE"


def test_images_to_roll_back_to_are_kept(find: Find) -> None:
    """The newest twenty, however old; of the others those of three months."""
    policies = {
        each["action"]: each for each in find("google_artifact_registry_repository.images").values["cleanup_policies"]
    }
    assert policies["KEEP"]["most_recent_versions"][0]["keep_count"] == 20
    assert policies["DELETE"]["condition"][0]["older_than"] == f"{90 * 86400}s"


def test_every_api_that_is_used_is_switched_on(plan: list[Resource]) -> None:
    """In an empty project nothing is."""
    on = {each.key for each in plan if each.kind == "google_project_service"}
    used = {
        "google_api_gateway_api": "apigateway",
        "google_artifact_registry_repository": "artifactregistry",
        "google_billing_budget": "billingbudgets",
        "google_cloud_run_v2_job": "run",
        "google_cloud_scheduler_job": "cloudscheduler",
        "google_firestore_database": "firestore",
        "google_logging_metric": "logging",
        "google_monitoring_alert_policy": "monitoring",
        "google_pubsub_topic": "pubsub",
        "google_service_account": "iam",
        "google_storage_bucket": "storage",
    }
    assert used.keys() <= {each.kind for each in plan}
    # By our code, by the build, by the gateway for whatever passes it, and by Terraform itself.
    besides = {"secretmanager", "iamcredentials", "cloudbuild", "servicecontrol", "servicemanagement"}
    besides |= {"cloudbilling", "cloudresourcemanager", "serviceusage"}
    assert on == {f"{name}.googleapis.com" for name in {*used.values()} | besides}
