"""What every token store promises; and what only the files do."""

import json
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dispatcher.errors import Misconfigured, TokenExpired, Unavailable
from dispatcher.tokens import FileTokens, TokenStore, open_tokens


def test_a_token_is_kept_replaced_and_deleted(tokens: TokenStore) -> None:
    """By the reference of the last put, whether or not that is the first one's; deleting twice is fine."""
    first = tokens.put("job.merged", "hf_one")
    assert tokens.get(first) == "hf_one"
    ref = tokens.put("job.merged", "hf_two")
    assert tokens.get(ref) == "hf_two"
    tokens.delete(ref)
    tokens.delete(ref)
    for gone in (first, ref):
        with pytest.raises(TokenExpired) as error:
            tokens.get(gone)
        assert "POST again with hf_token" in error.value.message


def test_a_token_can_be_stored_again_after_it_was_deleted(tokens: TokenStore) -> None:
    """The same export, run again."""
    tokens.delete(tokens.put("job.merged", "hf_one"))
    assert tokens.get(tokens.put("job.merged", "hf_two")) == "hf_two"


def test_an_earlier_reference_deletes_all_of_its_export(tokens: TokenStore) -> None:
    """The record may hold any reference of several requests, and after the end nothing may be left."""
    first = tokens.put("job.merged", "hf_one")
    ref = tokens.put("job.merged", "hf_two")
    tokens.delete(first)
    with pytest.raises(TokenExpired):
        tokens.get(ref)


def test_requests_at_once_all_get_a_reference_that_leads_to_a_token(tokens: TokenStore) -> None:
    """Whichever of them the record ends with."""
    with ThreadPoolExecutor(4) as threads:
        refs = list(threads.map(lambda number: tokens.put("job.merged", f"hf_{number}"), range(4)))
    assert {tokens.get(ref) for ref in refs} <= {f"hf_{number}" for number in range(4)}


def test_exports_do_not_share_tokens_and_refs_tell_nothing(tokens: TokenStore) -> None:
    """A reference names neither export nor token."""
    one, other = tokens.put("gamma.merged", "hf_one"), tokens.put("other.merged", "hf_two")
    assert tokens.get(one) == "hf_one"
    assert tokens.get(other) == "hf_two"
    tokens.delete(other)
    assert tokens.get(one) == "hf_one"
    assert "gamma" not in one
    assert "hf_" not in one


SECRET = f"secrets/gemma-export-{'f' * 64}"


@pytest.mark.parametrize(
    "ref",
    [
        *("", "..", "../../etc/passwd", "f" * 63, "F" * 64, "a/b", "f" * 64 + "\n"),
        f"projects/other/{SECRET}/versions/1",
        f"projects/project/{SECRET}",
        f"projects/project/{SECRET}/versions/latest",
        f"projects/project/{SECRET}/versions/1\n",
        f"projects/project/{SECRET}/versions/1/../../other",
        "projects/project/secrets/database-password/versions/1",
    ],
)
def test_a_made_up_reference_finds_and_deletes_nothing(tokens: TokenStore, ref: str) -> None:
    """It comes from a record, and must not become a path, or the name of someone else's secret."""
    kept = tokens.put("job.merged", "hf_one")
    for made_up in (ref, f"{kept}/../{kept}"):
        with pytest.raises(TokenExpired):
            tokens.get(made_up)
        tokens.delete(made_up)
    assert tokens.get(kept) == "hf_one"


def test_only_the_owner_may_read_the_files(tmp_path: Path) -> None:
    """0600 in 0700, also where the directory was open before; no temporary file stays."""
    directory = tmp_path / "tokens"
    directory.mkdir(mode=0o755)
    ref = FileTokens(directory).put("job.merged", "hf_one")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / ref).stat().st_mode) == 0o600
    assert [path.name for path in directory.iterdir()] == [ref]


def test_a_file_expires(tmp_path: Path) -> None:
    """After its time to live it is gone from the disk as well."""
    ref = FileTokens(tmp_path).put("job.merged", "hf_one")
    assert FileTokens(tmp_path, ttl_seconds=100, clock=lambda: time.time() + 90).get(ref) == "hf_one"
    with pytest.raises(TokenExpired):
        FileTokens(tmp_path, ttl_seconds=100, clock=lambda: time.time() + 101).get(ref)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    """A file stands in its way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        FileTokens(tmp_path / "file" / "tokens").put("job.merged", "hf_one")


@pytest.mark.parametrize(
    "url",
    [
        "vault://x",
        "secretmanager://",
        "secretmanager://project/path",
        "secretmanager://project?emulator=example.com:80",
        "secretmanager://project?emulator=127.0.0.1:80@example.com",
        "secretmanager://project?emulator=127.0.0.1",
        "secretmanager://project?debug=1",
    ],
)
def test_a_url_that_selects_no_store_is_refused_at_once(url: str) -> None:
    """Before any token is there; and a token is never sent in the clear to another machine."""
    with pytest.raises(Misconfigured, match="secretmanager://PROJECT"):
        open_tokens(url, ttl_seconds=60)


def test_a_store_is_opened_without_googles_client() -> None:
    """That is imported with the first token, which most cold starts do not have."""
    program = (
        "import json, sys; from dispatcher.tokens import open_tokens; "
        "open_tokens('secretmanager://project', ttl_seconds=60); print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [
        name for name in json.loads(run.stdout) if name.startswith(("google.cloud.", "google.api_core", "grpc"))
    ] == []
