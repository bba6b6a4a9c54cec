"""`--engine unsloth` where Unsloth is not installed, as in the environment of these tests."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from dispatcher.errors import NotAvailable
from tests.exporter.exporting import export
from tests.gemmas import make_adapter, save_base


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_the_unsloth_engine_says_what_to_install(tmp_path: Path) -> None:
    model = save_base("gemma3_text", tmp_path / "base")
    make_adapter("gemma3_text", model, tmp_path / "adapter")
    with pytest.raises(NotAvailable, match=r"install gemma-export\[unsloth\]") as refused:
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "store", engine="unsloth")
    assert refused.value.error_code == "engine_not_available"
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
