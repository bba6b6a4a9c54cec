"""A written GGUF is read back: whatever became of it on the way is found, and named by a code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dispatcher.artifacts import StoredFile, path_of, publish
from dispatcher.errors import ExportError
from dispatcher.local_artifacts import LocalArtifacts
from exporter.checkpoint import open_checkpoint
from exporter.converter import convert
from exporter.gguf_feed import language_tensors
from exporter.gguf_file import GgufFile, GgufTensor, plan_quantized
from exporter.gguf_verify import verify_gguf
from exporter.gguf_write import write_parts
from exporter.merged_tensors import MergedTensors
from exporter.plan import plan_copy
from exporter.sources import open_base
from exporter.streaming import planned
from tests.gemmas.llama import llama_adapter, llama_base

DIRECTORY = "gguf_models/job-1/v"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    llama_adapter("gemma3_text", llama_base("gemma3_text", directory / "base"), directory / "adapter")
    return directory


class Written:
    """A GGUF in a store, what it was to be, and what it was made from."""

    def __init__(self, place: Path, merged: MergedTensors, unmerged: MergedTensors, file: GgufFile) -> None:
        self.store = LocalArtifacts(place)
        self.merged, self.unmerged, self.file = merged, unmerged, file
        self.stored = self.publish(lambda writer: write_parts([file.whole], [writer], merged))
        self.path = path_of(self.store.uri(f"{DIRECTORY}/{file.name}"))

    def publish(self, fill: Callable[..., object]) -> StoredFile:
        return publish(self.store, f"{DIRECTORY}/{self.file.name}", fill)

    def replace(self, content: bytes) -> None:
        """Have it written with other bytes, of which the writer knows the checksum."""
        self.path.unlink()
        self.stored = self.publish(lambda writer: writer.write(content))

    def merged_tensors(self) -> list[GgufTensor]:
        """Those that the adapter changes, in the file's order; the last is always in a sample."""
        rows = [(tensor, getattr(tensor.info.tensor, "rows", None)) for tensor in self.file.tensors]
        return [tensor for tensor, of in rows if of is not None and self.merged.outputs[of.source].change is not None]

    def verify(self) -> dict[str, object]:
        return verify_gguf(self.store, DIRECTORY, self.file, self.stored, self.merged)


@contextmanager
def written(models: Path, place: Path, quantization: str) -> Iterator[Written]:
    """Base and adapter of a directory, as one file."""
    base = open_base(str(models / "base"), None, lambda: None)
    checkpoint = open_checkpoint(base.directory)
    plan, adapter, family, config = planned(base, checkpoint, models / "adapter")
    fed = language_tensors({o.tensor.name: o.tensor for o in plan.outputs}, family, "gemma3_text", config)
    with MergedTensors(plan, adapter) as merged, MergedTensors(plan_copy(checkpoint), None) as unmerged:
        converted = convert(base.directory, fed, merged.read)
        place.mkdir()
        file = plan_quantized(converted, place / "template.gguf", f"tiny-{quantization}.gguf", quantization)
        yield Written(place / "store", merged, unmerged, file)


@pytest.mark.parametrize("quantization", ["f32", "q8_0", "q4_k_m", "q2_k"])
def test_what_was_written_right_is_said_with_its_error(quantization: str, models: Path, tmp_path: Path) -> None:
    """Per tensor type, as a part of a row."""
    with written(models, tmp_path / "file", quantization) as file:
        found = file.verify()
    assert found["tensors"] == 80
    assert found["merged_sampled"] == 12
    worst = found["worst_error"]
    assert isinstance(worst, dict)
    assert worst.keys() & {"F32", "Q8_0", "Q4_K", "Q2_K"}
    assert all(0 <= error < 0.7 for error in worst.values())


def _flipped(file: Written, at: int) -> None:
    content = bytearray(file.path.read_bytes())
    content[at] ^= 1
    file.path.write_bytes(content)


def _flip_the_head(file: Written) -> None:
    _flipped(file, len(file.file.head) // 2)


def _flip_a_weight(file: Written) -> None:
    _flipped(file, file.file.tensors[20].start + 5)


def _flip_the_last(file: Written) -> None:
    _flipped(file, file.file.size - 1)


def _cut(file: Written) -> None:
    file.path.write_bytes(file.path.read_bytes()[:-32])


def _lengthen(file: Written) -> None:
    file.path.write_bytes(file.path.read_bytes() + bytes(32))


def _leave_a_tensor_unmerged(file: Written) -> None:
    """One of the base's, instead of what base and adapter make; written whole and sound."""
    content = bytearray(file.path.read_bytes())
    other = bytearray()
    write_parts([file.file.whole], [_Bytes(other)], file.unmerged)
    tensor = file.merged_tensors()[-1]
    part = slice(tensor.start, tensor.start + tensor.nbytes)
    assert content[part] != other[part]
    content[part] = other[part]
    file.replace(bytes(content))


def _exchange_two_tensors(file: Written) -> None:
    content = bytearray(file.path.read_bytes())
    *others, last = file.merged_tensors()
    other = next(tensor for tensor in others if (tensor.kind, tensor.nbytes) == (last.kind, last.nbytes))
    a, b = (slice(tensor.start, tensor.start + tensor.nbytes) for tensor in (last, other))
    content[a], content[b] = content[b], content[a]
    file.replace(bytes(content))


def _remove(file: Written) -> None:
    file.path.unlink()


class _Bytes:
    """A sink in memory."""

    def __init__(self, content: bytearray) -> None:
        self.content = content

    def write(self, data: memoryview) -> None:
        self.content += data


@pytest.mark.parametrize(
    ("damage", "code", "may_pass"),
    [
        (_flip_the_head, "header_differs", False),
        (_cut, "header_differs", False),
        (_lengthen, "header_differs", False),
        (_flip_a_weight, "checksum_differs", False),
        (_flip_the_last, "checksum_differs", False),
        (_leave_a_tensor_unmerged, "merge_wrong", False),
        (_exchange_two_tensors, "merge_wrong", False),
        (_remove, "artifact_vanished", True),
    ],
)
@pytest.mark.parametrize("quantization", ["q8_0", pytest.param("q4_k_m", marks=pytest.mark.full)])
def test_what_is_not_as_it_was_to_be_is_found(
    damage: Callable[[Written], None], code: str, may_pass: bool, quantization: str, models: Path, tmp_path: Path
) -> None:
    """Whatever happened to it, between the merge and the disk."""
    with written(models, tmp_path / "file", quantization) as file:
        file.verify()
        damage(file)
        with pytest.raises(ExportError) as error:
            file.verify()
    assert (error.value.error_code, error.value.retryable) == (code, may_pass)
