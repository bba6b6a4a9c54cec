"""The other reference engine: Unsloth's `save_pretrained_merged`, as platforms that train with Unsloth merge.

In a process of its own (`python -m exporter.unsloth_engine`): Unsloth patches transformers, PEFT and torch wherever it
is imported, prints, and writes a cache into the current directory. The exporter's own libraries stay as they are, its
log stays JSON, and the memory is given back. Unsloth skips pairs whose names it cannot place, and does not say so;
so what it wrote is compared with what PEFT makes of each layer before it counts (`exporter.applied`).
"""

import importlib.util
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dispatcher.errors import (
    AdapterMismatch,
    ExportError,
    NotAvailable,
    SourceError,
    Unavailable,
    Unsupported,
    VerificationFailed,
)
from exporter.adapter import WEIGHTS_NAME
from exporter.applied import verify_applied
from exporter.attempt import Attempt
from exporter.checkpoint import INDEX_NAME, Checkpoint, open_checkpoint, read_tensor_file
from exporter.child import end_with_parent, environment, run_child
from exporter.documents import read_json_object
from exporter.gemma import family_of
from exporter.lease import Report
from exporter.making import WRITE_FROM, Checks, Made
from exporter.models import is_applied_whole
from exporter.peft_config import CONFIG_NAME, read_config
from exporter.peft_engine import made_by, read_for_peft
from exporter.scratch import scratch_directory
from exporter.sidefiles import side_file_names
from exporter.sources import HUB_PATTERNS, MAX_CONFIG_BYTES, Base

log = logging.getLogger(__name__)
PROGRAM = (sys.executable, "-P", "-m", "exporter.unsloth_engine")
PACKAGES = ("unsloth", "unsloth_zoo", "transformers", "peft")
TAIL_CHARACTERS = 4000
MERGE_SECONDS = 6 * 3600.0
"""How long it may take: it matches patterns of the adapter's, and renders its chat template, in the child alone."""
_QUIET = {
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
    **dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "UNSLOTH_DISABLE_STATISTICS", "DO_NOT_TRACK"), "1"),
    "UNSLOTH_COMPILE_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Nothing is fetched, nobody is told (loading a model downloads `unslothai/…` repositories to be counted), and nothing
is compiled for a training that will not be."""
_ERRORS: dict[str, type[ExportError]] = {
    kind.__name__: kind
    for kind in (AdapterMismatch, NotAvailable, SourceError, Unavailable, Unsupported, VerificationFailed)
}
"""What the child may say, by name."""


def is_installed() -> bool:
    """Whether the extra `[unsloth]` is there; says nothing of whether it works."""
    return importlib.util.find_spec("unsloth") is not None


def unsloth_version() -> str:
    """What decides this engine's bytes, besides base and adapter: versions, and whether a GPU adds and rounds.

    Raises:
        NotAvailable: Unsloth is not installed (`engine_not_available`).
    """
    try:
        packages = "+".join(f"{package}-{version(package)}" for package in PACKAGES)
    except PackageNotFoundError as error:
        raise NotAvailable(
            f"the engine unsloth needs the package {error.name}: install gemma-export[unsloth].",
            code="engine_not_available",
        ) from error
    return f"{packages}+torch-{torch.__version__}+on-{'gpu' if torch.cuda.is_available() else 'cpu'}"


def memory_needed(base: Checkpoint) -> int:
    """Bytes that merging takes at its height: without a GPU Unsloth loads float32, and checking adds the largest."""
    sizes = [math.prod(tensor.shape) for file in base.files for tensor in file.tensors]
    return 4 * (sum(sizes) + 4 * max(sizes, default=0))


def make(attempt: Attempt, base: Base, adapter_dir: Path, report: Report, checks: Checks) -> Made:
    """Merge in a process of its own and on local disk, then publish.

    Raises:
        ExportError: As `merge_with_unsloth`, or a failed check.
    """
    merge = partial(merge_with_unsloth, while_waiting=lambda: report("merging", WRITE_FROM))
    return made_by(merge, attempt, base, adapter_dir, report, checks)


def merge_with_unsloth(
    base: Base, adapter: Path, output: Path, *, while_waiting: Callable[[], None] = lambda: None
) -> None:
    """Have Unsloth merge, and leave weights, index and config in `output`.

    Args:
        base: The base model, local; its directory is only read.
        adapter: A PEFT adapter directory with `adapter_model.safetensors`.
        output: An existing, empty directory.
        while_waiting: Called now and then; what it raises stops the work.

    Raises:
        NotAvailable: `engine_not_available`.
        SourceError: `adapter_weights_missing`, or those of `open_checkpoint`.
        Unsupported: What PEFT merges wrong, see `merge_with_peft`, or what Unsloth cannot merge (`unsloth_failed`).
        AdapterMismatch: NaN in the adapter, `adapter_unmatched`, and those of `refuse_unmergeable`.
        VerificationFailed: What Unsloth wrote is not base plus adapter, see `verify_applied`.
    """
    unsloth_version()
    read_for_peft(adapter, base)
    checkpoint = base.checkpoint()
    with scratch_directory() as place:
        _lay_out(base.directory, checkpoint, adapter, place)
        command = [*PROGRAM, str(place), str(output.absolute())]
        status = run_child(
            command, place, environment=_environment(place), while_waiting=while_waiting, seconds=MERGE_SECONDS
        )
        if status is None:
            raise Unsupported(f"Unsloth takes longer than {MERGE_SECONDS / 3600:.0f} hours.", code="unsloth_failed")
        answer: dict[str, Any] = {}
        if (place / "answer.json").is_file():
            answer = json.loads((place / "answer.json").read_text())
        if not answer.get("done"):
            raise _failure(answer, (place / "log").read_text(errors="replace"))
    for path in output.iterdir():
        if not (path.suffix == ".safetensors" or path.name in (INDEX_NAME, "config.json")):
            path.unlink()


def _lay_out(base: Path, checkpoint: Checkpoint, adapter: Path, place: Path) -> None:
    """Make `base` and `adapter` beside each other, which Unsloth may write into.

    It mends tokenizer files where it finds them, takes every safetensors file of a base for a part of the model, and
    some directory names for hub ids. So small files are copies, weights are links to the very ones that count, and the
    adapter's config names a base that is called `base`.
    """
    small = {path.name for pattern in HUB_PATTERNS for path in base.glob(pattern)}
    weights = {file.name for file in checkpoint.files}
    own = {WEIGHTS_NAME, *(name for name in side_file_names(adapter) if "/" not in name)}
    for name, source, names in (("base", base, small | weights), ("adapter", adapter, own)):
        (place / name).mkdir()
        for path in (source / name for name in sorted(names)):
            if path.suffix != ".safetensors" and path.is_file():
                shutil.copyfile(path, place / name / path.name)
            elif path.name in weights | {WEIGHTS_NAME}:
                (place / name / path.name).symlink_to(path.resolve())
    config = {**read_config(adapter), "base_model_name_or_path": str(place / "base"), "revision": None}
    (place / "adapter" / CONFIG_NAME).write_text(json.dumps(config))


def _environment(place: Path) -> dict[str, str]:
    """What a program needs of this process's: no secret, and nothing that would change what Unsloth does."""
    caches = {name: str(place / "cache") for name in ("HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "UNSLOTH_COMPILE_LOCATION")}
    gpu = {} if torch.cuda.is_available() else {"UNSLOTH_ALLOW_CPU": "1"}
    return environment(**_QUIET, **caches, **gpu)


def _failure(answer: dict[str, Any], said: str) -> ExportError:
    tail = said[-TAIL_CHARACTERS:]
    log.warning("Unsloth failed; the last that it said: %s", tail)
    kind = _ERRORS.get(str(answer.get("kind")), Unsupported)
    last = next((line for line in reversed(tail.splitlines()) if line.strip()), "it said nothing")
    message = str(answer.get("message") or f"Unsloth's process died: {last[:300]}")
    return kind(message, code=str(answer.get("code") or "unsloth_failed"))


def _child(place: Path, output: Path) -> None:
    """What runs in the process of its own: merge, verify, and leave `answer.json`."""
    end_with_parent()
    try:
        _merge(place, output)
        answer: dict[str, Any] = {"done": True}
    except ExportError as error:
        answer = {"kind": type(error).__name__, "code": error.error_code, "message": error.message}
    except Exception as error:  # whatever the libraries raise is an answer
        logging.exception("the merge failed")
        answer = {"message": f"Unsloth could not merge it: {type(error).__name__}: {str(error)[:1000]}"}
    (place / "answer.json").write_text(json.dumps(answer))


def _merge(place: Path, output: Path) -> None:
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        _stand_in_for_a_gpu()
    from unsloth import FastModel
    from unsloth.models import vision

    # The image processor, for which Unsloth would refuse to load a model without torchvision, is not what is merged.
    vision._missing_torchvision_error = lambda error=None: False
    model, tokenizer = FastModel.from_pretrained(
        str(place / "adapter"),
        # Without a GPU Unsloth would take float16 for bfloat16, in which what was trained whole may overflow.
        dtype=None if on_gpu else torch.float32,
        load_in_4bit=False,  # the weights that are merged come from the base's files either way
        use_gradient_checkpointing=False,  # nothing is trained
        local_files_only=True,
    )
    if not is_applied_whole(model, read_tensor_file(place / "adapter" / WEIGHTS_NAME)):
        raise AdapterMismatch(
            "Unsloth did not load the adapter whole: its modules are not this base's.", code="adapter_unmatched"
        )
    model.save_pretrained_merged(str(output), tokenizer, save_method="merged_16bit")
    config = read_json_object(place / "base" / "config.json", limit=MAX_CONFIG_BYTES)
    verify_applied(open_checkpoint(output), open_checkpoint(place / "base"), model, family_of(config), config)


def _stand_in_for_a_gpu() -> None:
    """Let Unsloth load a model where there is no GPU, which it asks for its name and capability all the same."""
    nothing = SimpleNamespace(name="no GPU", total_memory=0, major=0, minor=0)
    torch.cuda.get_device_properties = lambda device=None: nothing  # type: ignore[assignment,return-value]  # a stand-in


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
