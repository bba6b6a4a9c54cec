"""The multimodal families' processor files, in the form in which the hub has each: built with the real classes.

The older families have `preprocessor_config.json` beside a short `processor_config.json`; from Gemma 3n on, one nested
`processor_config.json` holds all. Gemma 4's video processor, and the unified family's image processor, can only be
built where torchvision is; their parts of the file are written as the library would.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from tests.gemmas.tokenizer import save_tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}IMAGE{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
}
SIZE = {"height": 8, "width": 8}
VIDEO = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_sample_frames": True,
    "max_soft_tokens": 70,
    "num_frames": 32,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "return_metadata": False,
}


def save_processor(family: str, directory: Path) -> None:
    """Write a multimodal family's tokenizer, chat template and processor files."""
    for name, content in _files(family).items():
        (directory / name).write_bytes(content)


@cache
def _files(family: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="processor-") as scratch:
        directory = Path(scratch)
        save_tokenizer(directory)
        if family == "paligemma":
            (directory / "chat_template.jinja").unlink()  # as on the hub: it captions, and does not chat
        else:
            placeholder = TOKENS["boi_token" if family in ("gemma3", "shieldgemma2") else "image_token"]
            (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("IMAGE", placeholder))
            fields = json.loads((directory / "tokenizer_config.json").read_text())
            (directory / "tokenizer_config.json").write_text(json.dumps({**fields, **TOKENS}, indent=2))
        _SAVE[family](directory)
        return {path.name: path.read_bytes() for path in directory.iterdir()}


def _save_split(directory: Path, image_processor: Any, processor: dict[str, Any]) -> None:
    image_processor.save_pretrained(directory)
    _write(directory, processor)


def _write(directory: Path, processor: dict[str, Any]) -> None:
    (directory / "processor_config.json").write_text(json.dumps(processor, indent=2))


def _fields(part: Any) -> dict[str, Any]:
    """What the library writes of a processor or of a part of one."""
    fields: dict[str, Any] = json.loads(part.to_json_string())
    return fields


def _gemma3(directory: Path) -> None:
    _save_split(
        directory,
        transformers.Gemma3ImageProcessorPil(size=SIZE),
        {"image_seq_length": 1, "processor_class": "Gemma3Processor"},
    )


def _shieldgemma2(directory: Path) -> None:
    _save_split(
        directory,
        transformers.Gemma3ImageProcessorPil(size=SIZE),
        {"image_seq_length": 1, "processor_class": "ShieldGemma2Processor"},
    )


def _paligemma(directory: Path) -> None:
    image_processor = transformers.SiglipImageProcessorPil(size=SIZE, image_seq_length=4)
    _save_split(directory, image_processor, {"processor_class": "PaliGemmaProcessor"})


def _gemma3n(directory: Path) -> None:
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(),
        transformers.SiglipImageProcessorPil(size=SIZE),
        transformers.AutoTokenizer.from_pretrained(directory),
        image_seq_length=4,
    )
    _write(directory, _fields(processor))


def _gemma4(directory: Path) -> None:
    image = transformers.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    _write(
        directory,
        {
            "audio_ms_per_token": 40,
            "audio_seq_length": 750,
            "feature_extractor": _fields(transformers.Gemma4AudioFeatureExtractor()),
            "image_processor": _fields(image),
            "image_seq_length": 70,
            "processor_class": "Gemma4Processor",
            "video_processor": {**VIDEO, "video_processor_type": "Gemma4VideoProcessor"},
        },
    )


def _gemma4_unified(directory: Path) -> None:
    image = {**VIDEO, "image_processor_type": "Gemma4UnifiedImageProcessor"}
    for name in ("do_sample_frames", "num_frames", "return_metadata"):
        image.pop(name)
    _write(
        directory,
        {
            "audio_ms_per_token": 40,
            "audio_seq_length": 750,
            "feature_extractor": _fields(transformers.Gemma4UnifiedAudioFeatureExtractor()),
            "image_processor": image,
            "image_seq_length": 70,
            "processor_class": "Gemma4UnifiedProcessor",
            "video_processor": {**VIDEO, "video_processor_type": "Gemma4UnifiedVideoProcessor"},
        },
    )


_SAVE = {
    "gemma3": _gemma3,
    "shieldgemma2": _shieldgemma2,
    "paligemma": _paligemma,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4_unified,
}
