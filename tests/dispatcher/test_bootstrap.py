"""What only the wiring decides."""

import socket
import time
from pathlib import Path

import pytest

from dispatcher import bootstrap
from dispatcher.contract import ExportRequest
from dispatcher.errors import Unavailable
from dispatcher.settings import Settings


def test_a_request_waits_for_a_bucket_that_hangs_no_longer_than_an_answer_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the caller is told to ask again; nothing was recorded yet."""
    monkeypatch.setattr(bootstrap, "ANSWER_SECONDS", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        stack = bootstrap.build(Settings.from_env({"GEMMA_EXPORT_HOME": str(tmp_path), "ARTIFACTS_URL": "gs://bucket"}))
        try:
            job = {"user_id": "ann", "status": "completed", "base_model_id": "b", "adapter_path": "gs://bucket/adapter"}
            assert stack.records.put_job("job", job)
            start = time.monotonic()
            with pytest.raises(Unavailable):
                stack.service.submit(ExportRequest.model_validate({"job_id": "job", "export_type": "merged"}), "ann")
            assert time.monotonic() - start < 3
            assert stack.records.get_export("job.merged") is None
        finally:
            stack.close()
