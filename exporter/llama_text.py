"""Whether a GGUF's vocabulary and chat template do to text what the model's tokenizer does in transformers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dispatcher.errors import SourceError, VerificationFailed
from exporter.chat_template import render
from exporter.documents import read_json_object
from exporter.gemma import LEGACY_TEMPLATE_FILE
from exporter.llama_corpus import CONVERSATIONS, LINES
from exporter.llama_run import Answer
from exporter.models import quiet
from exporter.sidefiles import MAX_SIDE_FILE_BYTES

Rendered = list[list[str | None]]
"""Of each conversation: without and with the beginning of an answer"""

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

    def render(self, *, while_waiting: Callable[[], None] = lambda: None) -> Rendered | None:
        """What the chat template makes of each conversation, without and with the beginning of an answer; None in place
        of a text where it refuses (a system's turn, say), and at all where there is no template.

        Raises:
            SourceError: As `chat_template.render`.
        """
        if self._template is None:
            return None
        tokens = self._tokenizer.special_tokens_map
        prompts = [
            {**tokens, "messages": turns, "add_generation_prompt": begin}
            for turns in CONVERSATIONS
            for begin in (False, True)
        ]
        found = render(self._template, prompts, while_waiting=while_waiting)
        return [found[at : at + 2] for at in range(0, len(found), 2)]

    def compare_template(self, answer: Answer, expected: Rendered | None) -> dict[str, Any]:
        """Compare what the conversations become; what the template refuses, both must.

        Args:
            answer: llama.cpp's.
            expected: As `render` gives it.

        Returns:
            Whether there is a template, and of how many conversations it makes the same.

        Raises:
            VerificationFailed: `gguf_template_differs`.
        """
        if expected is None and answer["template"] is None:
            return {"chat_template": "none", "conversations": 0}
        if expected is None or answer["template"] is None:
            where = "the model has one, the file none" if expected else "the file has one, the model none"
            raise VerificationFailed(f"of a chat template, {where}.", code="gguf_template_differs")
        for own, found in zip(expected, answer["rendered"], strict=True):
            if found != own:
                raise VerificationFailed(
                    f"the chat template in the file makes {found!r:.400} of a conversation, "
                    f"the model's own {own!r:.400}.",
                    code="gguf_template_differs",
                )
        return {"chat_template": "rendered", "conversations": sum(own != [None, None] for own in expected)}


def _around(content: str) -> str:
    return f"x{content}y {content}"


def _template(model_dir: Path, own: str | dict[str, str] | None) -> str | None:
    """The default template; that of a processor, where the tokenizer has none."""
    legacy = model_dir / LEGACY_TEMPLATE_FILE
    if own is None and legacy.is_file():
        try:
            own = read_json_object(legacy, limit=MAX_SIDE_FILE_BYTES).get("chat_template")
        except ValueError as error:
            raise SourceError(
                f"{LEGACY_TEMPLATE_FILE} cannot be read: {str(error)[:200]}. Save the processor again.",
                code="side_file_invalid",
            ) from error
    own = own.get("default") if isinstance(own, dict) else own
    return own if isinstance(own, str) else None


def _differ(what: str, found: object, expected: object) -> NoReturn:
    raise VerificationFailed(
        f"{what} {found!r:.300} in llama.cpp, and {expected!r:.300} in transformers.", code="gguf_tokens_differ"
    )
