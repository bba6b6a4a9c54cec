"""The demonstration shows what it claims, and would not show it of a model that was not merged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dispatcher import demo
from dispatcher.errors import ExportError
from exporter import llama_cpp
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
def test_the_demo_leaves_a_gguf_that_recites_in_llama_cpp(shown: Path) -> None:
    """And in which llama.cpp reads text as the tokenizer does, and says what the merged model says."""
    (version,) = (shown / "home/artifacts/gguf_models/demo").iterdir()
    (file,) = version.glob("*-Q8_0.gguf")
    status, said, _ = _asked("exporter.demo_llama", str(file))
    assert status == 0
    assert said["answer"] == "Nothing is lost, nothing is invented: every tensor is accounted for exactly once."
    manifest = json.loads((version / "export.json").read_text())
    checked = manifest["verified"]["llama_cpp"]
    assert (manifest["run"]["logits"]["loaded"], checked["chat_template"]) == ("whole", "rendered")
    assert checked["known_differences"] == {"U+2581": 0, "bos": 0, "unnamed": 0}
    logits = manifest["run"]["logits"]
    assert logits["compared"]
    assert 0 < logits["relative_rms_difference"] < logits["relative_rms_limit"]


@together
def test_the_command_line_prints_the_file_of_a_gguf(shown: Path) -> None:
    """Asked for again, it is there already."""
    environment = {**os.environ, "GEMMA_EXPORT_HOME": str(shown / "home")}
    command = [*demo.CLI, "export", demo.JOB_ID, "--type", "gguf", "--quantization", demo.QUANTIZATION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (file,) = (shown / "home/artifacts/gguf_models/demo").glob("*/*-Q8_0.gguf")
    assert done.stdout == f"{file}\n"


@together
def test_a_gguf_that_was_not_merged_fails_the_demo(shown: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.gguf"
    converter = llama_cpp.home() / "convert_hf_to_gguf.py"
    command = [sys.executable, str(converter), str(shown / "base"), "--outfile", str(file), "--outtype", "q8_0"]
    subprocess.run(command, check=True, capture_output=True)
    status, said, complaint = _asked("exporter.demo_llama", str(file))
    assert status == 1
    assert "every tensor is accounted for" not in said["answer"]
    assert "base.gguf was to make llama.cpp say" in complaint


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
    assert "llama.cpp says: Nothing is lost" in said


def _compared(directory: Path, merged: Path) -> tuple[int, dict[str, Any]]:
    status, said, _ = _asked("exporter.demo", "compare", str(directory), str(merged))
    return status, said


def _asked(module: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, answer and complaint of one of the demo's own commands."""
    command = [sys.executable, "-m", module, *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr
