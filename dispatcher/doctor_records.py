"""Doctor's questions to Firestore: each kind of call that the deployment makes, none of which leaves anything."""

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from urllib.parse import urlsplit

from google.api_core import exceptions as api
from google.cloud import firestore

from dispatcher.contract import UNFINISHED, State
from dispatcher.doctor_findings import CALL_SECONDS, FINE, Check, Grant, Group, Outcome, Verdict, Wanted, needing
from dispatcher.errors import ExportError
from dispatcher.google_errors import translating
from dispatcher.permissions import Identity, Resource
from dispatcher.records import RecordStore, open_records

_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
_LIST = "datastore.entities.list"
_INDEXED: dict[tuple[str, str], tuple[Identity, Callable[[RecordStore, str], object]]] = {
    ("user_id", "job_id"): (
        Identity.DISPATCHER,
        lambda store, name: store.list_exports(user_id=name, job_id=name, limit=1),
    ),
    ("user_id", "state"): (
        Identity.DISPATCHER,
        lambda store, name: store.list_exports(user_id=name, states=UNFINISHED, limit=1),
    ),
    ("job_id", "state"): (
        Identity.DISPATCHER,
        lambda store, name: store.list_exports(job_id=name, states=UNFINISHED, limit=1),
    ),
    ("state", "uncollected_since"): (
        Identity.SWEEPER,
        lambda store, name: store.list_uncollected({State.COMPLETED, State.FAILED}, until=_LONG_AGO, limit=1),
    ),
}
"""The fields of each composite index of `infra/firestore.indexes.json`, who asks, and a query that needs it."""
INDEXES = tuple(_INDEXED)


def records_group(url: str, wanted: Wanted) -> Group:
    """The checks of a database, `firestore://project/database`."""
    parts = urlsplit(url)
    project, database = parts.netloc, parts.path.strip("/")
    on = f"the Firestore database {database} of project {project}"
    name = f"gemma-export-doctor-{secrets.token_hex(8)}"
    store = cache(lambda: open_records(url))

    @cache
    def client() -> firestore.Client:
        with translating(on):
            return firestore.Client(project=project, database=database)

    def read() -> Verdict:
        store().get_job(name)
        store().get_export(name)
        return FINE

    def listed() -> Verdict:
        store().list_exports(job_id=name, limit=1)
        return FINE

    def update() -> Verdict:
        batch = client().batch()
        _update(client(), batch, name)
        return _refused(batch, name, on)

    def create() -> Verdict:
        batch = client().batch()
        batch.create(client().collection("exports").document(f"{name}-new"), {})
        # It cannot hold, and a commit is all or nothing.
        _update(client(), batch, name)
        return _refused(batch, name, on)

    def grant(permission: str) -> Grant | None:
        return wanted.grant(Resource.RECORDS, permission, on)

    checks = needing(Check("records.get", f"read a training job and an export in {on}", read), grant(_entities("get")))
    listing = Check("records.list", f"list exports in {on}", listed, requires=("records.get",))
    checks += needing(listing, grant(_LIST))
    for fields, (identity, query) in _INDEXED.items():
        if identity in wanted.identities:
            index = f"records.index.{'.'.join(fields)}"
            asks = f"list exports by {' and '.join(fields)}, which needs an index"
            checks.append(Check(index, asks, _indexed(fields, query, store, name), requires=("records.list",)))
    checks += needing(
        Check("records.update", f"change an export that is not there in {on}", update), grant(_entities("update"))
    )
    asks = f"write an export, in a commit that cannot hold, in {on}"
    creating = Check("records.create", asks, create, requires=("records.update",))
    checks += needing(creating, grant(_entities("create")))

    def close() -> None:
        if store.cache_info().currsize:
            store().close()
        if client.cache_info().currsize:
            client().close()

    return Group(checks, close)


def _entities(verb: str) -> str:
    return f"datastore.entities.{verb}"


def _update(client: firestore.Client, batch: firestore.WriteBatch, name: str) -> None:
    """With the precondition of every change of ours; of a document that is not there it cannot hold."""
    unchanged = client.write_option(last_update_time=_LONG_AGO)
    batch.update(client.collection("exports").document(name), {"revision": 0}, option=unchanged)


def _refused(batch: firestore.WriteBatch, name: str, on: str) -> Verdict:
    """Whether a commit got as far as its preconditions, which IAM comes before."""
    with translating(on):
        try:
            batch.commit(retry=None, timeout=CALL_SECONDS)
        except (api.NotFound, api.FailedPrecondition, api.AlreadyExists):
            return FINE
    return Verdict(
        Outcome.WRONG, "precondition_ignored", f"{on} took a write of exports/{name} whose precondition does not hold"
    )


def _indexed(
    fields: tuple[str, str],
    query: Callable[[RecordStore, str], object],
    store: Callable[[], RecordStore],
    name: str,
) -> Callable[[], Verdict]:
    def probe() -> Verdict:
        try:
            query(store(), name)
        except ExportError as error:
            if not isinstance(error.__cause__, api.FailedPrecondition):
                raise
            remedy = (
                "`terraform apply` in infra/ makes those of infra/firestore.indexes.json; one takes minutes to build"
            )
            return Verdict(
                Outcome.MISSING, "index_missing", f"no index of exports by {', '.join(fields)}: {error.message}", remedy
            )
        return FINE

    return probe
