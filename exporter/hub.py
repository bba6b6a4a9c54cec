"""The Hugging Face hub, as far as an export reads it: what a repository is, how its tensors are stored, its files."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dispatcher.errors import ExportError, SourceError
from exporter.hub_errors import translating, unneeded
from exporter.hub_file import HubFile

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

CONFIG_NAME = "config.json"
MAX_FILES = 100_000
MAX_NAME = 1000
"""Characters"""
MAX_FETCHED_BYTES = 200_000_000
"""Of a file that is no weights: five times the largest tokenizer of a Gemma"""
_SOUND = re.compile(r"[^\\\x00-\x1f\x7f\ud800-\udfff]+")


@dataclass(frozen=True)
class Repository:
    """A model on the hub, at one commit; of its files, the config alone has been fetched."""

    model_id: str
    commit: str
    directory: Path
    """Its snapshot in the hub's cache."""
    files: frozenset[str]
    """The names of all its files; none where nobody can be asked (HF_HUB_OFFLINE)."""
    weights: Mapping[str, HubFile] = field(default_factory=dict)
    """Its *.safetensors that lie in no folder, by name; none where nobody can be asked."""

    @property
    def is_gguf(self) -> bool:
        """Whether its weights are in GGUF alone."""
        return any(name.endswith(".gguf") for name in self.files) and not any(
            name.endswith((".safetensors", ".bin")) for name in self.files
        )


def look_up(
    model_id: str, revision: str | None, token: str | None, *, while_waiting: Callable[[], object] = lambda: None
) -> Repository:
    """Find a repository at a branch, tag or commit (None is its main branch), prove access, and fetch its config.

    Access is proved by this token for a file of its weights, whatever an earlier caller left in the cache. As for
    `HubFile`, `while_waiting` is called where the hub has to be asked again.

    Raises:
        SourceError: `base_gated`, `base_missing`, `base_revision_missing`, `base_disabled`, `base_unlisted`,
            `base_listing_invalid`, `hub_token_invalid`, `hub_token_unneeded`, `hub_token_forbidden`.
        Unavailable: `hub_unavailable`.
    """
    # Costs half a second, and a base in a directory does not need it.
    from huggingface_hub import constants

    files: frozenset[str] = frozenset()
    weights: Mapping[str, HubFile] = {}
    if not constants.HF_HUB_OFFLINE:
        # A download alone would take what an earlier caller left in the cache, and ask nobody.
        found = _allowed(model_id, revision, token)
        revision = found.sha
        files = frozenset(sibling.rfilename for sibling in found.siblings or ())
        weights = {
            name: replace(file, while_waiting=while_waiting) for name, file in _weights(found, model_id, token).items()
        }
    with translating(_where(model_id, revision), has_token=token is not None):
        directory = _snapshot(model_id, revision, token, [CONFIG_NAME])
    return Repository(model_id, directory.name, directory, files, weights)


def fetch(repository: Repository, token: str | None, patterns: Sequence[str]) -> None:
    """Bring the files whose names match into the repository's directory.

    Raises:
        SourceError, Unavailable: As `look_up`.
    """
    with translating(_where(repository.model_id, repository.commit), has_token=token is not None):
        _snapshot(repository.model_id, repository.commit, token, patterns)


def _allowed(model_id: str, revision: str | None, token: str | None) -> "ModelInfo":
    """What the hub tells of a model whose files this token, if any, may read."""
    try:
        return _told(model_id, revision, token)
    except SourceError as refusal:
        if refusal.error_code != "hub_token_invalid":
            raise
        try:
            _told(model_id, revision, None)
        except ExportError:
            raise refusal from None
        raise unneeded(_where(model_id, revision)) from None


def _told(model_id: str, revision: str | None, token: str | None) -> "ModelInfo":
    from huggingface_hub import HfApi

    with translating(_where(model_id, revision), has_token=token is not None):
        # With each file's size and digest: one request, not one a file.
        found = HfApi(token=token or False).model_info(model_id, revision=revision, files_metadata=True)
    _refuse_hostile(found.siblings or (), _where(model_id, revision))
    files = {sibling.rfilename: sibling for sibling in found.siblings or ()}
    proof = next(
        iter(_weights(found, model_id, token)), CONFIG_NAME if CONFIG_NAME in files else next(iter(files), None)
    )
    if proof is not None:
        _pinned(model_id, found.sha, files[proof], token).prove_access()
    return found


def _refuse_hostile(files: "Sequence[RepoSibling]", where: str) -> None:
    """Refuse names that lead out of a directory, or that no model has, before anything is fetched by them.

    Raises:
        SourceError: `base_listing_invalid`.
    """
    if len(files) > MAX_FILES:
        raise SourceError(
            f"{where} has {len(files)} files, {MAX_FILES} are the most: name a model.", code="base_listing_invalid"
        )
    for file in files:
        name = file.rfilename
        if len(name) > MAX_NAME or not _SOUND.fullmatch(name) or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise SourceError(f"{where} has a file of the name {name[:200]!r}.", code="base_listing_invalid")
        # What is fetched whole; weights are read by ranges, and are as large as they are.
        fetched = name.endswith((".json", ".model", ".jinja"))
        if fetched and (file.size or 0) > MAX_FETCHED_BYTES:
            raise SourceError(
                f"{where} has {name[:200]!r} of {file.size} bytes, {MAX_FETCHED_BYTES} are the most.",
                code="base_listing_invalid",
            )


def _weights(found: "ModelInfo", model_id: str, token: str | None) -> dict[str, HubFile]:
    names = {sibling.rfilename: sibling for sibling in found.siblings or ()}
    return {
        name: _pinned(model_id, found.sha, sibling, token)
        for name, sibling in sorted(names.items())
        if name.endswith(".safetensors") and "/" not in name
    }


def _pinned(model_id: str, commit: str | None, sibling: "RepoSibling", token: str | None) -> HubFile:
    etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if commit is None or sibling.size is None or etag is None:
        raise SourceError(
            f"{_where(model_id, commit)}: the hub does not tell commit, size and digest of {sibling.rfilename}. "
            "HF_ENDPOINT must be the Hugging Face hub or a whole mirror of it.",
            code="base_unlisted",
        )
    return HubFile(model_id, commit, sibling.rfilename, sibling.size, etag, token)


def _snapshot(model_id: str, revision: str | None, token: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # documented there

    disable_progress_bars()  # a log has one JSON object a line
    try:
        return Path(snapshot_download(model_id, revision=revision, token=token or False, allow_patterns=list(patterns)))
    except HFValidationError:  # a ValueError too
        raise
    except ValueError:  # at a name that leads out of its cache; it asks for another listing than `_told` looked at
        raise SourceError(
            f"{_where(model_id, revision)} has files of names that cannot be written.", code="base_listing_invalid"
        ) from None


def _where(model_id: str, revision: str | None) -> str:
    return f"base model {model_id!r}" + (f" at revision {revision!r}" if revision else "")
