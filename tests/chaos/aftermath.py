"""What a storm left: whether records, the training job's document and files agree, and nothing else is there."""

import hashlib
import json
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.artifacts import path_of
from dispatcher.contract import RESULT_FIELD, ExportType, State
from dispatcher.published import MANIFEST_NAME, ROOTS
from dispatcher.settings import Settings
from dispatcher.tokens import FileTokens
from exporter.job import DOCUMENT_FIELD
from tests.chaos.deployment import JOB, Deployment
from tests.chaos.user import EXPORTS, Seen

Tree = dict[str, str]
"""Of each file of a version, by `{version}/{name}`, the digest; of the manifest, without its `run`"""


def tree_of(directory: Path) -> Tree:
    """Every file under an artifact's root of one job, hidden ones too."""
    return {
        path.relative_to(directory).as_posix(): _digest(path) for path in sorted(directory.rglob("*")) if path.is_file()
    }


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name == MANIFEST_NAME:
        manifest = json.loads(content)
        manifest.pop("run")
        content = json.dumps(manifest, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Wanted:
    """What a run without faults makes, by the artifact's root."""

    trees: dict[str, Tree]

    @classmethod
    def of(cls, deployment: Deployment) -> "Wanted":
        """What a deployment has."""
        root = deployment.root / "artifacts"
        return cls({name: tree_of(root / name / JOB) for name in ROOTS.values()})


def judge(seen: Seen, deployment: Deployment, wanted: Wanted, scratch: Path) -> None:
    """Add to what was seen what is wrong with what is left.

    Args:
        seen: Added to.
        deployment: Closed; its files are read as they lie.
        wanted: What is to be there.
        scratch: Where this process's temporary files go.
    """
    records, job = _documents(deployment.root)
    for kind, request in EXPORTS.items():
        record = records.pop(f"{JOB}.{kind}", None)
        if record is None:
            seen.lost.append(f"{kind} has no record")
        else:
            _judge_record(seen, ExportType(request["export_type"]), record, job)
    seen.inconsistent += [f"a record that nobody asked for: {export_id}" for export_id in records]
    if job.get("kept") != {"as": "it is"}:
        seen.inconsistent.append(f"the training job's document lost what is not ours: {job}")
    _judge_files(seen, deployment.root, wanted)
    _judge_tokens(seen, deployment.root / "tokens")
    seen.leftovers += [f"temporary file {path}" for path in scratch.glob("*")]


def _judge_tokens(seen: Seen, directory: Path) -> None:
    """A token whose deletion failed, or whose request did, is left to its time to live; after that none is there."""
    seen.tokens = len(list(directory.glob("*")))
    later = time.time() + Settings.token_ttl_seconds + 1
    last = FileTokens(directory, ttl_seconds=Settings.token_ttl_seconds, clock=lambda: later).put("another", "token")
    (directory / last).unlink()
    seen.leftovers += [f"token {path.name[:80]}" for path in directory.glob("*")]


def _documents(root: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Every record by its id, and the training job's document."""
    with closing(sqlite3.connect(root / "records.db")) as connection:
        exports = connection.execute("SELECT export_id, document FROM exports").fetchall()
        (job,) = connection.execute("SELECT document FROM training_jobs").fetchone()
    return {export_id: json.loads(text) for export_id, text in exports}, json.loads(job)


def _judge_record(seen: Seen, kind: ExportType, record: dict[str, Any], job: dict[str, Any]) -> None:
    name = record["export_id"]
    if record["state"] != State.COMPLETED or len(record["artifacts"]) != 1:
        seen.inconsistent.append(f"{name} is {record['state']} with {len(record['artifacts'])} artifacts")
        return
    artifact = record["artifacts"][0]
    path = artifact["file"] or artifact["uri"]
    inner: Any = job
    for part in DOCUMENT_FIELD[kind].split("."):
        inner = inner.get(part, {}) if isinstance(inner, dict) else {}
    if job.get(RESULT_FIELD[kind]) != path or inner != path:
        seen.inconsistent.append(f"{name} is at {path}, the training job says {job.get(RESULT_FIELD[kind])}, {inner}")
    directory = path_of(artifact["uri"])
    manifest = directory / MANIFEST_NAME
    if not manifest.is_file():
        seen.inconsistent.append(f"{name} is recorded, and {directory} has no manifest")
        return
    listed = {file["name"]: file["bytes"] for file in json.loads(manifest.read_text())["files"]}
    there = {
        path.relative_to(directory).as_posix(): path.stat().st_size for path in directory.rglob("*") if path.is_file()
    }
    there.pop(MANIFEST_NAME)
    if there != listed:
        seen.inconsistent.append(f"{name}: {directory} has {sorted(there)}, its manifest lists {sorted(listed)}")


def _judge_files(seen: Seen, root: Path, wanted: Wanted) -> None:
    for name, tree in wanted.trees.items():
        top = root / "artifacts" / name / JOB
        found = tree_of(top)
        versions = {path.partition("/")[0] for path in found if path.endswith(f"/{MANIFEST_NAME}")}
        if len(versions) > 1:
            seen.doubled.append(f"{name}: {len(versions)} versions are published")
        if missing := tree.keys() - found.keys():
            seen.lost.append(f"{name}: {sorted(missing)[:3]} of the undisturbed artifact are not there")
        different = [path for path in tree.keys() & found.keys() if tree[path] != found[path]]
        if different:
            seen.inconsistent.append(f"{name}: {different[:3]} differ from the undisturbed artifact's")
        seen.leftovers += [f"{name}: {path}" for path in sorted(found.keys() - tree.keys())]
    known = tuple(str(root / "artifacts" / name / JOB) for name in wanted.trees)
    others = [path for path in (root / "artifacts").rglob("*") if path.is_file() and not str(path).startswith(known)]
    seen.leftovers += [str(path) for path in others]
