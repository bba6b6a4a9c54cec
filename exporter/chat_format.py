"""Which chat format a model's own Jinja template writes: for programs that do not read Jinja.

A fine-tuned model may carry any template, whatever its family, and a prompt in another format is answered, but badly.
So the template is rendered, and what it writes is compared with the formats known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.chat_template import render

Messages = Sequence[tuple[str, str]]
"""Pairs of a role (`system`, `user` or `assistant`) and what it says, without white space around it."""


@dataclass(frozen=True)
class ChatFormat:
    """Turns of `{open}{role}\\n{content}{close}\\n`, without the token that begins the text."""

    name: str
    open: str
    close: str
    assistant: str = "model"
    """What the role `assistant` is called"""
    folds_system: bool = False
    """Whether the system's message begins the user's first turn, before an empty line; otherwise it is a turn"""
    answer: str = ""
    """What stands before an answer that is to be written, besides its turn's beginning"""

    def prompt(self, messages: Messages) -> str:
        """All messages, and the beginning of the answer."""
        parts = []
        folded = ""
        for role, content in messages:
            if role == "system" and self.folds_system:
                folded = f"{content}\n\n"
                continue
            before, folded = (folded, "") if role == "user" else ("", folded)
            parts.append(
                f"{self.open}{self.assistant if role == 'assistant' else role}\n{before}{content}{self.close}\n"
            )
        return "".join([*parts, f"{self.open}{self.assistant}\n{self.answer}"])


# https://ai.google.dev/gemma/docs/formatting and the chat_template of google/gemma-3-4b-it and gemma-3n-E2B-it; that
# of gemma and gemma-2 is the same, but refuses a system's message.
GEMMA = ChatFormat("gemma", "<start_of_turn>", "<end_of_turn>", folds_system=True)
# https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4; the larger ones begin an answer with an empty thought
# unless asked to think: https://huggingface.co/google/gemma-4-31B-it/blob/main/chat_template.jinja
GEMMA4_SMALL = ChatFormat("gemma4-small", "<|turn>", "<turn|>")
GEMMA4_LARGE = ChatFormat("gemma4-large", "<|turn>", "<turn|>", answer="<|channel>thought\n<channel|>")

FORMATS = (
    GEMMA,
    # Templates made for training often give every role a turn, the system too.
    ChatFormat("gemma with a system's turn", GEMMA.open, GEMMA.close),
    GEMMA4_SMALL,
    GEMMA4_LARGE,
    # What TRL and Unsloth give a base model that has no format. Source:
    # https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
    ChatFormat("chatml", "<|im_start|>", "<|im_end|>", assistant="assistant"),
)

_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
_CHAT: Messages = (("user", "a question"), ("assistant", "an answer"), ("user", "another question"))
_SYSTEM: Messages = (("system", "an instruction"), *_CHAT)


def chat_format(template: str) -> ChatFormat | None:
    """The format that a Jinja chat template writes, for chats with and without a system's message; none if it is not
    one of `FORMATS`. A template that refuses a system's message leaves open what is done with one.

    Raises:
        SourceError: As `chat_template.render`.
    """
    plain, instructed = (
        None if text is None else text.removeprefix(_TOKENS["bos_token"])
        for text in render(template, [_prompt(_CHAT), _prompt(_SYSTEM)])
    )
    for known in FORMATS:
        if plain == known.prompt(_CHAT) and instructed in (None, known.prompt(_SYSTEM)):
            return known
    return None


def _prompt(messages: Messages) -> dict[str, Any]:
    conversation = [{"role": role, "content": content} for role, content in messages]
    return {"messages": conversation, "add_generation_prompt": True, **_TOKENS}
