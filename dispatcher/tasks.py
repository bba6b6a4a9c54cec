"""How many tasks an execution gets: as many as its base is worth, by the size that its name says."""

import re

from dispatcher.contract import TrainingJob

TASKS = {12: 2, 26: 4, 27: 4, 31: 4}
"""Tasks by billions of parameters: Gemma 3 12B and 27B; Gemma 4 26B-A4B and 31B. Any other size gets one, since its
shards are too few, or too small, to pay for another machine's start."""
_SIZE = re.compile(r"(?<![a-z0-9.])([0-9]+)b(?![a-z0-9])")


def task_count(job: TrainingJob | None) -> int:
    """How many tasks make an export of a training job; 1 where nothing tells."""
    if job is None:
        return 1
    repo = (job.merge_base or job.base_model_id).partition("@")[0]
    size = _SIZE.search(repo.rpartition("/")[2].lower())
    return TASKS.get(int(size[1]), 1) if size else 1
