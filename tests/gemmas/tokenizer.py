"""The tiny models' tokenizer: the demo's, trained once a process and written wherever a base is."""

import tempfile
from functools import cache
from pathlib import Path

from exporter import demo

VOCABULARY = 320
IMAGE_TOKEN_ID = 9
SYMBOLS = ("<start_of_audio>", "<end_of_audio>", "<audio_soft_token>", "<|video|>", "<image>")
"""What multimodal families have besides; the last is PaliGemma's image token."""
PALIGEMMA_IMAGE_TOKEN_ID = IMAGE_TOKEN_ID + len(SYMBOLS)
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "small models are easy to carry around",
    "a model answers when it is asked",
    "bring me the lantern and the map",
    "rivers run slowly through the valley",
)


def save_tokenizer(directory: Path) -> None:
    """Write `tokenizer.model`, `tokenizer.json`, their configuration and the chat template."""
    for name, content in _files().items():
        (directory / name).write_bytes(content)


@cache
def _files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as directory:
        demo.save_tokenizer(Path(directory), SENTENCES, VOCABULARY, SYMBOLS)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}
