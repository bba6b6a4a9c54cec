"""Who is calling is what the gateway says, or nobody."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import Unauthenticated
from dispatcher.identity import USERINFO_HEADER, caller


def header(document: object, *, padded: bool = True) -> dict[str, str]:
    text = base64.urlsafe_b64encode(json.dumps(document).encode()).decode()
    return {USERINFO_HEADER: text if padded else text.rstrip("=")}


@given(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=60), st.booleans())
def test_the_subject_is_the_caller_with_and_without_padding(subject: str, padded: bool) -> None:
    """Whatever its characters, also those that differ between base64 and base64url."""
    assert caller(header({"sub": subject, "email": "x"}, padded=padded), None) == subject


def test_without_a_header_only_a_local_user_is_someone() -> None:
    """And with one, the local user is not asked."""
    assert caller({}, "local") == "local"
    assert caller(header({"sub": "ann"}), "local") == "ann"
    with pytest.raises(Unauthenticated):
        caller({}, None)


@pytest.mark.parametrize(
    "headers",
    [
        {USERINFO_HEADER: ""},
        {USERINFO_HEADER: "!!!"},
        {USERINFO_HEADER: "e30"},
        {USERINFO_HEADER: "a"},
        {USERINFO_HEADER: base64.urlsafe_b64encode(b"\xff\xfe").decode()},
        {USERINFO_HEADER: header({"sub": "ann"})[USERINFO_HEADER] + ", " + header({"sub": "bob"})[USERINFO_HEADER]},
        {USERINFO_HEADER: base64.urlsafe_b64encode(b"[" * 100_000).decode()},
        header({"sub": ""}),
        header({"sub": 7}),
        header({"sub": None}),
        header({"sub": "a\nb"}),
        header({"sub": "x" * 300}),
        header(["sub"]),
        header("sub"),
    ],
)
def test_a_garbled_header_is_nobody_and_never_the_local_user(headers: dict[str, str]) -> None:
    """It was meant to say something else."""
    with pytest.raises(Unauthenticated):
        caller(headers, "local")
