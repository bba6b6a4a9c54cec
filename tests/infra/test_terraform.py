"""The configuration of a deployment, read by the real `terraform` against the schema of the real providers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from dispatcher.settings import Settings
from tests.infra.conftest import Find
from tests.terraform.provider import SCHEMA
from tests.terraform.running import INFRA, Resource, Terraform, TerraformError

CONFIGURATION = "\n".join(path.read_text() for path in sorted(INFRA.glob("*.tf")))
VARIABLES = {
    name: text
    for name, text in re.findall(r'^variable "(\w+)" \{\n(.*?)^\}', (INFRA / "variables.tf").read_text(), re.M | re.S)
}
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
}
BAD: dict[str, list[Any]] = {
    "project_id": ["Some Project", "p"],
    "region": ["us", "us-central1-a"],
    "gateway_region": ["europe"],
    "labels": [{"Team": "x"}, {"team": "X y"}],
    "bucket_name": ["-b", "B"],
    "bucket_location": ["us/eu"],
    "adapter_sources": [["training"], ["gs://b/*"], ["s3://bucket"]],
    "firestore_database": ["(other)", "Ex"],
    "firestore_location": ["US"],
    "gpu_type": ["nvidia-h100"],
    "exporter_cpu": [3, 2],
    "exporter_memory_gib": [15.5, 8, 64],
    "memory_budget_mib": [32, 15 * 1024],
    "task_timeout_seconds": [60, 7200, 100_000],
    "max_attempts": [0, 12, 1.5],
    "engine": ["magic"],
    "hf_token_secret": ["a/b", "gemma-export-token"],
    "max_instances": [0, 1000],
    "max_unfinished_per_user": [0],
    "lease_seconds": [5, 3600],
    "clock_skew_seconds": [-1, 3600],
    "collect_after_days": [0, 1000],
    "download_url_seconds": [1, 50_000],
    "message_retention_days": [0, 32],
    "jwt_issuer": ["http://issuer", "https://only.the.issuer"],
    "jwt_jwks_url": ["keys"],
    "jwt_audience": ["a,b"],
    "alert_emails": [["nobody"]],
    "notification_channels": [["a@example.com"]],
    "failed_exports_per_hour": [0],
    "oldest_queued_minutes": [5],
    "budget_amount": [-1, 0.5],
    "billing_account": ["my account"],
}
"""Of each variable, values that are refused where all others have their defaults."""


def test_it_is_formatted(deployment: Terraform) -> None:
    """As `terraform fmt` would have it."""
    assert deployment.run("fmt", "-check", "-diff", str(INFRA)) == ""


def test_every_argument_is_one_of_the_providers(deployment: Terraform) -> None:
    """And every block, type and reference, those in `dynamic` blocks included."""
    deployment.validate()


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
        ("gateway.tf", "default_hostname", "hostname", None),
        ("outputs.tf", "exports.default_hostname", "exports.hostname", "Unsupported attribute"),
        ("messages.tf", '].uri}/', '].url}/', "Unsupported attribute"),
        ("access.tf", 'role_id     = "gemma', 'id = "gemma', "Missing required argument"),
        ("data.tf", "force_destroy               = !var", "force_destroy               = [!var", None),
    ],
)
def test_a_slip_is_found(deployment: Terraform, tmp_path: Path, file: str, right: str, wrong: str, said: str | None) -> None:
    """One in a block's content too; what could not be found, no test of this kind would show."""
    path = deployment.directory / file
    text = path.read_text()
    if said is None:
        pytest.skip("nothing to slip on")
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    try:
        with pytest.raises(TerraformError, match=said):
            deployment.validate()
    finally:
        path.write_text(text)
