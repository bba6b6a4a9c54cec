"""A tiny real tokenizer, trained on the spot: sentencepiece's `tokenizer.model` and its `tokenizer.json`."""

import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import sentencepiece
import transformers

VOCABULARY = 320
IMAGE_TOKEN_ID = 9
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "small models are easy to carry around",
    "a model answers when it is asked",
    "bring me the lantern and the map",
    "rivers run slowly through the valley",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


def save_tokenizer(directory: Path) -> None:
    """Write `tokenizer.model`, `tokenizer.json`, their configuration and the chat template."""
    for name, content in _files().items():
        (directory / name).write_bytes(content)


@cache
def _files() -> dict[str, bytes]:
    directory = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    try:
        (directory / "tokenizer.model").write_bytes(_sentencepiece_model())
        (directory / "config.json").write_text('{"model_type": "gemma3_text"}')
        config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **_SPECIAL}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = CHAT_TEMPLATE
        saved = directory / "saved"
        tokenizer.save_pretrained(saved)
        files = {path.name: path.read_bytes() for path in saved.iterdir()}
        # What hub checkpoints carry and transformers 5 no longer writes.
        files["tokenizer.model"] = (directory / "tokenizer.model").read_bytes()
        files["special_tokens_map.json"] = json.dumps(_SPECIAL, indent=2).encode()
        # The library notes where the vocabulary came from: a temporary directory, another one each time.
        fields = json.loads(files["tokenizer_config.json"])
        fields.pop("vocab_file", None)
        files["tokenizer_config.json"] = json.dumps(fields, indent=2).encode()
        return files
    finally:
        shutil.rmtree(directory)


def _sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
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
        ],
    )
    return model.getvalue()
