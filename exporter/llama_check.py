"""Whether a finished GGUF works: llama.cpp loads it, reads text as the tokenizer does, and says what the model says.

llama.cpp runs in a process of its own (`exporter.llama_run`); here its answers are compared with those of transformers.
"""

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dispatcher.errors import VerificationFailed
from exporter.child import environment, run_child
from exporter.llama_corpus import CONVERSATIONS, LINES, PROMPT
from exporter.llama_run import Answer, Request
from exporter.llama_text import Text
from exporter.logits import logits_of, rms, rounded
from exporter.models import library_errors, quiet
from exporter.scratch import scratch_directory

log = logging.getLogger(__name__)
PROGRAM = (sys.executable, "-P", "-m", "exporter.llama_run")
SECONDS = 600
BYTES_PER_SECOND = 20 << 20
"""How long llama.cpp may take: for itself, and for reading a file from a slow disk."""
PROMPT_TOKENS = 24
LIMITS = {
    "f32": 0.01,
    "f16": 0.01,
    "bf16": 0.03,
    "q8_0": 0.1,
    "q6_k": 0.2,
    "q5_k_m": 0.4,
    "q5_k_s": 0.4,
    "q5_0": 0.4,
    "q4_k_m": 0.5,
    "q4_k_s": 0.5,
    "iq4_nl": 0.6,
    "iq4_xs": 0.6,
    "q4_0": 0.7,
    "q3_k_l": 0.8,
    "q3_k_m": 0.8,
    "q3_k_s": 1.0,
    "q2_k": 1.2,
}
"""How far a file's logits may be from its model's, as a part of these, root mean squares: about twice what tiny models
of random weights show, or more. They are the worst case, since in them there is nothing but noise to be lost. Up to
q6_k an adapter that was not applied, or twice, is further away than that, unless it changes next to nothing. From q4 on
only one that changes most of what the model says is; from q3 on (logits that have nothing to do with each other are 1.4
away) the limit tells another model's file, and no more."""
OF_EXPERTS = 2.0
"""How much further a model with experts may be: a token on the edge between two of them goes to the other."""
Weights = Callable[[], Iterator[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class LlamaCheck:
    """What was found; a difference is no result, it is raised."""

    verified: dict[str, Any]
    """The same wherever the same file is checked: for the manifest's `verified`."""
    loaded: str
    """`whole`, or `vocabulary`: that depends on the memory budget"""
    logits: dict[str, Any]
    """Sums in float32, which differ between machines: for the manifest's `run`."""


def check_gguf(
    path: Path,
    model_dir: Path,
    config: Mapping[str, Any],
    quantization: str,
    *,
    weights: Weights | None,
    memory_budget: int,
    while_waiting: Callable[[], None] = lambda: None,
    seconds: float | None = None,
) -> LlamaCheck:
    """Run a finished GGUF in llama.cpp and compare it with the model that it was made of.

    Args:
        path: The file, local.
        model_dir: The model's config.json, tokenizer files and chat template; needs no weights.
        config: The parsed config.json.
        quantization: One of the contract's `QUANTIZATIONS`: which limit the logits have.
        weights: The model's tensors by checkpoint name, in any dtype; None where they do not fit the budget.
        memory_budget: Bytes; a larger file is loaded without its weights.
        while_waiting: Called now and then; what it raises stops the work.
        seconds: How long llama.cpp may take, instead of what the file's size allows.

    Raises:
        VerificationFailed: `gguf_not_loadable`, `gguf_tokens_differ`, `gguf_template_differs`, `gguf_logits_differ`;
            `output_not_loadable` where transformers does not load the tokenizer.
        SourceError: As `chat_template.render`; `side_file_invalid`.
    """
    text = Text(model_dir, config)
    size = path.stat().st_size
    whole = size <= memory_budget
    reason = _why_not_compared(config, whole, weights)
    prompt = text.ids(PROMPT, add=True)[:PROMPT_TOKENS]
    request: Request = {
        "path": str(path.absolute()),
        "whole": whole,
        "plain": list(LINES),
        "special": text.lines(),
        "conversations": list(CONVERSATIONS),
        "prompt": [] if reason else prompt,
    }
    # First, and within limits: what is rendered there is bounded by the time that llama.cpp has alone.
    rendered = text.render(while_waiting=while_waiting)
    answer, found = _asked(request, path.name, seconds or SECONDS + size / BYTES_PER_SECOND, while_waiting)
    loaded = "whole" if whole else "vocabulary"
    verified = {**text.compare_tokens(answer), **text.compare_template(answer, rendered)}
    if reason or weights is None:
        return LlamaCheck(verified, loaded, {"compared": False, "why": reason})
    return LlamaCheck(verified, loaded, _compare_logits(found, config, prompt, weights, limit_of(config, quantization)))


def limit_of(config: Mapping[str, Any], quantization: str) -> float:
    """How far a file's logits may be from its model's, see `LIMITS`."""
    has_experts = bool((config.get("text_config") or config).get("enable_moe_block"))
    return LIMITS[quantization] * (OF_EXPERTS if has_experts else 1)


def _why_not_compared(config: Mapping[str, Any], whole: bool, weights: Weights | None) -> str | None:
    if not whole:
        return "the file is larger than the memory budget"
    if weights is None:
        return "the weights do not fit the memory budget"
    if str(config.get("model_type")).startswith("gemma3n"):
        # https://github.com/ggml-org/llama.cpp/blob/master/src/models/gemma3n.cpp, `gaussian_topk`: it divides by n - 1
        # where transformers divides by n, and what is cut off there decides what ten layers pass on.
        return "llama.cpp cuts off the activations of Gemma 3n elsewhere than transformers"
    return None


def _asked(
    request: Request, name: str, seconds: float, while_waiting: Callable[[], None]
) -> tuple[Answer, torch.Tensor]:
    """The child's answer, and its logits: float32, [prompt, vocabulary], or empty.

    Raises:
        VerificationFailed: `gguf_not_loadable`: llama.cpp says no, dies, or takes too long.
    """
    with scratch_directory() as place:
        (place / "request.json").write_text(json.dumps(request))
        # Else an abort starts a debugger, if there is one, to print where it was.
        surroundings = environment(GGML_NO_BACKTRACE="1")
        status = run_child(
            [*PROGRAM, str(place)], place, environment=surroundings, while_waiting=while_waiting, seconds=seconds
        )
        said = (place / "log").read_text(errors="replace")
        if status is None:
            raise _not_loadable(f"llama.cpp takes longer than {seconds:.0f} s with {name}", said)
        if status != 0:
            how = f"dies of {signal.Signals(-status).name}" if status < 0 else f"ends with {status}"
            raise _not_loadable(f"llama.cpp {how} at {name}", said)
        answer: Answer = json.loads((place / "answer.json").read_text())
        if "error" in answer:
            raise _not_loadable(f"llama.cpp does not load {name}", answer["error"])
        if "logits" not in answer:
            return answer, torch.empty(0)
        raw = bytearray((place / "logits.f32").read_bytes())
        return answer, torch.frombuffer(raw, dtype=torch.float32).view(answer["logits"])


def _not_loadable(what: str, said: str) -> VerificationFailed:
    last = [line.strip() for line in said.splitlines() if line.strip()][-3:]
    return VerificationFailed(f"{what}: {'; '.join(last)[-1000:] or 'it says nothing'}", code="gguf_not_loadable")


def _compare_logits(
    found: torch.Tensor, config: Mapping[str, Any], prompt: Sequence[int], weights: Weights, limit: float
) -> dict[str, Any]:
    """How far the logits are from those of the weights in float32, as a part of these.

    Each token's mean is taken off first, which softmax does not see.

    Raises:
        VerificationFailed: `gguf_logits_differ`.
    """
    try:
        with quiet(), torch.inference_mode():
            expected = _reference(config, prompt, weights)
    except library_errors() as error:
        # A vision tower that needs timm, say: nothing of the file.
        log.warning("the logits are not compared: %s: %s", type(error).__name__, error)
        return {"compared": False, "why": f"{type(error).__name__} in transformers"}
    columns = min(found.shape[-1], expected.shape[-1])
    found, expected = (
        logits[:, :columns].double() - logits[:, :columns].double().mean(dim=1, keepdim=True)
        for logits in (found, expected)
    )
    difference = rms(found - expected) / rms(expected)
    if not difference <= limit:
        raise VerificationFailed(
            f"the file's logits are {difference:.3g} of their size from the model's (root mean square); "
            f"the limit is {limit:.3g}.",
            code="gguf_logits_differ",
        )
    return {
        "compared": True,
        "tokens": len(prompt),
        "relative_rms_difference": rounded(difference),
        "relative_rms_limit": rounded(limit),
    }


def _reference(config: Mapping[str, Any], prompt: Sequence[int], weights: Weights) -> torch.Tensor:
    """The model's own logits, float32, [prompt, vocabulary]."""
    import transformers

    known = transformers.CONFIG_MAPPING[str(config["model_type"])].from_dict(dict(config))
    kind = getattr(transformers, str(config["architectures"][0]))
    model, loading = kind.from_pretrained(
        None,
        config=known,
        state_dict=dict(weights()),
        dtype=torch.float32,
        # The one that knows a cap on the logits of attention.
        attn_implementation="eager",
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"transformers finds no weights for {missing[:3]}")
    return logits_of(model.eval(), dict(config), prompt)[0]
