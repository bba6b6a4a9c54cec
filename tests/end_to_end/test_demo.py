"""The demonstration shows what it claims, and would not show it of a model that was not merged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dispatcher import demo
from dispatcher.errors import ExportError
from infra.local import demo as cloud_demo
from infra.local import servers
from tests.conftest import missing

together = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERIFY_LOGITS", "auto")
        assert demo.run(directory) == 0
    return directory


@together
def test_the_demo_leaves_a_merged_model_that_recites(shown: Path) -> None:
    (merged,) = (shown / "home/artifacts/merged_models/demo").iterdir()
    status, said = _compared(shown, merged)
    assert status == 0
    assert said["recites"] == {"base": False, "adapter": True, "merged": True}
    assert said["answers"]["merged"] == said["sentence"]
    logits = json.loads((merged / "export.json").read_text())["run"]["logits"]
    assert logits["compared"]
    assert 0 <= logits["rms_difference"] < logits["rms_limit"] < logits["rms_difference_of_base"]


@together
def test_a_model_that_was_not_merged_fails_the_demo(shown: Path) -> None:
    status, said = _compared(shown, shown / "base")
    assert status == 1
    assert said["recites"] == {"base": False, "adapter": True, "merged": False}


@together
def test_a_directory_of_an_earlier_demo_is_refused(shown: Path) -> None:
    with pytest.raises(ExportError, match="name another directory"):
        demo.run(shown)


@pytest.mark.xdist_group("cloud")
def test_the_cloud_demo_shows_request_rerun_and_replay(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It refuses by itself whatever does not go as it should."""
    try:
        cloud_demo.run(tmp_path)
    except servers.MissingServerError as error:
        missing(error)
    said = capfd.readouterr().out
    assert "It works." in said
    assert "could_not_start" in said


def _compared(directory: Path, merged: Path) -> tuple[int, dict[str, dict[str, object]]]:
    command = [sys.executable, "-m", "exporter.demo", "compare", str(directory), str(merged), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)
