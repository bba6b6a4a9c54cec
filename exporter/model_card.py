"""The model card, `README.md` of a merged artifact: what it was made from, what was verified, how to load it.

A pure function of facts that the manifest also has, without a date, so that the same export has the same bytes. The
front matter is what the hub reads. Source: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.architecture import use_of
from exporter.gemma import FAMILIES, LEGACY_TEMPLATE_FILE, PROCESSOR_FILES, TEMPLATE_FILE
from exporter.markdown import last_part, slug, table

CARD_NAME = "README.md"
PATH = "path/to/this/directory"
"""What stands in the snippets for where the model lies."""
IMAGE = "path/to/image.png"
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
DIRECTORY = "directory:"
"""How the revision of a base begins that is not on the hub; a relative path may look like an id."""
CLASS_NAME = re.compile(r"[A-Za-z0-9_]{1,80}")


@dataclass(frozen=True)
class CardFacts:
    """What a model card is made of."""

    base_id: str
    """A hub id; or a directory, of which only the last part is told"""
    base_revision: str
    trained_fingerprint: str
    """Of the adapter, or of the whole model in its place"""
    is_merged: bool
    """Whether it is an adapter that was merged; otherwise a whole model, passed on as it was trained"""
    engine: str
    engine_version: str
    config: Mapping[str, Any]
    """What the model's config.json says; its `model_type` is a key of `FAMILIES`"""
    tensors: Mapping[str, Any]
    verified: Mapping[str, Any]
    files: frozenset[str]
    """The names of all other files of the artifact"""

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def architecture(self) -> str:
        """The class that config.json names, or else the family's own."""
        declared = self.config.get("architectures")
        match declared:
            case [str(name)] if CLASS_NAME.fullmatch(name):
                return name
            case _:
                return FAMILIES[self.model_type].architecture


def model_card(facts: CardFacts) -> str:
    """The text of `README.md`; whatever comes from outside is cleaned so that it can break neither YAML nor Markdown.

    Raises:
        KeyError: `model_type` is not in `FAMILIES`.
    """
    parts = [
        front_matter(
            facts,
            library="transformers",
            pipeline_tag=use_of(facts.architecture).pipeline_tag,
            tags=["lora", "merged"] if facts.is_merged else [],
        ),
        f"# {name_of(facts)}",
        _MERGED if facts.is_merged else _WHOLE,
        provenance(facts),
        "## Tensors",
        table(facts.tensors),
        "## Verified",
        "Before it was published, on the written files:",
        table(facts.verified),
        "`export.json` beside this file lists every file with its size and checksum.",
        *_usage(facts),
        licence(facts),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: CardFacts, *, library: str, pipeline_tag: str, tags: Sequence[str]) -> str:
    """What the hub reads; the tags of the family are added.

    Raises:
        KeyError: `model_type` is not in `FAMILIES`.
    """
    terms = FAMILIES[facts.model_type].license
    lines = ["---", f"library_name: {library}", f"license: {terms.tag}"]
    if terms.tag != "gemma":
        lines.append(f"license_link: {terms.link}")
    if is_on_hub(facts):
        # Quoted: an id may read as a number or as `no`.
        lines += [f"base_model: {json.dumps(facts.base_id)}", "base_model_relation: finetune"]
    lines += [f"pipeline_tag: {pipeline_tag}", "tags:"]
    lines += [f"- {tag}" for tag in ("gemma", facts.model_type, *tags, "gemma-export")]
    return "\n".join([*lines, "---"])


def licence(facts: CardFacts, *, change: str = "") -> str:
    """The section of the licence, with the notice of modification that it asks for; `change` says what else was done.

    Raises:
        KeyError: `model_type` is not in `FAMILIES`.
    """
    terms = FAMILIES[facts.model_type].license
    done = f"{_CHANGED[facts.is_merged]}{change}"
    return "\n\n".join(
        [
            "## Licence",
            f"[{terms.name}]({terms.link}). {terms.duties}",
            f"Notice of modification: the weights were changed from the base's by {done}.",
        ]
    )


def provenance(facts: CardFacts, **more: str) -> str:
    """The table of what the model was made from; `more` are rows of the caller's own."""
    base = facts.base_id if is_on_hub(facts) else f"{last_part(facts.base_id)} (a directory)"
    return table(
        {
            "base model": base,
            "revision": facts.base_revision,
            f"{'adapter' if facts.is_merged else 'model'} fingerprint": facts.trained_fingerprint,
            "engine": f"{facts.engine} {facts.engine_version}",
            "class": facts.architecture,
            **more,
        }
    )


def is_on_hub(facts: CardFacts) -> bool:
    """Whether the base is one of the hub's, and not a directory whose path looks like an id."""
    return HUB_ID.fullmatch(facts.base_id) is not None and not facts.base_revision.startswith(DIRECTORY)


def name_of(facts: CardFacts) -> str:
    """A name for the model, safe as a heading and as a shell word."""
    return f"{slug(facts.base_id)}-{'merged' if facts.is_merged else 'fine-tuned'}"


def _usage(facts: CardFacts) -> list[str]:
    use = use_of(facts.architecture)
    has_template = TEMPLATE_FILE in facts.files
    parts = ["## With transformers"]
    if use.pipeline_tag == "text-generation" or (use.pipeline_tag == "image-text-to-text" and has_template):
        if not facts.architecture.endswith("ForImageClassification"):
            parts.append(_python(_TEXT_CHAT if has_template else _TEXT, use.auto_class))
    elif use.pipeline_tag != "image-text-to-text":
        parts.append(_python(_ENCODE, use.auto_class))
    if use.pipeline_tag == "image-text-to-text" and PROCESSOR_FILES & facts.files:
        parts += ["With an image (needs `pillow` and `torchvision`):", _python(_image(facts), use.auto_class)]
    if facts.model_type == "gemma3n":
        parts.append("Its vision tower is one of `timm`'s, which has to be installed.")
    return [*parts, "## With vLLM", _vllm(facts)]


def _image(facts: CardFacts) -> str:
    if facts.architecture.endswith("ForImageClassification"):
        return _CLASSIFY_IMAGE
    return _IMAGE_CHAT if {TEMPLATE_FILE, LEGACY_TEMPLATE_FILE} & facts.files else _IMAGE


def _python(code: str, auto_class: str) -> str:
    return f"```python\n{code.format(auto_class=auto_class, path=PATH, image=IMAGE).strip()}\n```"


def _vllm(facts: CardFacts) -> str:
    name = name_of(facts)
    lines = ["```sh", f"vllm serve {PATH} --served-model-name {name}"]
    tag = use_of(facts.architecture).pipeline_tag
    if tag in ("text-generation", "image-text-to-text"):
        chat = TEMPLATE_FILE in facts.files
        asked = {"messages": [{"role": "user", "content": "Hello!"}]} if chat else {"prompt": "Hello"}
        where = "chat/completions" if chat else "completions"
        body = json.dumps({"model": name, **asked})
        lines += [
            f"curl http://localhost:8000/v1/{where} -H 'Content-Type: application/json' \\",
            f"     -d '{body}'",
        ]
    return "\n".join([*lines, "```"])


_MERGED = "A Gemma model and a LoRA adapter merged into one model. It needs neither of the two, nor PEFT, to run."
_WHOLE = "A fine-tuned Gemma model, as it was trained: no adapter was merged, and no weight was changed since."
_CHANGED = {True: "merging a fine-tuned adapter into them", False: "fine-tuning"}
_TEXT_CHAT = """
from transformers import {auto_class}, AutoTokenizer

path = "{path}"
tokenizer = AutoTokenizer.from_pretrained(path)
model = {auto_class}.from_pretrained(path, dtype="auto")

messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=64)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
"""
_TEXT = """
from transformers import {auto_class}, AutoTokenizer

path = "{path}"
tokenizer = AutoTokenizer.from_pretrained(path)
model = {auto_class}.from_pretrained(path, dtype="auto")

inputs = tokenizer("Hello", return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=64)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
"""
_ENCODE = """
from transformers import {auto_class}, AutoTokenizer

path = "{path}"
tokenizer = AutoTokenizer.from_pretrained(path)
model = {auto_class}.from_pretrained(path, dtype="auto")

output = model(**tokenizer("Hello", return_tensors="pt").to(model.device))
print(output)
"""
_IMAGE_CHAT = """
from PIL import Image
from transformers import {auto_class}, AutoProcessor

path = "{path}"
processor = AutoProcessor.from_pretrained(path)
model = {auto_class}.from_pretrained(path, dtype="auto")

image = {{"type": "image", "image": Image.open("{image}")}}
messages = [{{"role": "user", "content": [image, {{"type": "text", "text": "What is this?"}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs.to(model.device, dtype=model.dtype), max_new_tokens=64)
answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
"""
_IMAGE = """
from PIL import Image
from transformers import {auto_class}, AutoProcessor

path = "{path}"
processor = AutoProcessor.from_pretrained(path)
model = {auto_class}.from_pretrained(path, dtype="auto")

image = Image.open("{image}")
inputs = processor(images=image, text="<image>caption en", return_tensors="pt")
output = model.generate(**inputs.to(model.device, dtype=model.dtype), max_new_tokens=64)
answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
"""
_CLASSIFY_IMAGE = """
from PIL import Image
from transformers import {auto_class}, AutoProcessor

path = "{path}"
processor = AutoProcessor.from_pretrained(path)
model = {auto_class}.from_pretrained(path, dtype="auto")

inputs = processor(images=[Image.open("{image}")], return_tensors="pt")
answer = model(**inputs.to(model.device, dtype=model.dtype)).probabilities
print(answer)  # of each policy: does the image violate it, yes or no
"""
