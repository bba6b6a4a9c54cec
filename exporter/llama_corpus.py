"""What a finished GGUF is asked to tokenize and render: what tokenizers and chat templates trip on."""

from typing import Any

PROMPT = "The river was quiet, so she read the letter aloud: nothing is lost, and nothing is invented."
"""What logits are computed for; of a large vocabulary some twenty tokens."""
LINES = (
    PROMPT,
    "a",
    " ",
    "  ",
    "Hello",
    " Hello",
    "  Hello  world ",
    "Hello, world! It's 5 o'clock; isn't it?",
    "don't DON'T we'Ve I'm you're he'd she'll",
    "The quick brown fox jumps over the lazy dog.",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism",
    "CamelCaseAndsnake_case_and-kebab-case.And.dots/and/slashes\\and\\backslashes",
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 1e-9 0xFF 2026-01-31T23:59:59Z",
    "٣٤٥ १२३ Ⅻ ½ ² ㊿",
    "\n",
    "\n\n",
    "one\ntwo\n\nthree\n\n\nfour\n\n\n\n\n\nfive\n",
    "\r\nwindows\r\nlines\r\n",
    "\t",
    "\tone\t\ttwo\t\t\tthree \t four\t ",
    " " * 3 + "x" + " " * 5 + "y" + " " * 17 + "z" + " " * 31 + "." + " " * 32 + "." + " " * 40,
    "trailing spaces   \n   leading spaces\n \n  \n",
    "non\u00a0breaking\u2003em\u3000ideographic\u200bzero\ufeffwidth",
    "def f(x: int) -> int:\n    if x <= 1:\n        return 1\n    return x * f(x - 1)  # factorial\n",
    'for (int i = 0; i < n; ++i) {\n\tprintf("%d\\n", a[i] & 0xff);\n}\n',
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\u00e9"}}',
    "<html><body><h1>Title</h1><table><tr><td>1</td></tr></table><b>bold</b></body></html>",
    "# Heading\n\n- item\n  - nested\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('x')\n```\n",
    "$E = mc^2$, \\frac{a}{b}, ∑_{i=0}^{∞} x_i ≤ ∫ f(x) dx, ∀ε>0 ∃δ",
    "!?!?...---===***###@@@&&&%%%~~~^^^|||",
    "naïve café résumé Zoë Ångström coöperate façade",
    "nai\u0308ve cafe\u0301 A\u030angstro\u0308m",
    "Größe Straße Übermut żółw łąka příliš žluťoučký kůň",
    "Быстрая коричневая лиса. Ελληνικά αλφάβητο. İstanbul ığüşöç",
    "今天天气很好，我们去公园吧。繁體中文測試。",
    "東京タワーは高いです。カタカナとひらがな、漢字。",
    "안녕하세요 세계, 한국어 문장입니다.",
    "مرحبا بالعالم — שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก வணக்கம்",
    "😀 😂🤣 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ✨",
    "𝒳 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 🜁",
    "\u0001\u0007\u001f\u007f",
    "▁ the ▁▁ sign that stands for a space",
    "almost special: <bos <eos> > < pad> <|turn <start_of_tur n>",
)
"""Everything but the tokenizer's own special tokens; those are taken from it."""
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello, who are you?"}],
    [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4."},
        {"role": "user", "content": "  And doubled?\n"},
    ],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Name a colour."},
    ],
    [
        {"role": "user", "content": 'Write `x < y` in HTML, with "quotes" and émojis 😀.'},
        {"role": "assistant", "content": "x &lt; y\n\n```html\n<b>x</b>\n```"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "First part."}, {"type": "text", "text": "Second."}]}],
)
