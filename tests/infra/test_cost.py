"""The runbook's table of costs is what the formula says."""

import pytest

from dispatcher.contract import TrainingJob
from dispatcher.tasks import task_count
from infra.cost import KINDS, SIZES, Size, second, table, task_seconds
from tests.infra.conftest import Find
from tests.terraform.running import INFRA


def test_the_table_in_the_runbook_is_this_one() -> None:
    """`python -m infra.cost` prints it."""
    assert table() in (INFRA / "README.md").read_text()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_each_size_gets_the_tasks_that_the_trigger_gives_it(size: Size) -> None:
    """By the size in the base's name."""
    document = {"user_id": "ann", "status": "completed", "base_model_id": f"google/gemma-3-{size.name.lower()}-it"}
    assert task_count(TrainingJob.model_validate({"job_id": "job", **document})) == size.tasks


def test_a_second_is_of_the_task_that_terraform_plans(find: Find) -> None:
    """Four CPUs, 16 GiB, and an L4: by list price, a dollar and five cents an hour."""
    limits = find("google_cloud_run_v2_job.exporter").values["template"][0]["template"][0]["containers"][0]["resources"]
    assert limits[0]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert second(gpu=True) * 3600 == pytest.approx(1.0465, abs=0.001)
    assert second(gpu=False) * 3600 == pytest.approx(0.3744, abs=0.001)


def test_tasks_share_the_work_and_start_each_for_itself() -> None:
    """The formula of the runbook, worked out for 27B."""
    (large,) = (size for size in SIZES if size.name == "27B")
    assert task_seconds(large, KINDS[0]) == pytest.approx(4 * 30 + 13 * 54.9)
