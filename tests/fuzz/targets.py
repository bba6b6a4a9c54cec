"""What is fuzzed: each parser of what strangers wrote, as the exporter calls it, and bytes to begin with."""

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.errors import ExportError
from exporter.architecture import fitting_config
from exporter.checkpoint import INDEX_NAME, header_bytes, open_checkpoint, parse_header
from exporter.documents import read_json_object
from exporter.gemma import FAMILIES, family_of
from exporter.gguf_feed import language_tensors, projector_tensors, refuse_inconvertible
from exporter.gguf_tokenizer import describe_added_tokens, leave_out_code
from exporter.model_card import CardFacts, model_card
from exporter.modelfile import modelfile
from exporter.plan import is_tied, plan_copy
from exporter.quantized import config_bytes, quantization_of, without_quantization
from exporter.sidefiles import inner_template, side_files
from exporter.sources import open_base
from exporter.streaming import planned
from exporter.vocabulary import highest_added_token, refuse_vocabulary_that_differs, vocabulary_of
from tests.gemmas import make_adapter, save_base

MAX_BYTES = 64 << 10
"""Of one input"""
MAX_FILE = 1 << 20
"""Of a file that an input describes: a header may claim more, and is refused then"""
UNMEASURED = b"\xff" * 8
"""In the place of a header's length: it is as long as it is"""
FAMILY = "gemma3_text"
Run = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """A parser."""

    run: Run
    """Gives it bytes; raises whatever is not an `ExportError`"""
    seeds: tuple[bytes, ...]
    """What is well-formed, or nearly"""


@contextmanager
def targets() -> Iterator[dict[str, Target]]:
    """All of them by name; a tiny base lies in a directory as long as they are used."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemma-fuzz-")))
        model = save_base(FAMILY, place / "base", shard_bytes=1 << 14)
        make_adapter(FAMILY, model, place / "adapter", targets=["q_proj", "v_proj"], r=2)
        yield {
            "header": Target(_header, tuple(_headers(place))),
            "adapter": Target(_Adapter(place).run, tuple(_adapters(place))),
            "documents": Target(_Documents(place).run, tuple(_documents(place))),
        }


def refused(run: Run) -> Run:
    """The same, content with a refusal by name."""

    def quietly(content: bytes) -> None:
        with suppress(ExportError):
            run(content)

    return quietly


def _header(content: bytes) -> None:
    """A safetensors file, or after eight bytes of 255 its header alone; then what a plan of it would write, which reads
    back as it is."""
    if content[:8] == UNMEASURED:
        content = _file(content[8:], min(_claimed(content[8:]), MAX_FILE))
    tensors, metadata = parse_header(lambda offset, length: content[offset : offset + length], len(content), "x")
    again = header_bytes(tensors, metadata)
    size = len(again) + sum(tensor.nbytes for tensor in tensors)
    found, kept = parse_header(lambda offset, length: again[offset : offset + length], size, "x")
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in found] == [
        (tensor.name, tensor.dtype, tensor.shape) for tensor in tensors
    ]
    assert kept == metadata


def _headers(place: Path) -> Iterator[bytes]:
    yield (place / "adapter" / "adapter_model.safetensors").read_bytes()[:MAX_BYTES]
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    empty = {"dtype": "BF16", "shape": [0, 3], "data_offsets": [8, 8]}
    yield UNMEASURED + json.dumps({"a": entry, "b": empty}).encode()
    yield _file(json.dumps({"a": entry, "__metadata__": {"a": "b"}}).encode(), 8)


def _file(header: bytes, data: int) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(data)


class _Adapter:
    """The config, a zero byte, and the header of the weights, whose values are zeros."""

    def __init__(self, place: Path) -> None:
        self._base = open_base(str(place / "base"), None, lambda: None)
        self._checkpoint = self._base.checkpoint()
        self._directory = place / "fuzzed-adapter"
        self._directory.mkdir()

    def run(self, content: bytes) -> None:
        config, _, header = content.partition(b"\0")
        (self._directory / "adapter_config.json").write_bytes(config)
        weights = self._directory / "adapter_model.safetensors"
        weights.write_bytes(_file(header, 0))
        os.truncate(weights, 8 + len(header) + min(_claimed(header), MAX_FILE))
        planned(self._base, self._checkpoint, self._directory)


def _claimed(header: bytes) -> int:
    """How many bytes of data a header says that there are; none where it cannot be told."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return max((end for end in ends if type(end) is int and end > 0), default=0)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return 0


def _adapters(place: Path) -> Iterator[bytes]:
    config = (place / "adapter" / "adapter_config.json").read_bytes()
    weights = (place / "adapter" / "adapter_model.safetensors").read_bytes()
    header = weights[8 : 8 + int.from_bytes(weights[:8], "little")]
    yield _adapter(config, header)
    small: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    pair = {name: json.loads(header)[name] for name in list(json.loads(header))[:3]}
    for more in (
        {},
        {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*": 1}},
        {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1, 2], "bias": "all"},
        {"target_parameters": ["experts.down_proj"], "lora_bias": True, "layers_to_transform": [0]},
    ):
        yield _adapter(json.dumps({**small, **more}).encode(), json.dumps(pair).encode())


def _adapter(config: bytes, header: bytes) -> bytes:
    return config + b"\0" + header


class _Documents:
    """The first byte says which of a model's JSON files the rest is."""

    def __init__(self, place: Path) -> None:
        self._checkpoint = open_checkpoint(place / "base")
        self._names = list(self._checkpoint.tensors())
        self._directory = place / "fuzzed-model"
        self._directory.mkdir()
        self._empty = place / "empty"
        self._empty.mkdir()
        for file in self._checkpoint.files:
            (self._directory / file.name).symlink_to(place / "base" / file.name)
        self._kinds: dict[bytes, Callable[[bytes], None]] = {
            b"c": self._config,
            b"i": self._index,
            b"t": self._tokenizer_config,
            b"a": self._tokenizer,
            b"g": self._generation,
        }

    def run(self, content: bytes) -> None:
        if (kind := self._kinds.get(content[:1])) is not None:
            kind(content[1:])

    def _config(self, content: bytes) -> None:
        (self._directory / "config.json").write_bytes(content)
        base = open_base(str(self._directory), None, lambda: None)
        family = family_of(base.config)
        quantization_of(base.config)
        config = fitting_config(without_quantization(base.config), self._names)
        is_tied(config)
        config_bytes(config)
        refuse_vocabulary_that_differs(vocabulary_of(config), config, {})
        outputs = {output.tensor.name: output.tensor for output in plan_copy(self._checkpoint).outputs}
        model_card(_facts(config))
        refuse_inconvertible(str(config["model_type"]), config, ["tokenizer.model"])
        language_tensors(outputs, family, str(config["model_type"]), config)
        projector_tensors(outputs, family, str(config["model_type"]))

    def _index(self, content: bytes) -> None:
        (self._directory / INDEX_NAME).write_bytes(content)
        plan_copy(open_checkpoint(self._directory))

    def _tokenizer_config(self, content: bytes) -> None:
        path = self._directory / "tokenizer_config.json"
        path.write_bytes(content)
        side_files(self._directory, self._empty)
        inner_template(self._directory, self._empty)
        leave_out_code(self._directory)

    def _tokenizer(self, content: bytes) -> None:
        for name in ("tokenizer.json", "added_tokens.json"):
            (self._directory / name).write_bytes(content)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            (self._directory / name).write_bytes(b"{}")
        refuse_vocabulary_that_differs(320, {"vocab_size": 320}, side_files(self._directory, self._empty))
        highest_added_token(side_files(self._directory, self._empty))
        describe_added_tokens(self._directory)

    def _generation(self, content: bytes) -> None:
        path = self._directory / "generation_config.json"
        path.write_bytes(content)
        with suppress(ValueError):
            modelfile("a.gguf", FAMILY, chat_template=None, generation=read_json_object(path, limit=MAX_BYTES))


def _facts(config: dict[str, Any]) -> CardFacts:
    return CardFacts("a/b", "main", "1", True, "streaming", "1", config, {}, {}, frozenset())


def _documents(place: Path) -> Iterator[bytes]:
    base = place / "base"
    config = json.loads((base / "config.json").read_text())
    for more in ({}, {"text_config": config, "model_type": "gemma3"}, {"quantization_config": {"quant_method": "x"}}):
        yield b"c" + json.dumps({**config, **more}).encode()
    for family in FAMILIES:
        yield b"c" + json.dumps({"model_type": family, "architectures": [], "text_config": {}}).encode()
    yield b"i" + (base / INDEX_NAME).read_bytes()
    yield b"i" + json.dumps({"weight_map": {"a": "../x.safetensors"}, "metadata": {"total_size": 1}}).encode()
    yield b"t" + json.dumps({"chat_template": [{"name": "default", "template": "{{ a }}"}], "auto_map": {}}).encode()
    yield b"a" + json.dumps({"added_tokens": [{"id": 1, "content": "<a>", "special": True}]}).encode()
    yield b"a" + json.dumps({"<a>": 300}).encode()
    yield b"g" + json.dumps({"do_sample": True, "top_k": 64, "top_p": 0.95, "temperature": 1.0}).encode()
