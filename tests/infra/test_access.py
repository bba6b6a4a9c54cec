"""Who may do what in a deployment: exactly what the code needs, and what starts it."""

import re
from pathlib import Path

import pytest

from dispatcher.permissions import NEEDS, Identity, Resource
from tests.terraform.access import Grant, grants, needed, table
from tests.terraform.running import INFRA, Terraform
from tests.terraform.running import Resource as Planned

OURS = {identity.value for identity in Identity}
LIST = "storage.objects.list"
OTHERS = {
    # What calls our functions, and may call no other.
    Grant("gateway", "gemma-export-api", "roles/run.invoker"),
    Grant("push", "gemma-export-start", "roles/run.invoker"),
    Grant("push", "gemma-export-fail", "roles/run.invoker"),
    Grant("scheduler", "gemma-export-sweep", "roles/run.invoker"),
    # Pub/Sub shows who it is, and moves dead letters.
    Grant("Google's pubsub", "account push", "roles/iam.serviceAccountOpenIdTokenCreator"),
    Grant("Google's pubsub", "topic gemma-export-dead-letters", "pubsub.topics.publish"),
    Grant("Google's pubsub", "subscription gemma-export-push", "roles/pubsub.subscriber"),
    # API Gateway is itself.
    Grant("Google's apigateway", "project", "roles/apigateway.serviceAgent"),
    # The build reads what was uploaded, pushes images and deploys them.
    Grant("builder", "bucket some-project-gemma-export-builds", "storage.objects.get"),
    Grant("builder", "bucket some-project-gemma-export-builds", "storage.objects.list"),
    Grant("builder", "repository gemma-export", "roles/artifactregistry.writer"),
    Grant("builder", "project", "roles/logging.logWriter"),
    Grant("builder", "project", "run.operations.get"),
    *(Grant("builder", f"gemma-export-{name}", "roles/run.developer") for name in ("api", "start", "fail", "sweep")),
    Grant("builder", "job", "roles/run.developer"),
    *(Grant("builder", f"account {name}", "roles/iam.serviceAccountUser") for name in OURS),
}


def test_our_code_may_do_what_it_needs_and_nothing_else(plan: list[Planned]) -> None:
    """Adapters lie in the artifact bucket by default, which is listed as a whole."""
    expected = {grant for grant in needed() if (grant.what, grant.permission) != (Resource.ADAPTERS.value, LIST)}
    assert {grant for grant in grants(plan) if grant.who in OURS} == expected


def test_others_may_do_what_they_are_there_for_and_nothing_else(plan: list[Planned]) -> None:
    """API Gateway, Pub/Sub, Scheduler and the build."""
    assert {grant for grant in grants(plan) if grant.who not in OURS} == OTHERS


def test_nobody_is_let_in_without_an_account(plan: list[Planned]) -> None:
    """Neither `allUsers` nor `allAuthenticatedUsers`, nor a role that is everything."""
    text = repr([each.values for each in plan if "_iam_" in each.kind])
    assert "allUsers" not in text
    assert "allAuthenticatedUsers" not in text
    assert not re.search(r"roles/(owner|editor|viewer)\b|\.admin", text)


def test_each_function_runs_as_who_it_is_and_is_called_by_one(plan: list[Planned]) -> None:
    """The invoker is bound, so that whoever else was let in is put out by the next apply."""
    services = {each.key: each.values for each in plan if each.address == "google_cloud_run_v2_service.function"}
    bound = {
        each.key: each.values for each in plan if each.address == "google_cloud_run_v2_service_iam_binding.invoker"
    }
    accounts = {key: values["template"][0]["service_account"].partition("@")[0] for key, values in services.items()}
    assert accounts == {
        "export_api": "gemma-export-dispatcher",
        "start_export": "gemma-export-trigger",
        "fail_export": "gemma-export-trigger",
        "sweep": "gemma-export-sweeper",
    }
    assert {key: (values["name"], values["role"], len(values["members"])) for key, values in bound.items()} == {
        key: (values["name"], "roles/run.invoker", 1) for key, values in services.items()
    }
    outside = {key for key, values in services.items() if values["ingress"] != "INGRESS_TRAFFIC_INTERNAL_ONLY"}
    assert outside == {"export_api"}


def test_the_job_runs_as_the_exporter(plan: list[Planned]) -> None:
    """And as nobody who may start others."""
    (job,) = (each.values for each in plan if each.kind == "google_cloud_run_v2_job")
    assert job["template"][0]["template"][0]["service_account"].startswith("gemma-export-exporter@")


@pytest.mark.parametrize(
    ("source", "place"), [("gs://training/runs/", "gs://training/runs/"), ("gs://training", "bucket training")]
)
def test_adapters_elsewhere_may_be_read_where_they_are_said_to_be(
    deployment: Terraform, source: str, place: str
) -> None:
    """By the dispatcher and the exporter: the objects under the prefix, and the list of their bucket."""
    added = grants(deployment.plan(adapter_sources=[source])) - grants(deployment.plan())
    assert added == {
        Grant(who, what, permission)
        for who in ("dispatcher", "exporter")
        for what, permission in ((place, "storage.objects.get"), (place, LIST))
    }


def test_a_place_that_is_said_twice_is_granted_once(deployment: Terraform) -> None:
    """With a slash at its end, and without."""
    assert grants(deployment.plan(adapter_sources=["gs://training/runs", "gs://training/runs/"])) == grants(
        deployment.plan(adapter_sources=["gs://training/runs"])
    )


def test_the_deployments_own_token_is_for_the_exporter_alone(deployment: Terraform) -> None:
    """And is in the job's environment by reference."""
    plan = deployment.plan(hf_token_secret="hub-token")
    assert grants(plan) - grants(deployment.plan()) == {
        Grant("exporter", "secret_id hub-token", "secretmanager.versions.access")
    }
    (job,) = (each.values for each in plan if each.kind == "google_cloud_run_v2_job")
    (token,) = (
        each for each in job["template"][0]["template"][0]["containers"][0]["env"] if each["name"] == "HF_TOKEN"
    )
    assert token["value"] is None
    assert token["value_source"][0]["secret_key_ref"] == [{"secret": "hub-token", "version": "latest"}]


def test_the_table_in_the_runbook_is_this_one(plan: list[Planned]) -> None:
    """`python -m tests.terraform.access` prints it."""
    assert table(grants(plan)).replace("some-project", "PROJECT") in Path(INFRA, "README.md").read_text()


def test_every_identity_has_its_needs() -> None:
    """Each with its reason."""
    assert NEEDS.keys() == set(Identity)
    assert all(need.permissions and need.why for needs in NEEDS.values() for need in needs)
