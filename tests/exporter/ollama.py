"""What Ollama reads of a Modelfile, in so far as ours uses it: its file format, and Go's template language.

Sources: https://github.com/ollama/ollama/blob/main/parser/parser.go (`ParseFile`),
https://github.com/ollama/ollama/blob/main/template/template.go (`collate`, `Execute`), https://pkg.go.dev/text/template
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

COMMANDS = {"from", "template", "parameter", "license", "requires", "renderer", "parser"}


def commands(modelfile: str) -> list[tuple[str, str]]:
    """Each command and its value, without quotes; a parameter as `parameter NAME`."""
    found = []
    rest = modelfile
    while rest := rest.lstrip(" \t\r\n"):
        if rest.startswith("#"):
            _, _, rest = rest.partition("\n")
            continue
        name, rest = _match(r"([A-Za-z]+)[ \t]", rest)
        name = name.lower()
        assert name in COMMANDS, name
        if name == "parameter":
            which, rest = _match(r"([A-Za-z0-9_]+)[ \t]", rest)
            name = f"parameter {which}"
        value, rest = _match(r'("""[\s\S]*?"""|"[^"]*"|[^"\r\n][^\r\n]*)[ \t]*(?:[\r\n]|$)', rest)
        quotes = 3 if value.startswith('"""') else 1 if value.startswith('"') else 0
        found.append((name, value[quotes : len(value) - quotes]))
    return found


def _match(pattern: str, text: str) -> tuple[str, str]:
    match = re.match(pattern, text)
    assert match, text[:80]
    return match[1], text[match.end() :]


def prompt(template: str, messages: Sequence[tuple[str, str]]) -> str:
    """What Ollama sends to the model, after the token that begins the text."""
    collated: list[dict[str, str]] = []
    for role, content in messages:
        if collated and collated[-1]["Role"] == role:
            collated[-1]["Content"] += f"\n\n{content}"
        else:
            collated.append({"Role": role, "Content": content})
    system = "\n\n".join(content for role, content in messages if role == "system")
    # Where a template asks for no messages, Ollama fills in the prompt for each of the user's.
    last = next((content for role, content in reversed(messages) if role == "user"), "")
    return render(template, {"System": system, "Messages": collated, "Prompt": last})


def render(template: str, data: Mapping[str, Any]) -> str:
    """A Go template with `range`, `if`, `else`, variables and the functions below."""
    pieces = re.split(r"(\{\{-?\s[\s\S]*?\s-?\}\})", template)
    for at in range(1, len(pieces), 2):
        if pieces[at].startswith("{{-"):
            pieces[at - 1] = pieces[at - 1].rstrip(" \t\r\n")
        if pieces[at].endswith("-}}"):
            pieces[at + 1] = pieces[at + 1].lstrip(" \t\r\n")
    tokens = [(at % 2 == 1, piece.strip("{}-").strip() if at % 2 else piece) for at, piece in enumerate(pieces)]
    out: list[str] = []
    end = _block(tokens, 0, data, {"$": data}, out)
    assert end == len(tokens)
    return "".join(out)


Variables = dict[str, Any]
Token = tuple[bool, str]


def _block(tokens: list[Token], at: int, dot: Any, scope: Variables, out: list[str] | None) -> int:
    """Runs up to the `else` or `end` that is not its own, or only passes over it; returns where that stands."""
    while at < len(tokens):
        is_action, text = tokens[at]
        if not is_action:
            if out is not None:
                out.append(text)
        elif text.startswith(("else", "end")):
            return at
        elif text.startswith("if "):
            at = _if(tokens, at, text.removeprefix("if "), dot, scope, out)
        elif text.startswith("range "):
            at = _range(tokens, at, dot, scope, out)
        elif out is not None:
            out.append(_action(text, dot, scope))
        at += 1
    return at


def _if(tokens: list[Token], at: int, condition: str, dot: Any, scope: Variables, out: list[str] | None) -> int:
    taken = out is not None and bool(_value(condition, dot, scope))
    at = _block(tokens, at + 1, dot, _Inner(scope), out if taken else None)
    text = tokens[at][1]
    if text.startswith("else if "):
        return _if(tokens, at, text.removeprefix("else if "), dot, scope, None if taken else out)
    if text == "else":
        at = _block(tokens, at + 1, dot, _Inner(scope), None if taken else out)
    assert tokens[at][1] == "end"
    return at


def _range(tokens: list[Token], at: int, dot: Any, scope: Variables, out: list[str] | None) -> int:
    match = re.fullmatch(r"range (\$\w+), (\$\w+) := (.+)", tokens[at][1])
    assert match, tokens[at]
    items = _value(match[3], dot, scope) if out is not None else []
    for index, item in enumerate(items):
        inner = _Inner(scope)
        inner.declare({match[1]: index, match[2]: item})
        _block(tokens, at + 1, item, inner, out)
    return _block(tokens, at + 1, dot, _Inner(scope), None)


class _Inner(dict[str, Any]):
    """A block's own variables, and those of the blocks around it, which `=` changes there."""

    def __init__(self, outer: Variables) -> None:
        super().__init__()
        self.outer = outer

    def __missing__(self, name: str) -> Any:
        return self.outer[name]

    def declare(self, variables: Variables) -> None:
        self.update(variables)


def _action(text: str, dot: Any, scope: Variables) -> str:
    match = re.fullmatch(r"(\$\w+) (:?=) (.+)", text)
    if match is None:
        return str(_value(text, dot, scope))
    value = _value(match[3], dot, scope)
    if match[2] == "=":
        while isinstance(scope, _Inner) and match[1] not in scope:
            scope = scope.outer
        assert match[1] in scope, match[1]
    scope[match[1]] = value
    return ""


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "len": len,
    "slice": lambda items, start: items[start:],
    "not": lambda value: not value,
}


def _value(text: str, dot: Any, scope: Variables) -> Any:
    words = re.findall(r'"[^"]*"|[()]|[^\s()]+', text)
    value, rest = _call(words, dot, scope)
    assert not rest, text
    return value


def _call(words: list[str], dot: Any, scope: Variables) -> tuple[Any, list[str]]:
    operands = []
    function = FUNCTIONS.get(words[0])
    rest = words[1:] if function else words
    while rest and rest[0] != ")":
        operand, rest = _operand(rest, dot, scope)
        operands.append(operand)
    if function:
        return function(*operands), rest
    (only,) = operands
    return only, rest


def _operand(words: list[str], dot: Any, scope: Variables) -> tuple[Any, list[str]]:
    first, rest = words[0], words[1:]
    if first == "(":
        value, rest = _call(rest, dot, scope)
        assert rest[0] == ")"
        return value, rest[1:]
    if first.startswith('"'):
        return first.strip('"'), rest
    if first.isdigit():
        return int(first), rest
    root, *path = first.split(".")
    value = scope[root] if root else dot
    for key in path:
        value = value[key]
    return value, rest
