"""What the Secret Manager store makes of time, races and refusals, spoken over the wire with the local server."""

import logging
from collections.abc import Iterator

import grpc
import pytest
from google.cloud import secretmanager
from google.cloud.secretmanager_v1.services.secret_manager_service.transports import SecretManagerServiceGrpcTransport

from dispatcher.errors import ExportError, Misconfigured, TokenExpired, Unavailable
from dispatcher.secret_manager import SecretManagerTokens
from dispatcher.tokens import KEPT_TOKENS, TokenStore, open_tokens
from infra.local.secret_manager import NUMBER, LocalSecretManager

EXPORT = "job.merged"
TOKEN = "hf_" + "aB3" * 11
TTL = 3600
DEFINITE: dict[grpc.StatusCode, tuple[type[ExportError], str]] = {
    grpc.StatusCode.PERMISSION_DENIED: (Misconfigured, "permission_denied"),
    grpc.StatusCode.UNAUTHENTICATED: (Misconfigured, "permission_denied"),
    grpc.StatusCode.INVALID_ARGUMENT: (Misconfigured, "call_refused"),
}


class Clock:
    """Stands still until it is told to move on."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> LocalSecretManager:
    return LocalSecretManager("project", clock=clock)


@pytest.fixture
def address(server: LocalSecretManager) -> Iterator[str]:
    with server.serving() as address:
        yield address


@pytest.fixture
def tokens(address: str) -> TokenStore:
    """Not the suite's: one whose server a test can reach behind its back."""
    return open_tokens(f"secretmanager://project?emulator={address}", ttl_seconds=TTL)


@pytest.fixture
def operator(address: str) -> Iterator[secretmanager.SecretManagerServiceClient]:
    """Someone with a client of their own."""
    with grpc.insecure_channel(address) as channel:
        transport = SecretManagerServiceGrpcTransport(channel=channel)
        yield secretmanager.SecretManagerServiceClient(transport=transport)


def test_a_secret_is_deleted_by_secret_manager_itself_when_its_time_is_over(
    tokens: TokenStore, server: LocalSecretManager, clock: Clock
) -> None:
    """Counted from the last token; should nobody ever come to delete it, nothing stays."""
    first = tokens.put(EXPORT, "hf_one")
    clock.now += TTL - 1
    ref = tokens.put(EXPORT, "hf_two")
    clock.now += TTL - 1
    assert (tokens.get(first), tokens.get(ref)) == ("hf_one", "hf_two")
    clock.now += 1
    assert server.payloads() == []
    with pytest.raises(TokenExpired, match="POST again with hf_token"):
        tokens.get(ref)
    tokens.delete(ref)


def test_a_secret_expires_also_when_its_token_was_the_only_one(
    tokens: TokenStore, server: LocalSecretManager, clock: Clock
) -> None:
    """The first one brings its time to live along."""
    tokens.put(EXPORT, TOKEN)
    clock.now += TTL
    assert server.payloads() == []


def test_a_reference_leads_to_no_secret_but_ours(
    tokens: TokenStore, operator: secretmanager.SecretManagerServiceClient, server: LocalSecretManager
) -> None:
    """It comes from a record; the service account may read more than the record's writer."""
    secret = secretmanager.Secret(replication={"automatic": {}})
    made = operator.create_secret(parent="projects/project", secret_id="database-password", secret=secret)
    theirs = operator.add_secret_version(parent=made.name, payload=secretmanager.SecretPayload(data=b"x"))
    ref = tokens.put(EXPORT, TOKEN)
    refused = [theirs.name, theirs.name.replace(NUMBER, "project"), ref.replace("/project/", f"/{NUMBER}/")]
    for made_up in (*refused, ref.replace("/versions/1", "/versions/latest")):
        with pytest.raises(TokenExpired):
            tokens.get(made_up)
        tokens.delete(made_up)
    assert server.payloads() == [b"x", TOKEN.encode()]


def test_a_reference_names_our_project_as_we_do_and_the_version_by_number(
    tokens: TokenStore, operator: secretmanager.SecretManagerServiceClient
) -> None:
    """Secret Manager answers with the project's number, and anyone may read by the reference."""
    tokens.put(EXPORT, "hf_one")
    ref = tokens.put(EXPORT, "hf_two")
    assert ref.startswith("projects/project/secrets/gemma-export-")
    assert ref.endswith("/versions/2")
    found = operator.access_secret_version(name=ref)
    assert found.name == ref.replace("projects/project", f"projects/{NUMBER}")
    assert found.payload.data == b"hf_two"


def test_deleting_leaves_an_empty_secret_to_its_time(
    tokens: TokenStore, server: LocalSecretManager, operator: secretmanager.SecretManagerServiceClient, clock: Clock
) -> None:
    """No payload, though: the version number goes on, so that an old reference never is a new token's."""
    ref = tokens.put(EXPORT, "hf_one")
    tokens.delete(ref)
    assert server.payloads() == []
    secret = ref.partition("/versions/")[0]
    assert operator.get_secret(name=secret).expire_time.timestamp() == clock.now + TTL
    assert tokens.put(EXPORT, TOKEN) == f"{secret}/versions/2"


def test_a_deletion_that_failed_halfway_is_finished_by_the_next(tokens: TokenStore, server: LocalSecretManager) -> None:
    """Though the token that is referred to, the first to be destroyed, is gone by then."""
    refs = [tokens.put(EXPORT, f"hf_{number}") for number in range(3)]
    server.refuse(grpc.StatusCode.PERMISSION_DENIED, method="DestroySecretVersionRequest", skip=1)
    with pytest.raises(Misconfigured):
        tokens.delete(refs[2])
    assert server.payloads() == [b"hf_0", b"hf_1"]
    tokens.delete(refs[2])
    assert server.payloads() == []


def test_only_the_latest_versions_are_kept(tokens: TokenStore, server: LocalSecretManager) -> None:
    """What is not readable is not there."""
    for number in range(KEPT_TOKENS + 2):
        tokens.put(EXPORT, f"hf_{number}")
    assert server.payloads() == [f"hf_{number}".encode() for number in range(2, KEPT_TOKENS + 2)]


def test_an_old_version_that_cannot_be_destroyed_does_not_fail_the_new_one(
    tokens: TokenStore,
    server: LocalSecretManager,
    operator: secretmanager.SecretManagerServiceClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is stored by then; what was destroyed by someone else before is fine, any other refusal is logged."""
    refs = [tokens.put(EXPORT, "hf_old") for _ in range(KEPT_TOKENS)]
    operator.destroy_secret_version(name=refs[0])
    assert tokens.get(tokens.put(EXPORT, TOKEN)) == TOKEN
    assert caplog.messages == []
    server.refuse(grpc.StatusCode.PERMISSION_DENIED, method="DestroySecretVersion")
    with caplog.at_level(logging.WARNING):
        assert tokens.get(tokens.put(EXPORT, TOKEN)) == TOKEN
    assert len(caplog.messages) == 1
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("end", ["disable_secret_version", "destroy_secret_version"])
def test_a_version_that_an_operator_ended_counts_as_expired(
    tokens: TokenStore, operator: secretmanager.SecretManagerServiceClient, end: str
) -> None:
    """Secret Manager calls that a failed precondition."""
    ref = tokens.put(EXPORT, TOKEN)
    getattr(operator, end)(request={"name": ref})
    with pytest.raises(TokenExpired):
        tokens.get(ref)


def test_a_secret_that_is_only_half_deleted_is_waited_for(
    tokens: TokenStore, server: LocalSecretManager, operator: secretmanager.SecretManagerServiceClient
) -> None:
    """Right after an operator, or its time, ended it: one answer says that it is there, the next that it is not."""
    ref = tokens.put(EXPORT, "hf_one")
    operator.delete_secret(name=ref.partition("/versions/")[0])
    with pytest.raises(TokenExpired):
        tokens.get(ref)
    server.linger(1)
    assert tokens.get(tokens.put(EXPORT, TOKEN)) == TOKEN


def test_a_secret_that_stays_half_deleted_is_unavailable(tokens: TokenStore, server: LocalSecretManager) -> None:
    """The caller may ask again; the waiting has an end."""
    server.linger(100)
    with pytest.raises(Unavailable, match="ask again"):
        tokens.put(EXPORT, TOKEN)


def test_passing_faults_and_lost_answers_are_gone_through(tokens: TokenStore, server: LocalSecretManager) -> None:
    """A version too many does no harm: it goes with its secret."""
    server.refuse(grpc.StatusCode.UNAVAILABLE)
    server.lose_answers(1)
    ref = tokens.put(EXPORT, TOKEN)
    assert ref.endswith("/versions/2")
    server.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert tokens.get(ref) == TOKEN
    server.refuse(grpc.StatusCode.INTERNAL)
    tokens.delete(ref)
    assert server.payloads() == []


def test_a_server_that_does_not_answer_is_unavailable(address: str, server: LocalSecretManager) -> None:
    """For every method, and the token is in none of the texts."""
    tokens = SecretManagerTokens("project", ttl_seconds=TTL, emulator=address, timeout=0.3)
    ref = tokens.put(EXPORT, TOKEN)
    server.refuse(grpc.StatusCode.UNAVAILABLE, times=1000)
    for call in (lambda: tokens.put(EXPORT, TOKEN), lambda: tokens.get(ref), lambda: tokens.delete(ref)):
        with pytest.raises(Unavailable) as error:
            call()
        assert TOKEN not in error.value.message


@pytest.mark.parametrize("status", DEFINITE, ids=lambda status: status.name.lower())
def test_a_definite_refusal_waits_for_the_operator(
    tokens: TokenStore, server: LocalSecretManager, status: grpc.StatusCode
) -> None:
    """Once, and not again and again: what the deployment lacks is in the code."""
    error, code = DEFINITE[status]
    server.refuse(status)
    with pytest.raises(error) as refusal:
        tokens.put(EXPORT, TOKEN)
    assert refusal.value.error_code == code
    assert len(server.requests) == 1


def test_a_project_that_is_not_ours_is_refused(address: str) -> None:
    """Secret Manager does not say whether it exists."""
    tokens = open_tokens(f"secretmanager://elsewhere?emulator={address}", ttl_seconds=TTL)
    with pytest.raises(Misconfigured) as error:
        tokens.put(EXPORT, TOKEN)
    assert error.value.error_code == "permission_denied"


def test_a_token_that_is_damaged_on_its_way_is_neither_kept_nor_used(
    tokens: TokenStore, server: LocalSecretManager
) -> None:
    """Its checksum goes with it in both directions."""
    ref = tokens.put(EXPORT, TOKEN)
    server.damage_payloads()
    with pytest.raises(Misconfigured):
        tokens.put(EXPORT, TOKEN)
    assert server.payloads() == [TOKEN.encode()]
    with pytest.raises(Unavailable, match="damaged") as error:
        tokens.get(ref)
    assert TOKEN[3:] not in error.value.message
