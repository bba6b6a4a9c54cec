"""What the environment decides, and that nonsense in it is named."""

from pathlib import Path

import pytest

from dispatcher.errors import Misconfigured
from dispatcher.settings import MAX_DOWNLOAD_URL_SECONDS, Settings


def test_without_any_variable_everything_is_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All state lies under `.gemma-export` of where it is run."""
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_env({})
    assert settings.embedded
    assert settings.home == tmp_path / ".gemma-export"
    assert settings.records_url == f"sqlite://{tmp_path}/.gemma-export/records.db"
    assert (settings.queue_url, settings.runner_url) == ("inline:", "process:")
    assert settings.bucket == "gemma-export-bucket"


def test_with_a_project_google_cloud_is_the_default() -> None:
    """`PROJECT_ID` and `GCS_EXPORT_BUCKET_NAME` keep their meaning."""
    settings = Settings.from_env({"PROJECT_ID": "p", "GCS_EXPORT_BUCKET_NAME": "b"})
    assert not settings.embedded
    assert settings.records_url == "firestore://p/(default)"
    assert settings.artifacts_url == "gs://b"
    assert settings.runner_url == "run://p/us-central1/gemma-exporter"


@pytest.mark.parametrize(
    "variable",
    [
        {"PROJECT_ID": "p"},
        {"ARTIFACTS_URL": "gs://b"},
        {"QUEUE_URL": "pubsub://p/t"},
    ],
)
def test_any_cloud_setting_ends_embedded_mode(variable: dict[str, str]) -> None:
    """One is enough: a forgotten variable cannot open the door to a local user."""
    assert not Settings.from_env(variable).embedded


@pytest.mark.parametrize("name", ["K_SERVICE", "CLOUD_RUN_JOB", "GCS_EXPORT_BUCKET_NAME"])
def test_half_a_cloud_is_refused(name: str) -> None:
    """Without its project, a deployment would keep records and artifacts on a disk that goes with its container."""
    with pytest.raises(Misconfigured) as error:
        Settings.from_env({name: "x", "ARTIFACTS_URL": "gs://b"})
    assert name in error.value.message
    assert "PROJECT_ID" in error.value.message
    told = Settings.from_env({"GEMMA_EXPORT_HOME": "/h"}).to_environment()
    assert not Settings.from_env({name: "x", **told, "ARTIFACTS_URL": "gs://b"}).embedded


def test_a_child_process_opens_the_same_stores() -> None:
    """Also from a home with characters that mean something in a URL; and no secret is passed on."""
    settings = Settings.from_env({"GEMMA_EXPORT_HOME": "/home/a b#c%20?d", "HF_TOKEN": "hf_secret"})
    environment = settings.to_environment()
    child = Settings.from_env(environment)
    assert child.embedded
    assert (child.records_url, child.artifacts_url, child.tokens_url) == (
        settings.records_url,
        settings.artifacts_url,
        settings.tokens_url,
    )
    assert "hf_secret" not in str(environment) + repr(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE_SECONDS", "0"),
        ("LEASE_SECONDS", "-1"),
        ("LEASE_SECONDS", "two minutes"),
        ("LEASE_SECONDS", "1e3"),
        ("LEASE_SECONDS", "99999999999999999999"),
        ("COLLECT_AFTER_SECONDS", "43199"),
        ("MAX_ATTEMPTS", "٣"),
        ("CLOUD_RUN_TASK_ATTEMPT", "x"),
        ("CLOUD_RUN_TASK_COUNT", "0"),
        ("CLOUD_RUN_TASK_INDEX", "1"),
        ("BASE_CACHE", "always"),
        ("ENGINE", "magic"),
        ("RECORDS_URL", "postgres://x"),
        ("TOKENS_URL", "/plain/path"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(name: str, value: str) -> None:
    """Variable, value and expectation are all in the message."""
    with pytest.raises(Misconfigured) as error:
        Settings.from_env({name: value})
    assert name in error.value.message
    assert value in error.value.message
    assert "expected" in error.value.message


def test_an_empty_variable_counts_as_not_set() -> None:
    """As deployment tools leave them behind."""
    assert Settings.from_env({"PROJECT_ID": "", "LEASE_SECONDS": " "}) == Settings.from_env({})


def test_a_task_is_one_of_its_executions() -> None:
    """Cloud Run counts from 0."""
    count = {"CLOUD_RUN_TASK_COUNT": "4"}
    settings = Settings.from_env({**count, "CLOUD_RUN_TASK_INDEX": "3", "CLOUD_RUN_TASK_ATTEMPT": "2"})
    assert (settings.task_index, settings.task_count, settings.task_attempt) == (3, 4, 2)
    with pytest.raises(Misconfigured, match="CLOUD_RUN_TASK_INDEX is '4': expected a whole number from 0 to 3"):
        Settings.from_env({**count, "CLOUD_RUN_TASK_INDEX": "4"})
    alone = Settings.from_env({})
    assert (alone.task_index, alone.task_count) == (0, 1)


def test_older_versions_are_kept_at_least_as_long_as_a_download_url_is_good() -> None:
    """A week by default; a child process is told the same."""
    assert Settings.from_env({}).collect_after_seconds == 7 * 24 * 3600
    settings = Settings.from_env({"COLLECT_AFTER_SECONDS": str(12 * 3600)})
    assert settings.collect_after_seconds == MAX_DOWNLOAD_URL_SECONDS
    assert Settings.from_env(settings.to_environment()).collect_after_seconds == settings.collect_after_seconds


def test_a_child_process_caches_bases_as_its_parent_was_told() -> None:
    """As its engine and its budget."""
    for value in ("auto", "never"):
        settings = Settings.from_env({"BASE_CACHE": value})
        assert settings.base_cache is (value == "auto")
        assert Settings.from_env(settings.to_environment()).base_cache is settings.base_cache


def test_the_deployments_token_is_taken_without_what_surrounds_it_and_refused_unseen() -> None:
    """A secret that was made with a newline at its end; one that no header can hold."""
    assert Settings.from_env({"HF_TOKEN": " hf_abc\n"}).hf_token == "hf_abc"
    with pytest.raises(Misconfigured, match="HF_TOKEN") as error:
        Settings.from_env({"HF_TOKEN": "hf_ä b"})
    assert "hf_ä" not in str(error.value)
