"""What cannot become a GGUF is refused with a code, and leaves nothing in the store or among temporary files."""

import _ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch

from dispatcher.errors import ExportError
from dispatcher.sqlite_records import SqliteRecords
from exporter import llama_cpp
from tests.exporter.damage import Tensors, edit_adapter
from tests.exporter.exporting import export_gguf_of, file_of, gguf_record, training_document
from tests.exporter.gguf_route import read
from tests.exporter.small_disk import run_with_small_disk
from tests.gemmas import load_model, make_adapter, save_base
from tests.gemmas.llama import VOCABULARY, llama_adapter, llama_base

COMMAND = (sys.executable, "-m", "exporter", "job-1")
Models = Callable[[str], Path]
FULL = [pytest.mark.full]
TIED = "ignore:Model has `tie_word_embeddings:UserWarning"
"""What PEFT says of an adapter that makes the head another than the embedding"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Of a family, a directory with `base` and `adapter`; made once."""
    place = tmp_path_factory.mktemp("models")

    def of(family: str) -> Path:
        directory = place / family
        if not directory.exists():
            llama_adapter(family, llama_base(family, directory / "base"), directory / "adapter")
        return directory

    return of


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are made."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def refused(models: Path, place: Path, quantization: str = "q8_0", *, engine: str = "auto") -> ExportError:
    """The error of an export, which leaves nothing behind."""
    with pytest.raises(ExportError) as error:
        export_gguf_of(models / "base", models / "adapter", place / "store", [quantization], engine=engine)
    assert [path for path in (place / "store").rglob("*") if path.is_file()] == []
    assert list((place / "scratch").iterdir()) == []
    return error.value


def test_a_missing_vocabulary_is_said_before_any_weight_is_read(models: Models, tmp_path: Path, scratch: Path) -> None:
    """Each of which is NaN here, and would be refused."""
    shutil.copytree(models("gemma3_text"), tmp_path / "own")
    (tmp_path / "own" / "base" / "tokenizer.model").unlink()
    weights = tmp_path / "own" / "base" / "model.safetensors"
    raw = weights.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    weights.write_bytes(raw[:header] + b"\xff" * (len(raw) - header))
    error = refused(tmp_path / "own", tmp_path)
    assert (error.error_code, error.retryable) == ("tokenizer_model_missing", False)
    assert "tokenizer.model" in error.message


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_a_head_of_its_own_is_refused_where_llama_cpp_has_none(
    family: str, models: Models, tmp_path: Path, scratch: Path
) -> None:
    """It would be left out without a word."""
    base = models(family) / "base"
    make_adapter(family, load_model(base), tmp_path / "adapter", targets=["q_proj"], modules_to_save=["lm_head"])
    (tmp_path / "base").symlink_to(base)
    assert refused(tmp_path, tmp_path).error_code == "gguf_untied_head"


@pytest.mark.filterwarnings(TIED)
def test_a_head_of_its_own_becomes_the_output(models: Models, tmp_path: Path) -> None:
    """Of a Gemma 3, whose architecture in llama.cpp has one."""
    base = models("gemma3_text") / "base"
    model = load_model(base)
    make_adapter("gemma3_text", model, tmp_path / "adapter", targets=["q_proj"], modules_to_save=["lm_head"])
    (made,) = export_gguf_of(base, tmp_path / "adapter", tmp_path / "store", ["f32"])
    tensors = read(file_of(made))["tensors"]
    saved = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = saved["base_model.model.lm_head.weight"]
    assert tensors["output.weight"] == ("F32", [head.shape[1], VOCABULARY], head.bfloat16().float().numpy().tobytes())
    assert tensors["token_embd.weight"][2] != tensors["output.weight"][2]


@pytest.mark.parametrize("family", ["paligemma", "shieldgemma2"])
def test_a_family_that_llama_cpp_does_not_know_is_refused(
    family: str, models: Models, tmp_path: Path, scratch: Path
) -> None:
    """With what it does not know."""
    make_adapter(family, save_base(family, tmp_path / "base"), tmp_path / "adapter")
    assert refused(tmp_path, tmp_path).error_code == "gguf_unsupported_architecture"


def test_other_engines_make_no_gguf(models: Models, tmp_path: Path, scratch: Path) -> None:
    """Rather than one that they had no part in."""
    error = refused(models("gemma3_text"), tmp_path, engine="peft")
    assert (error.error_code, error.retryable) == ("engine_not_available", False)


def _shrunk(tensors: Tensors) -> Tensors:
    return {name: tensor * 1e-6 for name, tensor in tensors.items()}


def test_an_adapter_that_changes_nothing_is_refused(models: Models, tmp_path: Path, scratch: Path) -> None:
    """After rounding to the base's dtype; what was written by then is taken back."""
    shutil.copytree(models("gemma3_text"), tmp_path / "own")
    edit_adapter(tmp_path / "own" / "adapter", _shrunk)
    assert refused(tmp_path / "own", tmp_path).error_code == "nothing_changed"


@pytest.mark.parametrize("options", ["nr_inodes=5", pytest.param("size=8k", marks=FULL)])
def test_no_room_for_temporary_files_is_said(options: str, models: Models, tmp_path: Path) -> None:
    """For the metadata that llama.cpp's quantizer takes its decisions on, or for the names of what it is made of."""
    machine = Machine(models("gemma3_text"), tmp_path)
    assert machine.fails_on(tmp_path / "temporary", options, TMPDIR=str(tmp_path / "temporary")) == "storage_full"


@pytest.mark.full
def test_no_room_for_the_file_is_said(models: Models, tmp_path: Path) -> None:
    """In the store."""
    machine = Machine(models("gemma3_text"), tmp_path)
    assert machine.fails_on(tmp_path / "home" / "artifacts", "size=1m") == "storage_full"


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("libggml-base is not there", "libggml_missing"),
        pytest.param("libllama is not there", "libggml_missing", marks=FULL),
        pytest.param("libggml-base is another library", "llama_cpp_mismatch", marks=FULL),
        pytest.param("libllama is no library", "llama_cpp_mismatch", marks=FULL),
        pytest.param("another release is installed", "llama_cpp_mismatch", marks=FULL),
    ],
)
def test_libraries_that_cannot_be_used_fail_the_export_for_good(
    damage: str, code: str, models: Models, tmp_path: Path
) -> None:
    """Until the operator has mended the machine and asks again."""
    machine = Machine(models("gemma3_text"), tmp_path)
    package = tmp_path / "site" / "llama_cpp"
    lib = package / "lib"
    lib.mkdir(parents=True)
    ours = llama_cpp.library("libggml-base").parent
    for path in ours.parent.iterdir():
        if path != ours:
            (package / path.name).symlink_to(path)
    for path in ours.iterdir():
        (lib / path.name).symlink_to(path)
    match damage.split(" ", 1):
        case [name, "is not there"]:
            (lib / f"{name}.so").unlink()
        case [name, "is another library"]:
            (lib / f"{name}.so").unlink()
            (lib / f"{name}.so").symlink_to(_ctypes.__file__)
        case [name, "is no library"]:
            (lib / f"{name}.so").unlink()
            (lib / f"{name}.so").write_text("nonsense")
        case _:
            info = tmp_path / "site" / "llama_cpp_python-0.1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.1\n")
    modules = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    assert machine.fails(PYTHONPATH=modules) == code


class Machine:
    """A state directory with one queued export, and the exporter started on it.

    Args:
        models: The directory of base and adapter.
        root: Where its state is.
    """

    def __init__(self, models: Path, root: Path) -> None:
        self.root = root
        self.records = SqliteRecords(root / "home" / "records.db")
        assert self.records.put_job("job-1", training_document(models / "base", models / "adapter"))
        assert self.records.create_export(gguf_record("q8_0"))
        self.records.close()

    def fails(self, **environment: str) -> str:
        """Run the exporter: the code of what fails for good, and leaves nothing."""
        return self._failed(
            subprocess.run(COMMAND, env=self._environment(environment), capture_output=True, text=True, check=False)
        )

    def fails_on(self, disk: Path, options: str, **environment: str) -> str:
        """As `fails`, with a small disk somewhere."""
        disk.mkdir(parents=True)
        done = run_with_small_disk(COMMAND, disk, options, self._environment(environment))
        assert done.stdout == ""
        return self._failed(done)

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, "GEMMA_EXPORT_HOME": str(self.root / "home"), **more}

    def _failed(self, done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 1, done.stderr
        assert all(json.loads(line) for line in done.stderr.splitlines())
        assert [path for path in (self.root / "home" / "artifacts").rglob("*") if path.is_file()] == []
        records = SqliteRecords(self.root / "home" / "records.db")
        record = records.get_export("job-1.gguf.q8_0")
        records.close()
        assert record is not None
        assert record.error is not None
        assert not record.error.retryable
        return record.error.code


def _as_full_model(models: Path, place: Path) -> Path:
    """A whole model in the adapter's place: the base's files, copied."""
    return shutil.copytree(models / "base", place / "full")


@pytest.mark.parametrize("quantization", ["q8_0", "bf16"])
def test_a_model_with_nan_in_it_is_refused(quantization: str, models: Models, tmp_path: Path, scratch: Path) -> None:
    """Whether its blocks are computed or copied."""
    own = tmp_path / "own"
    full = _as_full_model(models("gemma3_text"), own)
    shutil.copytree(models("gemma3_text") / "base", own / "base")
    weights = safetensors.torch.load_file(full / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][5, 7] = float("nan")
    safetensors.torch.save_file(weights, full / "model.safetensors", {"format": "pt"})
    full.rename(own / "adapter")
    assert refused(own, tmp_path, quantization).error_code == "model_not_finite"


def test_more_layers_than_llama_cpp_takes_are_refused(models: Models, tmp_path: Path, scratch: Path) -> None:
    """It would abort the process, and every export in it."""
    own = tmp_path / "own"
    _as_full_model(models("gemma3_text"), own).rename(own / "adapter")
    shutil.copytree(models("gemma3_text") / "base", own / "base")
    config = json.loads((own / "adapter" / "config.json").read_text())
    (own / "adapter" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 600}))
    assert refused(own, tmp_path).error_code == "gguf_not_quantizable"


def test_a_template_of_the_model_is_not_written_over_the_base_s(models: Models, tmp_path: Path) -> None:
    """Side files are linked; what is written in their place must not follow the link."""
    own = tmp_path / "own"
    full = _as_full_model(models("gemma3_text"), own)
    shutil.copytree(models("gemma3_text") / "base", own / "base")
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        (full / name).unlink()
    config = json.loads((full / "tokenizer_config.json").read_text())
    (full / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages[0].content }}"}))
    full.rename(own / "adapter")
    before = (own / "base" / "chat_template.jinja").read_bytes()
    export_gguf_of(own / "base", own / "adapter", tmp_path / "store")
    assert (own / "base" / "chat_template.jinja").read_bytes() == before
