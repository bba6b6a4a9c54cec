"""How many tasks an execution gets, by the name of its base."""

import pytest

from dispatcher.contract import TrainingJob
from dispatcher.tasks import task_count


def tasks_for(base: str, **fields: str) -> int:
    return task_count(TrainingJob(job_id="job", user_id="ann", status="completed", base_model_id=base, **fields))


@pytest.mark.parametrize(
    ("base", "tasks"),
    [
        ("google/gemma-3-27b-it", 4),
        ("unsloth/gemma-3-27b-it-unsloth-bnb-4bit", 4),
        ("google/gemma-4-31B", 4),
        ("google/gemma-4-26b-a4b-it", 4),
        ("/models/gemma-3-12b-pt", 2),
        ("google/gemma-3-4b-it", 1),
        ("google/gemma-3-270m", 1),
        ("27b/gemma", 1),
        ("someone/gemma-x27b", 1),
        ("someone/model-1.27b", 1),
        ("someone/model-127b", 1),
        ("someone/mine", 1),
        ("", 1),
    ],
)
def test_the_size_in_the_name_decides(base: str, tasks: int) -> None:
    """As a part of its own, in the name itself; a size that the table lacks is one task."""
    assert tasks_for(base) == tasks


def test_the_base_that_is_merged_into_counts() -> None:
    """Not the one that was trained on; and no commit is a size."""
    assert tasks_for("someone/quantized", merge_base="google/gemma-3-27b-it@main") == 4
    assert tasks_for("google/gemma-3-27b-it", merge_base="google/gemma-3-4b-it@12b") == 1


def test_without_a_job_there_is_one_task() -> None:
    """Which says what is wrong."""
    assert task_count(None) == 1
