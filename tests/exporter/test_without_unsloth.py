"""`--engine unsloth` as far as it goes without Unsloth, which the environment of these tests does not have."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dispatcher.errors import ExportError, NotAvailable
from exporter import unsloth_engine
from exporter.sources import open_base
from tests.exporter.exporting import export
from tests.gemmas import make_adapter, save_base


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base and an adapter that fit each other."""
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    return tmp_path


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_it_says_what_to_install(place: Path) -> None:
    with pytest.raises(NotAvailable, match=r"install gemma-export\[unsloth\]") as refused:
        export(place / "base", place / "adapter", place / "store", engine="unsloth")
    assert refused.value.error_code == "engine_not_available"
    assert not [path for path in (place / "store").rglob("*") if path.is_file()]


WRITES_ANSWER = "import sys; open(sys.argv[1] + '/answer.json', 'w').write({answer!r})"


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import os; print('out of memory', flush=True); os.kill(os.getpid(), 9)", "unsloth_failed", "out of memory"),
        ("raise SystemExit(1)", "unsloth_failed", "it said nothing"),
        (WRITES_ANSWER.format(answer='{"message": "because"}'), "unsloth_failed", "because"),
        (
            WRITES_ANSWER.format(answer='{"kind": "AdapterMismatch", "code": "adapter_unmatched", "message": "no"}'),
            "adapter_unmatched",
            "no",
        ),
    ],
    ids=["killed", "silent", "failed", "refused"],
)
def test_however_its_process_fails_the_export_says_so(
    program: str, code: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Unsloth's process that dies, or answers, in each way that one can."""
    monkeypatch.setattr(unsloth_engine, "unsloth_version", lambda: "unsloth-of-this-test")
    monkeypatch.setattr(unsloth_engine, "PROGRAM", (sys.executable, "-c", program))
    base = open_base(str(place / "base"), None, lambda: None)
    with pytest.raises(ExportError, match=said) as refused:
        unsloth_engine.merge_with_unsloth(base, place / "adapter", place / "output")
    assert refused.value.error_code == code
