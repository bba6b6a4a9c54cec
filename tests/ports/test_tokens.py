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
from dispatcher.tokens import KEPT_TOKENS, FileTokens, TokenStore, open_tokens


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


def test_an_earlier_reference_deletes_no_newer_token(tokens: TokenStore) -> None:
    """The end of a run may come to delete its token after a request to run again has stored the next."""
    first = tokens.put("job.merged", "hf_one")
    ref = tokens.put("job.merged", "hf_two")
    for _ in range(2):
        tokens.delete(first)
        assert tokens.get(ref) == "hf_two"
        with pytest.raises(TokenExpired):
            tokens.get(first)


def test_a_reference_is_never_handed_out_again(tokens: TokenStore) -> None:
    """Or a deletion that comes late, or twice, would hit another token."""
    first = tokens.put("job.merged", "hf_one")
    tokens.delete(first)
    ref = tokens.put("job.merged", "hf_two")
    tokens.delete(first)
    assert tokens.get(ref) == "hf_two"


def test_the_last_tokens_of_an_export_stay_readable(tokens: TokenStore) -> None:
    """However often a request is repeated; and no more than those, of this export alone."""
    other = tokens.put("other.merged", "hf_other")
    refs = [tokens.put("job.merged", f"hf_{number}") for number in range(KEPT_TOKENS + 2)]
    assert [tokens.get(ref) for ref in refs[2:]] == [f"hf_{number}" for number in range(2, KEPT_TOKENS + 2)]
    for ref in refs[:2]:
        with pytest.raises(TokenExpired):
            tokens.get(ref)
    assert tokens.get(other) == "hf_other"


def test_requests_at_once_all_get_a_reference_that_leads_to_a_token(tokens: TokenStore) -> None:
    """Whichever of them the record ends with."""
    with ThreadPoolExecutor(4) as threads:
        refs = list(threads.map(lambda number: tokens.put("job.merged", f"hf_{number}"), range(4)))
    assert [tokens.get(ref) for ref in refs] == [f"hf_{number}" for number in range(4)]


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
        *("", "..", "../../etc/passwd", "f" * 64, "a/b"),
        *(f"{'f' * 64}.{'9' * 17}.{'f' * 16}{end}" for end in ("", "0", "\n", "/../x")),
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
    """After its time to live it is gone from the disk as well, whoever notices: a reader, or the next token."""
    later = FileTokens(tmp_path, ttl_seconds=100, clock=lambda: time.time() + 101)
    ref = FileTokens(tmp_path).put("job.merged", "hf_one")
    assert FileTokens(tmp_path, ttl_seconds=100, clock=lambda: time.time() + 90).get(ref) == "hf_one"
    with pytest.raises(TokenExpired):
        later.get(ref)
    assert list(tmp_path.iterdir()) == []
    FileTokens(tmp_path).put("job.merged", "hf_one")
    ref = later.put("other.merged", "hf_two")
    assert [path.name for path in tmp_path.iterdir()] == [ref]


def test_what_else_lies_in_the_directory_is_left_alone(tmp_path: Path) -> None:
    """Whoever names a directory of theirs as token store loses nothing."""
    (tmp_path / "theirs").write_text("")
    tokens = FileTokens(tmp_path, ttl_seconds=0, clock=lambda: time.time() + 1e6)
    tokens.delete(tokens.put("job.merged", "hf_one"))
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_clock_that_went_back_changes_no_order(tmp_path: Path) -> None:
    """The token put last is the newest, whatever time it is."""
    first = FileTokens(tmp_path).put("job.merged", "hf_one")
    earlier = FileTokens(tmp_path, clock=lambda: time.time() - 1000)
    ref = earlier.put("job.merged", "hf_two")
    earlier.delete(first)
    assert earlier.get(ref) == "hf_two"


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
