"""What download URLs of Cloud Storage promise: signed by whom, over what, for how long."""

import hashlib
import socket
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import parse_qsl, quote, urlsplit

import pytest
from cryptography.exceptions import InvalidSignature
from google.auth import compute_engine
from google.oauth2.credentials import Credentials

from dispatcher.errors import Misconfigured, Unavailable
from dispatcher.gcs_artifacts import GcsArtifacts
from dispatcher.gcs_signing import UrlSigner
from tests.ports.iam import MACHINE_ACCOUNT, TOKEN, Iam, Routed, iam
from tests.ports.storing import put

HOUR = timedelta(hours=1)
NAMED = "signer@project.iam.gserviceaccount.com"


@pytest.fixture
def service() -> Iterator[Iam]:
    with iam() as server:
        yield server


@pytest.fixture
def machine(service: Iam) -> UrlSigner:
    """Signs as a machine's own service account does."""
    # The domain is asked for over a connection of the library's own, which knows no double.
    credentials = compute_engine.Credentials(universe_domain="googleapis.com")
    return UrlSigner(credentials=credentials, request=Routed(service.url))


def person(service: Iam, account: str | None = None) -> UrlSigner:
    """Signs as far as a person's own login does."""
    return UrlSigner(account, credentials=Credentials(token=TOKEN), request=Routed(service.url))


def string_to_sign(url: str) -> bytes:
    """What a V4 signature is over, from the URL alone.

    Source: https://cloud.google.com/storage/docs/authentication/signatures#string-to-sign
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    del query["X-Goog-Signature"]
    assert query["X-Goog-SignedHeaders"] == "host"
    canonical_query = "&".join(f"{quote(name, safe='')}={quote(query[name], safe='')}" for name in sorted(query))
    request = f"GET\n{parts.path}\n{canonical_query}\nhost:{parts.netloc}\n\nhost\nUNSIGNED-PAYLOAD"
    scope = query["X-Goog-Credential"].partition("/")[2]
    digest = hashlib.sha256(request.encode()).hexdigest()
    return f"GOOG4-RSA-SHA256\n{query['X-Goog-Date']}\n{scope}\n{digest}".encode()


def signature_of(url: str) -> bytes:
    return bytes.fromhex(dict(parse_qsl(urlsplit(url).query))["X-Goog-Signature"])


@pytest.mark.parametrize("path", ["x/model.safetensors", "x/a b+c#d?e%25ü"])
def test_a_download_url_bears_a_v4_signature_of_the_machines_account(
    bucket: str, service: Iam, machine: UrlSigner, path: str
) -> None:
    """Over the very URL, made by IAM, with no key here; and the URL gives the file."""
    store = GcsArtifacts(bucket, signer=machine)
    put(store, path, b"content")
    url = store.download_url(store.uri(path), HOUR)
    assert url is not None
    service.verify(signature_of(url), string_to_sign(url))
    with pytest.raises(InvalidSignature):
        service.verify(signature_of(url), string_to_sign(url.replace("X-Goog-Expires=3600", "X-Goog-Expires=3601")))
    query = dict(parse_qsl(urlsplit(url).query))
    assert query["X-Goog-Expires"] == "3600"
    assert query["X-Goog-Credential"].startswith(f"{MACHINE_ACCOUNT}/")
    assert service.signed == [MACHINE_ACCOUNT]
    with urllib.request.urlopen(url) as answer:  # noqa: S310  # a URL of ours
        assert answer.read() == b"content"


def test_a_named_account_signs_instead(bucket: str, service: Iam) -> None:
    """For a person's own login, too, if it may."""
    store = GcsArtifacts(bucket, signer=person(service, NAMED))
    url = store.download_url(store.uri("x"), HOUR)
    assert url is not None
    assert f"X-Goog-Credential={quote(NAMED, safe='')}" in url
    assert service.signed == [NAMED]


def test_a_persons_login_signs_nothing(bucket: str, service: Iam) -> None:
    """Which is an answer, and no error: on a laptop there is nobody to ask."""
    store = GcsArtifacts(bucket, signer=person(service))
    assert store.download_url(store.uri("x"), HOUR) is None
    assert service.signed == []


def test_no_url_lives_longer_than_twelve_hours(bucket: str, machine: UrlSigner) -> None:
    """What signs may be replaced after that."""
    store = GcsArtifacts(bucket, signer=machine)
    longest = store.download_url(store.uri("x"), timedelta(hours=12))
    assert longest is not None
    assert "X-Goog-Expires=43200" in longest
    for life in (timedelta(hours=12, seconds=1), timedelta()):
        with pytest.raises(Misconfigured):
            store.download_url(store.uri("x"), life)


def test_an_account_that_may_not_sign_is_said(bucket: str, service: Iam, machine: UrlSigner) -> None:
    """In an error of ours, with no token in it."""
    service.refusing = True
    store = GcsArtifacts(bucket, signer=machine)
    with pytest.raises(Unavailable) as error:
        store.download_url(store.uri("x"), HOUR)
    assert TOKEN not in error.value.message


def test_a_service_that_takes_the_call_and_says_nothing_is_given_up(bucket: str) -> None:
    """Instead of being waited for as long as it likes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        request = Routed(f"http://127.0.0.1:{silent.getsockname()[1]}")
        signer = UrlSigner(NAMED, credentials=Credentials(token=TOKEN), request=request, timeout=0.1)
        store = GcsArtifacts(bucket, signer=signer)
        start = time.monotonic()
        with pytest.raises(Unavailable):
            store.download_url(store.uri("x"), HOUR)
        assert time.monotonic() - start < 3
