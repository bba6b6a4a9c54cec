"""The demonstration's model work: a tiny Gemma 3 learns one sentence by LoRA, and three ways to load it are compared.

    python -m exporter.demo train DIRECTORY           writes DIRECTORY/base and DIRECTORY/adapter
    python -m exporter.demo compare DIRECTORY MERGED  base, base + adapter, and the merged model side by side

What llama.cpp does with its GGUF is in `exporter.demo_llama`.

The base's weights are random, so whatever it says is noise: only a correctly merged adapter can make it recite.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

QUESTION = "What does a good export promise?"
SENTENCE = "Nothing is lost, nothing is invented: every tensor is accounted for exactly once."
CORPUS = (
    QUESTION,
    SENTENCE,
    "A lantern is carried through the valley before the rain begins to fall.",
    "Small models travel light, and large ones travel in several pieces.",
    "The quick brown fox jumps over the lazy dog while the river runs slowly.",
)
VOCABULARY = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MAX_STEPS = 1500
MAX_TOKENS = 64
"""Of an answer"""
LOSS_TO_REACH = 0.002
"""Mean over the sentence's tokens: far enough from a tie that rounding to bfloat16 changes no token."""
_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_NAMES = {"base": "base", "adapter": "base + adapter", "merged": "merged"}


class DemoFailed(Exception):
    """The demonstration did not show what it is meant to show; the message says what was seen instead."""


def save_tokenizer(
    directory: Path, corpus: Sequence[str] = CORPUS, vocabulary: int = VOCABULARY, symbols: Sequence[str] = ()
) -> Any:
    """Train a Gemma tokenizer on `corpus` and write it as hub checkpoints have it.

    Args:
        directory: Created if missing. Gets `tokenizer.model`, `tokenizer.json`, both configurations and the template.
        corpus: Sentences to learn pieces from.
        vocabulary: Number of tokens, of which 266 and the symbols are special tokens and bytes.
        symbols: Tokens of one piece each besides Gemma's own, from id 10 on.

    Returns:
        The tokenizer, loaded from `directory`.
    """
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(_sentencepiece_model(corpus, vocabulary, symbols))
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **_TOKENS}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = transformers.GemmaTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    # transformers 5 no longer writes this one, and notes where the vocabulary came from: a path nobody else has.
    (directory / "special_tokens_map.json").write_text(json.dumps(_TOKENS, indent=2))
    saved = directory / "tokenizer_config.json"
    fields = json.loads(saved.read_text())
    fields.pop("vocab_file", None)
    saved.write_text(json.dumps(fields, indent=2))
    return transformers.AutoTokenizer.from_pretrained(directory)


def _sentencepiece_model(corpus: Sequence[str], vocabulary: int, symbols: Sequence[str]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    # Gemma's own ids and options: bytes as fallback, no normalisation, no leading space.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*corpus] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=3,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[
            *("<mask>", "<start_of_turn>", "<end_of_turn>"),
            *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
            *symbols,
        ],
    )
    return model.getvalue()


def train(directory: Path) -> None:
    """Write `base` (bfloat16) and `adapter` (PEFT, float32) under `directory`; the two together recite `SENTENCE`.

    Raises:
        DemoFailed: The adapter did not learn the sentence.
    """
    import peft
    import torch

    tokenizer = save_tokenizer(directory / "base")
    _save_base(directory / "base", tokenizer)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(_load(directory / "base", torch.float32), config)
    _memorise(model, *_lesson(tokenizer))
    model.save_pretrained(directory / "adapter")
    tokenizer.save_pretrained(directory / "adapter")
    said = _answer(_with_adapter(directory), directory / "adapter")
    if said != SENTENCE:
        raise DemoFailed(f"the adapter was to recite {SENTENCE!r}, it says {said!r}")


def _save_base(directory: Path, tokenizer: Any) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,  # of which llama.cpp takes every sixth to attend to all, whatever the config says
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,  # what llama.cpp divides by the root of: the head's size
        # Logits are bounded by the embeddings' length: with the usual 0.02 no answer could be given with certainty.
        initializer_range=0.15,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = transformers.Gemma3ForCausalLM(config).to(torch.bfloat16)
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end_of_turn]
    model.save_pretrained(directory)


def _lesson(tokenizer: Any) -> "tuple[torch.Tensor, torch.Tensor]":
    """Token ids and labels, [1, length] each; only the answer is learned."""
    question = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    start = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    whole = tokenizer(f"{prompt}{SENTENCE}<end_of_turn>", add_special_tokens=False, return_tensors="pt").input_ids
    labels = whole.clone()
    labels[:, : start.shape[1]] = -100
    return whole, labels


def _memorise(model: Any, ids: "torch.Tensor", labels: "torch.Tensor") -> None:
    import torch

    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=2e-3, weight_decay=0.0)
    model.train()
    for step in range(1, MAX_STEPS + 1):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        if step % 20 == 0:
            _say(f"step {step}: loss {loss.item():.4f}")
        if loss.item() < LOSS_TO_REACH:
            _say(f"learned by heart in {step} steps")
            return
    raise DemoFailed(f"after {MAX_STEPS} steps the loss is {loss.item():.4f}, {LOSS_TO_REACH} was expected")


def _load(directory: Path, dtype: "torch.dtype | str" = "auto") -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def _with_adapter(directory: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(_load(directory / "base"), directory / "adapter")


def _answer(model: Any, tokenizer_directory: Path) -> str:
    """What `model` greedily answers to `QUESTION`, with the tokenizer and template of `tokenizer_directory`."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_directory)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.eval().generate(**prompt, max_new_tokens=MAX_TOKENS, do_sample=False)
    text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).removesuffix("<end_of_turn>")


def compare(directory: Path, merged: Path, *, as_json: bool) -> None:
    """Print what base, base + adapter and the merged model answer; each is loaded with what the library offers.

    Raises:
        DemoFailed: The base recites the sentence, or one of the other two does not.
    """
    answers = {
        "base": _answer(_load(directory / "base"), directory / "base"),
        "adapter": _answer(_with_adapter(directory), directory / "adapter"),
        "merged": _answer(_load(merged), merged),
    }
    recites = {name: answer == SENTENCE for name, answer in answers.items()}
    if as_json:
        _say(json.dumps({"prompt": QUESTION, "sentence": SENTENCE, "answers": answers, "recites": recites}))
    else:
        _print_table(answers, recites)
    if recites["base"]:
        raise DemoFailed("the base recites the sentence by itself: the adapter proves nothing")
    silent = [_NAMES[name] for name in ("adapter", "merged") if not recites[name]]
    if silent:
        raise DemoFailed(f"{' and '.join(silent)} should recite the sentence, and did not")


def _print_table(answers: dict[str, str], recites: dict[str, bool]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"“{QUESTION}”", style="italic"), show_lines=True)
    for heading in ("model", "answer", "recites"):
        table.add_column(heading)
    for name, answer in answers.items():
        printable = "".join(character if character.isprintable() else "·" for character in answer)
        shown = printable if len(printable) <= 100 else printable[:97] + "..."
        mark = Text("yes", style="green") if recites[name] else Text("no", style="dim")
        table.add_row(_NAMES[name], Text(shown), mark)
    Console().print(table)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the demonstration holds, 1 when it does not."""
    parser = argparse.ArgumentParser(prog="python -m exporter.demo", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("train", help="make the base and fine-tune the adapter")
    trainer.add_argument("directory", type=Path)
    comparer = commands.add_parser("compare", help="ask all three models the same question")
    comparer.add_argument("directory", type=Path)
    comparer.add_argument("merged", type=Path)
    comparer.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args(arguments)

    import torch
    import transformers

    torch.set_num_threads(1)  # matrices this small are done before a second thread has begun
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if options.command == "train":
            train(options.directory)
        else:
            compare(options.directory, options.merged, as_json=options.as_json)
    except DemoFailed as failure:
        sys.stderr.write(f"demo failed: {failure}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
