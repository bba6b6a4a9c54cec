"""Whether a GGUF's vocabulary and chat template do to text what the model's tokenizer does in transformers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dispatcher.errors import VerificationFailed
from exporter.llama_corpus import CONVERSATIONS, LINES
from exporter.llama_run import Answer
from exporter.models import quiet

SPACE = "▁"
"""Stands for a space in the pieces of a vocabulary: https://github.com/google/sentencepiece#whitespace-is-treated-as-a-basic-symbol."""
ADDED_TOKENS = 64
"""How many of the tokenizer's added tokens are asked for, in a line each."""


class Text:
    """A model's tokenizer and chat template in transformers, and what they make of the corpus."""

    def __init__(self, model_dir: Path, config: Mapping[str, Any]) -> None:
        import transformers

        try:
            with quiet():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        except Exception as error:  # tokenizers raises no kind of its own
            raise VerificationFailed(
                f"transformers does not load the tokenizer: {type(error).__name__}: {error}"[:1000],
                code="output_not_loadable",
            ) from error
        text_config = config.get("text_config") or config
        self._size = int(text_config.get("vocab_size") or len(self._tokenizer))
        self._is_gemma4 = str(config.get("model_type")).startswith("gemma4")
        self._template = _template(model_dir, self._tokenizer.chat_template)

    def ids(self, text: str, *, special: bool = True, add: bool = False) -> list[int]:
        """A line's ids, with special tokens in it seen as such or not, with or without what the tokenizer adds."""
        with quiet():
            found = self._tokenizer(text, add_special_tokens=add, split_special_tokens=not special)
        return list(found["input_ids"])

    def lines(self) -> list[str]:
        """The corpus, and a line for each of the first added tokens, those that are special before the others."""
        return [*LINES, *(_around(content) for content in self._added())]

    def _added(self) -> list[str]:
        added = sorted(self._tokenizer.added_tokens_decoder.items(), key=lambda item: (not item[1].special, item[0]))
        contents = [token.content for number, token in added if number < self._size and SPACE not in token.content]
        return contents[:ADDED_TOKENS]

    def _unnamed(self) -> set[str]:
        """Lines of tokens that llama.cpp's converter for Gemma 4 does not take for special, and no prompt is made of.

        It asks the tokenizer for its named special tokens; a token that only `tokenizer.json` knows for special, such
        as one that stands for a video, is text to it. A token of the chat template must be none of these.
        Source: `LlamaHfVocab` in https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/vocab.py
        """
        named = set(self._tokenizer.all_special_tokens) if self._is_gemma4 else set(self._added())
        return {_around(text) for text in self._added() if text not in named and text not in (self._template or "")}

    def compare_tokens(self, answer: Answer) -> dict[str, Any]:
        """Compare vocabulary, ids of every line, and what is put before and after a prompt.

        Three differences are llama.cpp's own, with every model of the kind, and are counted:

        * `U+2581`: its converter writes the tokens for runs of spaces with spaces only, so that a text with the
          character that stands for a space in the vocabulary itself is read otherwise (SentencePiece tokenizers;
          `_create_vocab_sentencepiece` in conversion/base.py).
        * `bos`: it puts <bos> before every prompt of Gemma 4, whatever the tokenizer does
          (https://github.com/ggml-org/llama.cpp/pull/21500).
        * `unnamed`: added tokens of Gemma 4 that are text to it, see `_unnamed`.

        Returns:
            Counts: tokens of the vocabulary, lines, and known differences.

        Raises:
            VerificationFailed: `gguf_tokens_differ`.
        """
        self._compare_vocabulary(answer["vocabulary"])
        known, unnamed = {"U+2581": 0, "bos": 0, "unnamed": 0}, self._unnamed()
        for special, lines, found in ((False, LINES, answer["plain"]), (True, self.lines(), answer["special"])):
            for line, ids in zip(lines, found, strict=True):
                expected = self.ids(line, special=special)
                if ids != expected and SPACE in line and not self._is_gemma4:
                    known["U+2581"] += 1
                elif ids != expected and line in unnamed:
                    known["unnamed"] += 1
                elif ids != expected:
                    _differ(f"{line[:80]!r} becomes", ids, expected)
        before, after = answer["adds"]
        given, expected = [*before, *self.ids("a"), *after], self.ids("a", add=True)
        if given != expected:
            if not (self._is_gemma4 and given == [self._tokenizer.bos_token_id, *expected]):
                _differ("the prompt 'a' becomes", given, expected)
            known["bos"] += 1
        return {"vocabulary": len(answer["vocabulary"]), "lines": len(answer["special"]), "known_differences": known}

    def _compare_vocabulary(self, vocabulary: Sequence[str]) -> None:
        """Compare the text of each token; those that the model has no row for are none of the file's."""
        for text, number in self._tokenizer.get_vocab().items():
            if number >= self._size:
                continue
            found = vocabulary[number] if number < len(vocabulary) else None
            if found is None or found.replace(SPACE, " ") != text.replace(SPACE, " "):
                _differ(f"token {number} is", found, text)

    def compare_template(self, answer: Answer) -> dict[str, Any]:
        """Compare what the conversations become; a template may refuse one (a system's turn, say), then both must.

        Returns:
            Whether there is a template, and of how many conversations it makes the same.

        Raises:
            VerificationFailed: `gguf_template_differs`.
        """
        if self._template is None and answer["template"] is None:
            return {"chat_template": "none", "conversations": 0}
        if self._template is None or answer["template"] is None:
            where = "the model has one, the file none" if self._template else "the file has one, the model none"
            raise VerificationFailed(f"of a chat template, {where}.", code="gguf_template_differs")
        rendered = 0
        for turns, found in zip(CONVERSATIONS, answer["rendered"], strict=True):
            expected = [self._rendered(turns, begin) for begin in (False, True)]
            if found != expected:
                raise VerificationFailed(
                    f"the chat template in the file makes {found!r:.400} of a conversation, "
                    f"the model's own {expected!r:.400}.",
                    code="gguf_template_differs",
                )
            rendered += expected != [None, None]
        return {"chat_template": "rendered", "conversations": rendered}

    def _rendered(self, turns: list[dict[str, Any]], begin: bool) -> str | None:
        from jinja2 import TemplateError

        try:
            with quiet():
                text: str = self._tokenizer.apply_chat_template(
                    turns, chat_template=self._template, tokenize=False, add_generation_prompt=begin
                )
        except (TemplateError, ValueError, TypeError):  # as its `raise_exception` does, and Jinja itself
            return None
        return text


def _around(content: str) -> str:
    return f"x{content}y {content}"


def _template(model_dir: Path, own: str | dict[str, str] | None) -> str | None:
    """The default template; that of a processor, where the tokenizer has none."""
    if own is None and (model_dir / "chat_template.json").is_file():
        own = json.loads((model_dir / "chat_template.json").read_text()).get("chat_template")
    return own.get("default") if isinstance(own, dict) else own


def _differ(what: str, found: object, expected: object) -> NoReturn:
    raise VerificationFailed(
        f"{what} {found!r:.300} in llama.cpp, and {expected!r:.300} in transformers.", code="gguf_tokens_differ"
    )
