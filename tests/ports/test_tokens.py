"""What every token store promises."""

import stat
import time
from pathlib import Path

import pytest

from dispatcher.errors import Misconfigured, TokenExpired, Unavailable
from dispatcher.tokens import FileTokens, TokenStore, open_tokens


def test_a_token_is_kept_replaced_and_deleted(tokens: TokenStore) -> None:
    """One per export; deleting twice is fine."""
    ref = tokens.put("job.merged", "hf_one")
    assert tokens.get(ref) == "hf_one"
    assert tokens.put("job.merged", "hf_two") == ref
    assert tokens.get(ref) == "hf_two"
    tokens.delete(ref)
    tokens.delete(ref)
    with pytest.raises(TokenExpired) as error:
        tokens.get(ref)
    assert "POST again with hf_token" in error.value.message


def test_exports_do_not_share_tokens_and_refs_tell_nothing(tokens: TokenStore) -> None:
    """A reference names neither export nor token."""
    one, other = tokens.put("job.merged", "hf_one"), tokens.put("other.merged", "hf_two")
    assert tokens.get(one) == "hf_one"
    assert tokens.get(other) == "hf_two"
    assert "job" not in one
    assert "hf_" not in one


@pytest.mark.parametrize("ref", ["", "..", "../../etc/passwd", "f" * 63, "F" * 64, "a/b"])
def test_a_made_up_reference_finds_nothing(tokens: TokenStore, ref: str) -> None:
    """It comes from a record, and must not become a path."""
    with pytest.raises(TokenExpired):
        tokens.get(ref)


def test_only_the_owner_may_read_the_files(tmp_path: Path) -> None:
    """0600 in 0700, also where the directory was open before; no temporary file stays."""
    directory = tmp_path / "tokens"
    directory.mkdir(mode=0o755)
    ref = FileTokens(directory).put("job.merged", "hf_one")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / ref).stat().st_mode) == 0o600
    assert [path.name for path in directory.iterdir()] == [ref]


def test_a_token_expires(tmp_path: Path) -> None:
    """After seven days it is gone from the disk as well."""
    tokens = FileTokens(tmp_path, clock=lambda: time.time() + 7 * 24 * 3600 + 60)
    ref = FileTokens(tmp_path).put("job.merged", "hf_one")
    with pytest.raises(TokenExpired):
        tokens.get(ref)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    """A file stands in its way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        FileTokens(tmp_path / "file" / "tokens").put("job.merged", "hf_one")


def test_a_url_selects_the_store() -> None:
    """Secret Manager is named, and says that it is not there yet."""
    with pytest.raises(Misconfigured) as error:
        open_tokens("secretmanager://project")
    assert error.value.error_code == "not_available_yet"
    with pytest.raises(Misconfigured):
        open_tokens("vault://x")
