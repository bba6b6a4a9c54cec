"""The matrix: everything that PEFT can train with LoRA x every family, and what becomes of it.

`python -m tests.exporter.matrix [ROW …]` prints it as a table.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from dispatcher.artifacts import path_of
from dispatcher.errors import ExportError
from exporter.artifact import Result
from tests.exporter.damage import Tensors, edit_adapter, edit_config
from tests.exporter.exporting import export
from tests.gemmas import (
    FAMILIES,
    file_tensors,
    load_model,
    make_adapter,
    model_tensors,
    save_base,
    text_logits,
)
from tests.gemmas.exact import exact_merge
from tests.gemmas.quantized import CONFIG, edit_base_config, quantize_in_place
from tests.gemmas.tokenizer import VOCABULARY

RIGHT = "right"
EVERY = tuple(FAMILIES)
SIGLIP = ("gemma3", "shieldgemma2", "paligemma")
"""Whose vision towers have biases."""
TEXT_ONLY = tuple(family.name for family in FAMILIES.values() if not family.multimodal)
PER_LAYER = ("gemma3n_text", "gemma3n", "gemma4_text", "gemma4_k_eq_v", "gemma4_moe", "gemma4")
"""Which have an embedding for each layer."""
TOLERANCE = 2e-4
"""Of logits in float32, which two orders of summing make differ."""

Make = Callable[[str, transformers.PreTrainedModel, Path], None]
Judge = Callable[[str, Path], "Cell"]


@dataclass(frozen=True)
class Row:
    """One feature: an adapter that uses it, and what is to become of it."""

    name: str
    make: Make
    families: tuple[str, ...] = EVERY
    outcome: str = RIGHT
    """`RIGHT`, or the code with which it is refused"""
    judge: "Judge | None" = None
    """Exports and judges what `make` alone does not make; None is `cell`."""


@dataclass(frozen=True)
class Cell:
    """What became of one row of one family."""

    outcome: str
    logits: float = 0.0
    """The largest difference from the unmerged model's, float32"""
    rounded_here: int = 0
    rounded_in_peft: int = 0
    of: int = 0
    """How many changed values are the correctly rounded ones in bfloat16, of how many"""
    summary: dict[str, Any] = field(default_factory=dict)


def trained(*targets: str, **options: Any) -> Make:
    """An adapter on `targets` of the language tower; all linear layers if none are given."""

    def make(family: str, model: transformers.PreTrainedModel, directory: Path) -> None:
        tower = r".*language_model.*" if FAMILIES[family].multimodal and family != "gemma3n" else r".*"
        pattern = "|".join(rf"{tower}\b{target}" if target != "lm_head" else r".*lm_head" for target in targets)
        make_adapter(family, model, directory, targets=pattern or "all-linear", save_embeddings="auto", **options)

    return make


def listed(*targets: str, **options: Any) -> Make:
    """An adapter on modules of these names, in whichever tower."""

    def make(family: str, model: transformers.PreTrainedModel, directory: Path) -> None:
        make_adapter(family, model, directory, targets=[*targets], **options)

    return make


def vision(*targets: str, **options: Any) -> Make:
    """An adapter on `targets` of the vision tower."""

    def make(family: str, model: transformers.PreTrainedModel, directory: Path) -> None:
        pattern = "|".join(rf".*vision_tower.*\b{target}" for target in targets)
        make_adapter(family, model, directory, targets=pattern, **options)

    return make


def settings(make: Make, **changes: Any) -> Make:
    """An adapter whose config says something else than what PEFT wrote."""

    def changed(family: str, model: transformers.PreTrainedModel, directory: Path) -> None:
        make(family, model, directory)
        edit_config(directory, **changes)

    return changed


def keys(make: Make, change: Callable[[Tensors], Tensors]) -> Make:
    """An adapter whose file holds other tensors than PEFT wrote."""

    def changed(family: str, model: transformers.PreTrainedModel, directory: Path) -> None:
        make(family, model, directory)
        edit_adapter(directory, change)

    return changed


def resized(family: str, place: Path) -> Cell:
    """An adapter of a model with more tokens than its base, both layers trained whole."""
    model = save_base(family, place / "base", dtype=torch.float32, layout=FAMILIES[family].layouts[0])
    model.resize_token_embeddings(VOCABULARY + 6)
    trained(*QV, modules_to_save=[*BOTH])(family, model, place / "adapter")
    result = export(place / "base", place / "adapter", place / "store")
    base = load_model(place / "base")
    base.resize_token_embeddings(VOCABULARY + 6)
    wanted = text_logits(peft.PeftModel.from_pretrained(base, place / "adapter"))
    merged = text_logits(load_model(path_of(result.artifact.uri)))
    assert merged.shape[-1] == VOCABULARY + 6
    error = float((merged - wanted).abs().max())
    assert error <= TOLERANCE * max(1.0, float(wanted.abs().max())), f"logits differ by {error}"
    return Cell(RIGHT, error)


def whole(family: str, place: Path) -> Cell:
    """A full fine-tune in the adapter's place."""
    for name, seed in (("base", 0), ("adapter", 1)):
        save_base(family, place / name, seed=seed, layout=FAMILIES[family].layouts[0])
    result = export(place / "base", place / "adapter", place / "store", engine="auto")
    for path in (place / "adapter").glob("*.safetensors"):
        assert (path_of(result.artifact.uri) / path.name).read_bytes() == path.read_bytes()
    return Cell(RIGHT)


def leftover(family: str, place: Path) -> Cell:
    """A base of 16-bit weights whose config says that they are quantized."""
    model = save_base(family, place / "base", layout=FAMILIES[family].layouts[0])
    trained()(family, model, place / "adapter")
    wanted = path_of(export(place / "base", place / "adapter", place / "plain").artifact.uri)
    edit_base_config(place / "base", quantization_config=CONFIG)
    merged = path_of(export(place / "base", place / "adapter", place / "store").artifact.uri)
    assert (merged / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert "quantization_config" not in (merged / "config.json").read_text()
    return Cell(RIGHT)


def packed(family: str, place: Path) -> Cell:
    """A base in 4 bits, of which nothing tells the 16-bit twin."""
    model = save_base(family, place / "base", layout=FAMILIES[family].layouts[0])
    trained()(family, model, place / "adapter")
    quantize_in_place(place / "base")
    try:
        export(place / "base", place / "adapter", place / "store", engine="auto")
    except ExportError as error:
        return Cell(error.error_code)
    return Cell(RIGHT)


def of_type(config: peft.PeftConfig) -> Make:
    """An adapter of another PEFT type than LoRA."""

    def make(family: str, model: transformers.PreTrainedModel, directory: Path) -> None:
        wrapped = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1
        wrapped.save_pretrained(directory, save_embedding_layers=False)

    return make


QV = ("q_proj", "v_proj")
BOTH = ("embed_tokens", "lm_head")
ONE = ("gemma3_text",)
KEY = "base_model.model."
STRAY = keys(trained(), lambda own: {**own, f"{KEY}model.stranger.weight": torch.ones(2)})
NAMED = keys(
    trained(), lambda own: {**own, f"{KEY}model.layers.0.self_attn.q_proj.lora_A.other.weight": torch.ones(4, 16)}
)
DOUBLED = keys(trained(), lambda own: {**own, **{k.replace(f"{KEY}model.", KEY): v.clone() for k, v in own.items()}})
TOKENS_AND_HEAD = "unsupported_tokens_beside_head"
ROWS = (
    Row("LoRA", trained()),
    Row("LoRA, ranks and alphas by pattern", trained(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3})),
    Row("LoRA, rank-stabilised", trained(*QV, use_rslora=True)),
    Row("layers_to_transform", listed(*QV, layers_to_transform=[1]), TEXT_ONLY),
    Row("exclude_modules", listed(*QV, exclude_modules=["layers.0.self_attn.q_proj"]), TEXT_ONLY),
    Row("DoRA", trained(*QV, use_dora=True)),
    Row("modules_to_save: norms", trained(*QV, modules_to_save=["input_layernorm"])),
    Row("modules_to_save: embed_tokens", trained(*QV, modules_to_save=["embed_tokens"])),
    Row("modules_to_save: lm_head", trained(*QV, modules_to_save=["lm_head"])),
    Row("modules_to_save: both", trained(*QV, modules_to_save=[*BOTH])),
    Row("modules_to_save: both, tied", trained(*QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    Row("LoRA on embed_tokens", trained("q_proj", "embed_tokens")),
    Row("LoRA on lm_head", trained("q_proj", "lm_head")),
    Row("LoRA on both", trained("q_proj", *BOTH)),
    Row("LoRA on both, tied", trained("q_proj", *BOTH, ensure_weight_tying=True)),
    Row("DoRA on embed_tokens", trained("q_proj", "embed_tokens", use_dora=True)),
    Row("DoRA on lm_head", trained("q_proj", "lm_head", use_dora=True)),
    Row("LoRA on embed_tokens_per_layer", trained("q_proj", "embed_tokens_per_layer"), PER_LAYER),
    Row("trainable_token_indices", trained(*QV, trainable_token_indices=[22, 3, 25])),
    Row(
        "target_parameters: both stacks",
        trained("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        ("gemma4_moe",),
    ),
    Row("target_parameters: one", trained("q_proj", target_parameters=["experts.down_proj"]), ("gemma4_moe",)),
    Row("lora_bias, base with biases", vision(*QV, lora_bias=True), SIGLIP),
    Row("lora_bias, base without", trained(*QV, lora_bias=True), ONE, "adapter_bias_without_base_bias"),
    Row("bias: all", vision(*QV, bias="all"), SIGLIP),
    Row("bias: lora_only", vision(*QV, bias="lora_only"), SIGLIP),
    Row("init: gaussian", trained(*QV, init_lora_weights="gaussian"), ONE),
    Row("init: orthogonal", trained(*QV, init_lora_weights="orthogonal"), ONE),
    Row("init: eva", trained(*QV, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)), ONE),
    Row("init: pissa", trained(*QV, init_lora_weights="pissa"), ONE, "adapter_base_mutated"),
    Row("init: pissa_niter_4", trained(*QV, init_lora_weights="pissa_niter_4"), ONE, "adapter_base_mutated"),
    Row("init: olora", trained(*QV, init_lora_weights="olora"), ONE, "adapter_base_mutated"),
    Row("init: corda", settings(trained(*QV), init_lora_weights="corda"), ONE, "adapter_base_mutated"),
    Row("init: loftq", settings(trained(*QV), init_lora_weights="loftq"), ONE, "adapter_base_mutated"),
    Row(
        "tokens and a pair on lm_head", trained("q_proj", "lm_head", trainable_token_indices=[22]), ONE, TOKENS_AND_HEAD
    ),
    Row("init: lora_ga", settings(trained(*QV), init_lora_weights="lora_ga"), ONE, "adapter_base_mutated"),
    Row("layer_replication", trained(*QV, layer_replication=[(0, 2), (1, 2)]), ONE, "adapter_layer_replication"),
    Row("use_qalora", settings(trained(*QV), use_qalora=True), ONE, "adapter_qalora"),
    Row("megatron_config", settings(trained(*QV), megatron_config={"a": 1}), ONE, "unsupported_megatron_config"),
    Row("alora", trained(*QV, alora_invocation_tokens=[5]), ONE, "adapter_alora_invocation_tokens"),
    Row("bdlora", settings(trained(*QV), use_bdlora={"nblocks": 2}), ONE, "unsupported_use_bdlora"),
    Row("a resized vocabulary", trained(), EVERY, judge=resized),
    Row("a quantized base without a twin", trained(), EVERY, "base_quantized", judge=packed),
    Row("a base with a quantization's leftover", trained(), EVERY, judge=leftover),
    Row("a full fine-tune", trained(), EVERY, judge=whole),
    Row("an unknown tensor", STRAY, TEXT_ONLY, "adapter_unknown_tensor"),
    Row("a second adapter's keys", NAMED, TEXT_ONLY, "adapter_unknown_tensor"),
    Row("one target by two names", DOUBLED, TEXT_ONLY, "adapter_duplicate_target"),
    Row("LoHa", of_type(peft.LoHaConfig(r=2, target_modules=[*QV])), ONE, "unsupported_peft_type_loha"),
    Row("LoKr", of_type(peft.LoKrConfig(r=2, target_modules=[*QV])), ONE, "unsupported_peft_type_lokr"),
    Row("OFT", of_type(peft.OFTConfig(r=0, oft_block_size=4, target_modules=[*QV])), ONE, "unsupported_peft_type_oft"),
    Row(
        "IA3",
        of_type(peft.IA3Config(target_modules=[*QV], feedforward_modules=[])),
        ONE,
        "unsupported_peft_type_ia3",
    ),
    Row("VeRA", of_type(peft.VeraConfig(r=2, target_modules=["o_proj"])), ONE, "unsupported_peft_type_vera"),
    Row(
        "AdaLoRA",
        of_type(peft.AdaLoraConfig(init_r=2, target_modules=[*QV], total_step=10, tinit=1, tfinal=1)),
        ONE,
        "unsupported_peft_type_adalora",
    ),
    Row(
        "prompt tuning",
        of_type(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        ONE,
        "adapter_nothing_to_merge",
    ),
    Row(
        "prefix tuning",
        of_type(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        ONE,
        "adapter_nothing_to_merge",
    ),
)


def cell(row: Row, family: str, place: Path) -> Cell:
    """Export one adapter in float32 and in bfloat16, and compare with the unmerged model and with float64.

    Raises:
        AssertionError: It was exported, and is not right.
    """
    if row.judge is not None:
        return row.judge(family, place)
    layout = FAMILIES[family].layouts[0]
    for dtype in (torch.float32, torch.bfloat16):
        here = place / str(dtype).removeprefix("torch.")
        row.make(family, save_base(family, here / "base", dtype=dtype, layout=layout), here / "adapter")
    try:
        exact = export(place / "float32" / "base", place / "float32" / "adapter", place / "float32" / "store")
        rounded = export(place / "bfloat16" / "base", place / "bfloat16" / "adapter", place / "bfloat16" / "store")
    except ExportError as error:
        return Cell(error.error_code)
    logits = _compare_logits(place / "float32", exact)
    ours, pefts, total = _count_rounded(place / "bfloat16", rounded)
    return Cell(RIGHT, logits, ours, pefts, total, rounded.summary)


def _unmerged(place: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(load_model(place / "base"), place / "adapter")


def _compare_logits(place: Path, result: Result) -> float:
    merged = text_logits(load_model(path_of(result.artifact.uri)))
    wanted = text_logits(_unmerged(place))
    assert not torch.equal(wanted, text_logits(load_model(place / "base"))) or not _is_of_language(place)
    error = float((merged - wanted).abs().max())
    assert error <= TOLERANCE * max(1.0, float(wanted.abs().max())), f"logits differ by {error}"
    return error


def _is_of_language(place: Path) -> bool:
    names = file_tensors(place / "adapter")
    return any("vision" not in name and "projector" not in name for name in names)


def _count_rounded(place: Path, result: Result) -> tuple[int, int, int]:
    """Of the values that changed, how many are the float64 ones rounded once: ours, PEFT's, and of how many."""
    merged = model_tensors(load_model(path_of(result.artifact.uri)))
    exact = exact_merge(_unmerged(place))
    pefts = model_tensors(_unmerged(place).merge_and_unload())
    base = model_tensors(load_model(place / "base"))
    here, in_peft, total = 0, 0, 0
    for name, wanted in exact.items():
        best = wanted.to(merged[name].dtype)
        if torch.equal(best, base[name]):
            assert torch.equal(merged[name], base[name]), f"{name} changed"
            continue
        error = (merged[name].double() - wanted).abs()
        assert (error <= wanted.abs() * 2.0**-8 * 1.01 + 1e-30).all(), f"{name} is off by {float(error.max())}"
        here += int((merged[name] == best).sum())
        in_peft += int((pefts[name] == best).sum())
        total += best.numel()
    return here, in_peft, total


def _judged(row: Row, family: str, place: Path) -> Cell:
    try:
        return cell(row, family, place)
    except AssertionError as error:
        return Cell(f"WRONG: {error}")


def table(rows: tuple[Row, ...]) -> str:
    """The matrix as Markdown."""
    lines = ["| feature | family | outcome | logits off by | rounded right: here | in PEFT | of |", "|---" * 7 + "|"]
    for row in rows:
        for family in row.families:
            with tempfile.TemporaryDirectory() as place:
                found = _judged(row, family, Path(place))
            numbers = f"{found.logits:.1e} | {found.rounded_here} | {found.rounded_in_peft} | {found.of}"
            lines.append(f"| {row.name} | {family} | {found.outcome} | {numbers if found.of else ' | | | '} |")
            print(lines[-1], file=sys.stderr, flush=True)  # noqa: T201  # it takes minutes
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    wanted = tuple(row for row in ROWS if not sys.argv[1:] or row.name in sys.argv[1:])
    print(table(wanted))  # noqa: T201  # the table is what it is for
