"""The proof that comes with every artifact: `export.json`, create-only and written last.

What it says about the artifact is the same for every run of the same plan; what it says about one run (`run`) is
not, and does not count when two manifests are compared.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pydantic

from dispatcher.artifacts import ArtifactStore, StoredFile, publish
from dispatcher.errors import ArtifactConflict, SourceError, VerificationFailed
from dispatcher.published import MANIFEST_NAME, are_there

FORMAT_VERSION = 1
LIBRARIES = ("torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Identity:
    """All that decides an artifact's bytes; two equal identities are one artifact."""

    export_type: str
    quantization: str | None
    base_id: str
    base_revision: str
    adapter_fingerprint: str
    engine: str
    engine_version: str
    nonce: str | None = None

    @property
    def version(self) -> str:
        """12 hex digits that name the artifact's directory."""
        facts = json.dumps([FORMAT_VERSION, *self.__dict__.values()], separators=(",", ":"))
        return hashlib.sha256(facts.encode()).hexdigest()[:12]

    def instead(self) -> Self:
        """The identity of what is made in place of this version, when its directory is spoilt.

        It follows from the spoilt version, so that every attempt comes to the same one, without a word between them.
        """
        return replace(self, nonce=self.version)


@dataclass(frozen=True)
class History:
    """What else a manifest says of what an artifact was made from; it decides no byte."""

    of_base: Mapping[str, Any] = field(default_factory=dict)
    """Such as which base was asked for"""
    of_adapter: Mapping[str, Any] = field(default_factory=dict)
    """Such as what it was trained on"""


class _File(pydantic.BaseModel):
    name: str
    bytes: int


class _Engine(pydantic.BaseModel):
    name: str


class _Manifest(pydantic.BaseModel):
    """What we read of a manifest."""

    engine: _Engine
    tensors: dict[str, Any]
    verified: dict[str, Any]
    files: list[_File]


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries whose arithmetic or formats an artifact depends on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def manifest_of(
    identity: Identity,
    *,
    adapter_uri: str,
    files: list[StoredFile],
    tensors: dict[str, Any],
    verified: dict[str, Any],
    history: History,
) -> dict[str, Any]:
    """The comparable part of a manifest: everything but `run`."""
    return {
        "format_version": FORMAT_VERSION,
        "version": identity.version,
        "export_type": identity.export_type,
        "quantization": identity.quantization,
        "base": {"id": identity.base_id, "revision": identity.base_revision, **history.of_base},
        "adapter": {"uri": adapter_uri, "fingerprint": identity.adapter_fingerprint, **history.of_adapter},
        "engine": {"name": identity.engine, "version": identity.engine_version},
        "libraries": library_versions(),
        "tensors": tensors,
        "verified": verified,
        "files": [{"name": file.name, "bytes": file.size, "crc32c": file.crc32c} for file in sorted(files, key=_name)],
    }


def _name(file: StoredFile) -> str:
    return file.name


def publish_manifest(store: ArtifactStore, directory: str, manifest: dict[str, Any], run: dict[str, Any]) -> None:
    """Write `export.json` into a version's directory, unless an equal one is there.

    Raises:
        ArtifactConflict: `manifest_conflict`: one is there, and it describes other bytes.
    """
    path = f"{directory}/{MANIFEST_NAME}"
    content = json.dumps({**manifest, "run": run}, indent=2).encode() + b"\n"
    try:
        publish(store, path, lambda writer: writer.write(content))
    except ArtifactConflict as error:
        if read_manifest(store, directory) != manifest:
            raise ArtifactConflict(
                f"{store.uri(path)} is there already and describes other content. Nothing was overwritten; "
                "export again with --force to make a new version.",
                code="manifest_conflict",
            ) from error


def read_manifest(store: ArtifactStore, directory: str) -> dict[str, Any]:
    """The manifest of a version's directory, without its `run`.

    Raises:
        VerificationFailed: It is none that we wrote (`manifest_unreadable`).
        NotFound: There is none.
    """
    path = f"{directory}/{MANIFEST_NAME}"
    try:
        content = store.read(store.uri(path))
        _Manifest.model_validate_json(content)
    except (SourceError, pydantic.ValidationError) as error:
        raise VerificationFailed(f"{path} is no manifest of ours.", code="manifest_unreadable") from error
    manifest: dict[str, Any] = json.loads(content)
    manifest.pop("run", None)
    return manifest


def still_holds(store: ArtifactStore, directory: str, manifest: dict[str, Any]) -> bool:
    """Whether every file that a manifest lists lies there; see `are_there`."""
    files = [StoredFile(file["name"], file["bytes"], file.get("crc32c", "")) for file in manifest["files"]]
    return are_there(store, store.uri(directory), files)
