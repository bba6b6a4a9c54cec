"""Nothing that a model brings is run: no code of its own, no pickle, and no program in its chat template."""

import json
import re
from pathlib import Path

import pytest

import exporter
from dispatcher.errors import ExportError, SourceError
from exporter.gguf_tokenizer import leave_out_code
from tests.exporter.damage import edit_config
from tests.exporter.exporting import export, export_gguf_of
from tests.gemmas import make_adapter, save_base
from tests.gemmas.llama import llama_adapter, llama_base

PACKAGE = Path(exporter.__file__).parent


def test_no_call_of_ours_trusts_remote_code_or_unpickles() -> None:
    """Every call that could says no; what loads pickles is not called."""
    trusting = re.compile(r"trust_remote_code(?!=False\b)|torch\.load\(|pickle\.|import pickle|use_safetensors=False")
    found = {
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.glob("*.py")
        for line in path.read_text().splitlines()
        if trusting.search(line) and not line.lstrip().startswith(("#", '"'))
    }
    assert found == set()


def _with_code(directory: Path, code: Path, **nested: object) -> None:
    """Give a model a tokenizer and a config of its own code, which leaves a file where it runs."""
    code.mkdir()
    (code / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(code / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Tok(PreTrainedTokenizerFast):\n    pass\n"
    )
    reference = f"{code}--evil.Tok"
    for name, value in (
        ("tokenizer_config.json", {"AutoTokenizer": [reference, reference]}),
        ("config.json", {"AutoConfig": reference, "AutoModelForCausalLM": reference, "AutoTokenizer": reference}),
    ):
        path = directory / name
        document = json.loads(path.read_text()) if path.is_file() else {}
        document |= {"auto_map": value}
        if name == "config.json":
            document |= nested
        path.write_text(json.dumps(document))


def test_a_converters_class_that_trusts_remote_code_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp takes the class from the nested config; that of LLaDA loads a tokenizer with trust_remote_code."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = llama_base("gemma", tmp_path / "base")
    llama_adapter("gemma", base, tmp_path / "adapter")
    numbers = {
        name: value for name, value in json.loads((base / "config.json").read_text()).items() if type(value) is int
    }
    text = {**numbers, "architectures": ["LLaDAModelLM"], "tie_word_embeddings": True}
    _with_code(base, tmp_path / "code", text_config=text)
    with pytest.raises(ExportError) as refused:
        export_gguf_of(base, tmp_path / "adapter", tmp_path / "store", ["q8_0"])
    assert not (tmp_path / "code" / "ran").exists()
    assert refused.value.error_code == "gguf_unsupported_architecture"


def test_the_converters_tokenizer_names_no_code(tmp_path: Path) -> None:
    """Its config is a copy without `auto_map`; somebody's own file, to which there was a link, keeps it."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a--b.C", None]}, "bos_token": "<bos>"}))
    (tmp_path / "tokenizer_config.json").symlink_to(own)
    leave_out_code(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"bos_token": "<bos>"}
    assert "auto_map" in own.read_text()


@pytest.mark.parametrize("engine", ["streaming", "peft"])
def test_a_model_with_code_of_its_own_is_merged_without_it(engine: str, tmp_path: Path) -> None:
    """Whichever engine loads it."""
    make_adapter("gemma3_text", save_base("gemma3_text", tmp_path / "base"), tmp_path / "adapter")
    _with_code(tmp_path / "base", tmp_path / "code")
    export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine=engine)
    assert not (tmp_path / "code" / "ran").exists()


@pytest.mark.parametrize("engine", ["streaming", "peft"])
def test_a_pickled_adapter_is_refused_by_name(engine: str, tmp_path: Path) -> None:
    """Its opcodes would leave a file."""
    make_adapter("gemma3_text", save_base("gemma3_text", tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    bomb = f"cpathlib\nPath\n(S'{tmp_path / 'ran'}'\ntRcposix\nmkdir\n(S'{tmp_path / 'ran'}'\ntR."
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(bomb.encode())
    with pytest.raises(SourceError) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine=engine)
    assert refused.value.error_code in ("adapter_pickle_only", "adapter_weights_missing")
    assert not (tmp_path / "ran").exists()


def test_an_adapter_of_other_adapters_loads_none_of_them(tmp_path: Path) -> None:
    """X-LoRA's config names them, by path or on the hub."""
    make_adapter("gemma3_text", save_base("gemma3_text", tmp_path / "base"), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", peft_type="XLORA", adapters={"0": "some/adapter"})
    with pytest.raises(ExportError) as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine="peft")
    assert refused.value.error_code == "adapter_adapters"
