"""Random bases of real shapes, written as a stream so that no model is ever held, and adapters that fit them."""

import json
import math
import random
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.gemmas import make_adapter, save_base, save_tokenizer

MARKER = "written.json"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """The dimensions of a Gemma 3 text model and how its checkpoint is split; source: the hub's config.json."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    shard_bytes: int
    head_dim: int = 256
    rank: int = 16
    """Of the adapter"""

    def linears(self) -> Shapes:
        """[out, in] of every linear that `all-linear` targets, by module name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        of_layer: Shapes = {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in of_layer.items()}

    def tensors(self) -> Shapes:
        """The shape of every tensor of the checkpoint."""
        norms: Shapes = {
            **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (self.hidden,)),
            **dict.fromkeys(("pre_feedforward_layernorm", "post_feedforward_layernorm"), (self.hidden,)),
            **dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (self.head_dim,)),
        }
        shapes: Shapes = {"model.embed_tokens": (self.vocabulary, self.hidden), **self.linears()}
        shapes |= {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in norms.items()}
        shapes["model.norm"] = (self.hidden,)
        return {f"{name}.weight": shape for name, shape in shapes.items()}

    def factors(self) -> Shapes:
        """The shape of every tensor of the adapter."""
        prefix = "base_model.model."
        a: Shapes = {f"{prefix}{name}.lora_A.weight": (self.rank, shape[1]) for name, shape in self.linears().items()}
        b: Shapes = {f"{prefix}{name}.lora_B.weight": (shape[0], self.rank) for name, shape in self.linears().items()}
        return a | b

    @property
    def gigabytes(self) -> float:
        return sum(math.prod(shape) for shape in self.tensors().values()) * 2 / 1e9

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        }


SIZES = {
    size.name: size
    for size in (
        Size("1b", 26, 1152, 6912, 4, 1, 262144, shard_bytes=5_000_000_000),
        Size("4b", 34, 2560, 10240, 8, 4, 262208, shard_bytes=5_000_000_000),
    )
}


def prepare(size: Size, root: Path) -> tuple[Path, Path]:
    """Base and adapter of this size under `root`, written unless they are there already."""
    directory = root / size.name
    base, adapter, marker = directory / "base", directory / "adapter", directory / MARKER
    facts = json.dumps(asdict(size))
    if marker.is_file() and marker.read_text() == facts:
        return base, adapter
    base.mkdir(parents=True, exist_ok=True)
    adapter.mkdir(exist_ok=True)
    for path in (*base.iterdir(), *adapter.iterdir()):
        path.unlink()
    _write_base(size, base)
    _write_adapter(size, adapter)
    marker.write_text(facts)
    return base, adapter


def prepare_tiny(root: Path) -> tuple[Path, Path]:
    """A model of a few kilobytes: what is measured with it is everything but the weights."""
    base, adapter = root / "tiny" / "base", root / "tiny" / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        make_adapter("gemma3_text", save_base("gemma3_text", base), adapter)
    return base, adapter


def _write_base(size: Size, directory: Path) -> None:
    shards = list(shards_of(size))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else several
        _write_random(directory / name, shapes, torch.bfloat16, 0.02)
        weight_map |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": int(size.gigabytes * 1e9)}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(size.config(), indent=2))
    save_tokenizer(directory)


def shards_of(size: Size) -> Iterator[Shapes]:
    """The shape of every tensor of each file of the checkpoint, as many as fit into `shard_bytes`."""
    shard: Shapes = {}
    room = size.shard_bytes
    for name, shape in size.tensors().items():
        nbytes = math.prod(shape) * 2
        if shard and nbytes > room:
            yield shard
            shard, room = {}, size.shard_bytes
        shard[name] = shape
        room -= nbytes
    yield shard


def _write_adapter(size: Size, directory: Path) -> None:
    _write_random(directory / "adapter_model.safetensors", size.factors(), torch.float32, 0.02)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "random",
        "r": size.rank,
        "lora_alpha": 2 * size.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in size.linears()}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _write_random(path: Path, shapes: Shapes, dtype: torch.dtype, spread: float) -> None:
    """Write a safetensors file of random values, a block at a time.

    Source of the format: https://github.com/huggingface/safetensors#format
    """
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(1 << 23, generator=generator) * spread).to(dtype)
    raw = memoryview(pool.view(torch.uint8).numpy().tobytes())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    dice = random.Random(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            left = math.prod(shape) * dtype.itemsize
            while left:
                # Each block begins elsewhere in the pool, so that no two tensors are alike.
                first = dice.randrange(len(raw) // 2) // 8 * 8
                block = raw[first : first + left]
                file.write(block)
                left -= len(block)
