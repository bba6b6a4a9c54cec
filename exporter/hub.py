"""The Hugging Face hub, as far as an export reads it: what a repository is, how its tensors are stored, its files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.errors import SourceError, Unavailable
from exporter.byte_source import LocalFile
from exporter.checkpoint import Checkpoint, Tensor, TensorFile
from exporter.hub_file import HubFile

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Repository:
    """A model on the hub, at one commit; of its files, the config alone has been fetched."""

    model_id: str
    commit: str
    directory: Path
    """Its snapshot in the hub's cache."""
    files: frozenset[str]
    """The names of all its files; none where nobody can be asked (HF_HUB_OFFLINE)."""
    weights: dict[str, HubFile]

    @property
    def is_gguf(self) -> bool:
        """Whether its weights are in GGUF alone."""
        return any(name.endswith(".gguf") for name in self.files) and not any(
            name.endswith((".safetensors", ".bin")) for name in self.files
        )


def look_up(model_id: str, revision: str | None, token: str | None) -> Repository:
    """Find a repository at a branch, tag or commit (None is its main branch) and fetch its config.

    Raises:
        SourceError: `base_gated`, `base_missing`, `hub_token_invalid`.
        Unavailable: `hub_unavailable`.
    """
    # Costs half a second, and a base in a directory does not need it.
    from huggingface_hub import HfApi, constants

    with _translating(_where(model_id, revision)):
        files: frozenset[str] = frozenset()
        if not constants.HF_HUB_OFFLINE:
            # A download alone would take what an earlier caller left in the cache, and ask nobody.
            hub = HfApi(token=token or False)
            hub.auth_check(model_id)
            found = hub.model_info(model_id, revision=revision)
            revision = found.sha
            files = frozenset(file.rfilename for file in found.siblings or ())
        directory = _snapshot(model_id, revision, token, [CONFIG_NAME])
    return Repository(model_id, directory.name, directory, files, {})


def fetch(repository: Repository, token: str | None, patterns: Sequence[str]) -> None:
    """Bring the files whose names match into the repository's directory.

    Raises:
        SourceError, Unavailable: As `look_up`.
    """
    with _translating(_where(repository.model_id, repository.commit)):
        _snapshot(repository.model_id, repository.commit, token, patterns)


def stored_dtypes(repository: Repository, token: str | None) -> dict[str, str]:
    """Name and dtype of every tensor, read from the headers on the hub: no weight is fetched.

    None are found where there is no safetensors checkpoint.

    Raises:
        SourceError: `safetensors_corrupt`, or as `look_up`.
        Unavailable: As `look_up`.
    """
    found = _headers(repository.model_id, repository.commit, token)
    return {name: tensor.dtype for file in found.values() for name, tensor in file.tensors.items()}


def checkpoint(model_id: str, commit: str, token: str | None) -> Checkpoint:
    """The headers of a model on the hub, for plans that read no weights: opening such a file says that it changed.

    Raises:
        SourceError: `base_missing` without a safetensors checkpoint, or as `stored_dtypes`.
        Unavailable: As `look_up`.
    """
    found = _headers(model_id, commit, token)
    if not found:
        raise SourceError(f"base model {model_id!r} has no safetensors checkpoint on the hub.", code="base_missing")
    files = []
    for name, header in sorted(found.items()):
        tensors = [
            Tensor(
                key, info.dtype, tuple(info.shape), info.data_offsets[0], info.data_offsets[1] - info.data_offsets[0]
            )
            for key, info in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)
        ]
        metadata = {key: value for key, value in (header.metadata or {}).items() if isinstance(value, str)}
        size = sum(tensor.nbytes for tensor in tensors)
        files.append(TensorFile(LocalFile(Path(name), size, ()), tuple(tensors), metadata))
    return Checkpoint(tuple(files), None)


def _headers(model_id: str, commit: str, token: str | None) -> dict[str, Any]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        with _translating(_where(model_id, commit)):
            found = HfApi(token=token or False).get_safetensors_metadata(model_id, revision=commit)
    except NotASafetensorsRepoError:
        return {}
    except SafetensorsParsingError as error:
        raise SourceError(
            f"{model_id} on the hub holds no valid safetensors file: {str(error)[:200]}", code="safetensors_corrupt"
        ) from error
    return dict(found.files_metadata)


def _snapshot(model_id: str, revision: str | None, token: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_id, revision=revision, token=token or False, allow_patterns=list(patterns)))


def _where(model_id: str, revision: str | None) -> str:
    return f"base model {model_id!r}" + (f" at revision {revision!r}" if revision else "")


@contextmanager
def _translating(where: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise SourceError(
            f"{where} is gated: accept its licence on the hub and POST again with the hf_token of an account "
            "that has access.",
            code="base_gated",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"{where} is neither a directory here nor found on the hub. Check the id; a private model "
            "needs an hf_token.",
            code="base_missing",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise SourceError(
                f"the hub refused the token for {where}: POST again with a valid hf_token.",
                code="hub_token_invalid",
            ) from error
        raise Unavailable(f"the hub did not deliver {where}: try again later.", code="hub_unavailable") from error
