"""What a deployment's processes find in their environment: all that settings read, and nothing that they do not."""

import ast
import re
from pathlib import Path

import pytest

from dispatcher import settings
from dispatcher.settings import JwtCheck, Settings
from tests.terraform.running import PROJECT, Resource, Terraform

BY_CLOUD_RUN = {
    "K_SERVICE",
    "CLOUD_RUN_JOB",
    "CLOUD_RUN_EXECUTION",
    "CLOUD_RUN_TASK_INDEX",
    "CLOUD_RUN_TASK_COUNT",
    "CLOUD_RUN_TASK_ATTEMPT",
}
BY_THE_TRIGGER = {"EXPORT_ID", "LEASE_ID", "TRACEPARENT"}
OF_A_LAPTOP = {"GEMMA_EXPORT_ID_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
FOLLOWING = {"ARTIFACTS_URL", "QUEUE_URL", "RUNNER_URL", "TOKENS_URL"}
"""Made from project, bucket, topic, region and job, unless they are set."""
BY_FUNCTIONS_FRAMEWORK = {"FUNCTION_TARGET", "FUNCTION_SIGNATURE_TYPE"}
EVERYWHERE = {
    *("PROJECT_ID", "GCS_EXPORT_BUCKET_NAME", "REGION", "EXPORTER_JOB", "EXPORT_TOPIC", "RECORDS_URL"),
    *("GEMMA_EXPORT_HOME", "LEASE_SECONDS", "CLOCK_SKEW_SECONDS", "MAX_ATTEMPTS", "TOKEN_TTL_SECONDS"),
    "COLLECT_AFTER_SECONDS",
}
OF_FUNCTIONS = {"MAX_UNFINISHED_PER_USER", "DOWNLOAD_URL_SECONDS", "SIGNING_ACCOUNT"}
OF_THE_JOB = {"ENGINE", "MEMORY_BUDGET_MIB", "BASE_CACHE", "VERIFY_LOGITS"}
OF_THE_JWT = {"JWT_ISSUER", "JWT_AUDIENCE", "JWT_JWKS_URL"}


def read_names() -> set[str]:
    """Every name of a variable in dispatcher/settings.py."""
    tree = ast.parse(Path(settings.__file__).read_text())
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {text for text in texts if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|REGION|ENGINE|TRACEPARENT", text)}


def environments(plan: list[Resource]) -> dict[str, dict[str, str]]:
    """What each function, and the job, is given; a secret stands for itself."""
    found = {}
    for each in plan:
        if each.kind == "google_cloud_run_v2_service":
            name, container = str(each.key), each.values["template"][0]["containers"][0]
        elif each.kind == "google_cloud_run_v2_job":
            name, container = "job", each.values["template"][0]["template"][0]["containers"][0]
        else:
            continue
        found[name] = {variable["name"]: variable["value"] or "hf_secret" for variable in container["env"]}
    return found


def test_all_that_settings_read_is_set_and_nothing_else(deployment: Terraform) -> None:
    """But for what the platform, the trigger or a laptop sets, and what follows from the rest."""
    given = environments(deployment.plan(hf_token_secret="hub-token"))
    assert set().union(*given.values()) - BY_FUNCTIONS_FRAMEWORK == (
        read_names() - BY_CLOUD_RUN - BY_THE_TRIGGER - OF_A_LAPTOP - FOLLOWING
    )
    assert read_names() >= BY_CLOUD_RUN | BY_THE_TRIGGER | OF_A_LAPTOP | FOLLOWING


def test_each_process_is_told_what_is_for_it(deployment: Terraform) -> None:
    """The exporter's own token is nothing for a function, nor are callers' limits for the job."""
    given = environments(deployment.plan(hf_token_secret="hub-token"))
    assert given.pop("job").keys() == EVERYWHERE | OF_THE_JOB | {"HF_TOKEN"}
    assert {target: names.keys() for target, names in given.items()} == dict.fromkeys(
        ("export_api", "start_export", "fail_export", "sweep"),
        EVERYWHERE | OF_FUNCTIONS | OF_THE_JWT | BY_FUNCTIONS_FRAMEWORK,
    )
    assert all(names["FUNCTION_TARGET"] == target for target, names in given.items())


def test_settings_read_from_it_lead_to_what_is_planned(plan: list[Resource]) -> None:
    """Bucket, topic, job, database: each by the name that it gets."""
    names = {each.address: each.values.get("name") for each in plan}
    for environment in environments(plan).values():
        read = Settings.from_env(environment)
        assert not read.embedded
        assert read.artifacts_url == f"gs://{names['google_storage_bucket.artifacts']}"
        assert read.queue_url == f"pubsub://{PROJECT}/{names['google_pubsub_topic.jobs']}"
        assert read.runner_url == f"run://{PROJECT}/us-central1/{names['google_cloud_run_v2_job.exporter']}"
        assert read.records_url == f"firestore://{PROJECT}/{names['google_firestore_database.records']}"
        assert read.tokens_url == f"secretmanager://{PROJECT}"


def test_defaults_are_those_of_the_code(plan: list[Resource]) -> None:
    """A laptop and a deployment behave alike, but for the memory that a task has."""
    read = {name: Settings.from_env(environment) for name, environment in environments(plan).items()}
    default = Settings.from_env({"PROJECT_ID": PROJECT})
    alike = [
        *("lease_seconds", "clock_skew_seconds", "max_attempts", "token_ttl_seconds", "collect_after_seconds"),
        *("max_unfinished_per_user", "download_url_seconds", "engine", "base_cache", "verify_logits"),
    ]
    for found in read.values():
        assert {name: getattr(found, name) for name in alike} == {name: getattr(default, name) for name in alike}
    assert read["job"].memory_budget_mib == 4096


def test_what_is_said_reaches_the_processes(deployment: Terraform) -> None:
    """Each variable of Terraform's that is a setting."""
    said = {
        "lease_seconds": 90,
        "clock_skew_seconds": 60,
        "max_attempts": 2,
        "message_retention_days": 14,
        "collect_after_days": 3,
        "max_unfinished_per_user": 5,
        "download_url_seconds": 600,
        "engine": "peft",
        "base_cache": False,
        "verify_logits": False,
        "memory_budget_mib": 1024,
        "region": "europe-west4",
        "bucket_name": "bucket-of-ours",
        "firestore_database": "exports",
        "jwt_issuer": "https://issuer.example",
        "jwt_jwks_url": "https://issuer.example/keys",
        "jwt_audience": "exports",
    }
    given = environments(deployment.plan(**said))
    for read in map(Settings.from_env, given.values()):
        assert (read.lease_seconds, read.clock_skew_seconds, read.max_attempts) == (90, 60, 2)
        assert (read.token_ttl_seconds, read.collect_after_seconds) == (14 * 86400, 3 * 86400)
        assert read.records_url == f"firestore://{PROJECT}/exports"
        assert read.artifacts_url == "gs://bucket-of-ours"
        assert read.runner_url == f"run://{PROJECT}/europe-west4/gemma-exporter"
    api, job = Settings.from_env(given["export_api"]), Settings.from_env(given["job"])
    assert (api.max_unfinished_per_user, api.download_url_seconds) == (5, 600)
    assert api.jwt == JwtCheck("https://issuer.example", "exports", "https://issuer.example/keys")
    assert (job.engine, job.base_cache, job.verify_logits, job.memory_budget_mib) == ("peft", False, False, 1024)


@pytest.mark.parametrize("checked", [True, False])
def test_the_callers_own_token_is_checked_unless_said_otherwise(deployment: Terraform, checked: bool) -> None:
    """By default against Firebase Authentication of the project, with keys as a JSON Web Key Set."""
    read = Settings.from_env(environments(deployment.plan(check_jwt=checked))["export_api"])
    keys = "https://www.googleapis.com/service_accounts/v1/jwk/securetoken@system.gserviceaccount.com"
    firebase = JwtCheck(f"https://securetoken.google.com/{PROJECT}", PROJECT, keys)
    assert read.jwt == (firebase if checked else None)


def test_download_urls_are_signed_by_the_dispatcher_itself(plan: list[Resource]) -> None:
    """Who may sign as itself, and as nobody else."""
    api = environments(plan)["export_api"]
    assert api["SIGNING_ACCOUNT"] == f"gemma-export-dispatcher@{PROJECT}.iam.gserviceaccount.com"
