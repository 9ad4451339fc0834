"""Texts that tokenizers disagree about: Unicode, white space, control tokens as text, numbers, nothing."""

import random
import unicodedata
from collections.abc import Sequence

_FIXED = (
    *(
        "",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\x00",
        "\x7f",
        "\u2028",
    ),
    *(
        "Hello world",
        " Hello",
        "Hello ",
        "  two  spaces  ",
        "a\r\nb\r\n\r\nc",
        "\n\n\nx\n\n",
        "\t\tif x:\n",
    ),
    *(
        "don't I'LL we'Ve they're 'sx 'S ''",
        "can’t",
        "1",
        "12",
        "123",
        "1234",
        "3.14159",
        "1,000,000 ²³ ½ Ⅷ",
    ),
    *(
        "café cafe\u0301 n\u0303o",
        "日本語のテキスト",
        "中文，标点。",
        "한국어 문장",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈",
        "שלום עולם",
        "مرحبا بالعالم",
    ),
    *(
        "नमस्ते दुनिया",
        "ไทยไม่มีช่องว่าง",
        "ΑΒΓ ёжик ѣ",
        "ﬁ ﬂ ½ ℃ ①",
        "\u202eabc\u202c",
        "a" * 300,
        "ab " * 100,
    ),
    *(
        "def f(x):\n    return x ** 2  # ok\n",
        '{"a": [1, 2, {"b": null}]}',
        "<a href='x'>&amp;</a>",
    ),
    *(
        "!?…—–“”«»",
        "$100 €5 £3 ¥7",
        "__init__ --flag=1 a_b-c",
        "\\n \\u00e9 %s {{x}}",
        "▁▁x ▁",
        "\u0120\u010a",
    ),
)
_WORDS = (
    *(
        "the",
        " The",
        "ing",
        " of",
        "Return",
        "'s",
        " don't",
        "\n",
        "\r\n",
        " ",
        "  ",
        "\t",
        "12",
        " 2024",
        "3.5",
    ),
    *(
        "é",
        "ñ",
        "ß",
        "日本",
        "語",
        "中",
        "한",
        "🙂",
        "👍🏽",
        "\u0301",
        "\u200d",
        "\u00a0",
        "\u3000",
        "。",
        "！",
        ".",
        ",",
        "!!",
    ),
    *(
        "(",
        ")",
        "{",
        "}",
        "://",
        "_",
        "-",
        "--",
        "\\",
        '"',
        "'",
        "<",
        ">",
        "|",
        "Ω",
        "ж",
        "ا",
        "ש",
        "न",
        "ก",
    ),
)
# Blocks that every Unicode table of the last ten years agrees about.
_RANGES = (
    *((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x500), (0x5D0, 0x5EB), (0x620, 0x650), (0x905, 0x93A)),
    *((0x3041, 0x3097), (0x30A1, 0x30FB), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x2000, 0x2070)),
    *(
        (0x20A0, 0x20BE),
        (0x2190, 0x2400),
        (0x1F300, 0x1F5FF),
        (0x1F600, 0x1F640),
        (0x1D400, 0x1D454),
    ),
)
_MAX_PARTS = 24


def hostile_texts(num_texts: int, control_tokens: Sequence[str], *, seed: int = 0) -> list[str]:
    """The same texts for the same arguments; every one can be encoded as UTF-8.

    Args:
        num_texts: how many.
        control_tokens: of the tokenizer, which stand in the texts as text.
        seed: another one gives other texts.
    """
    rng = random.Random(seed)  # noqa: S311 (no secret)
    named = [
        text
        for token in control_tokens
        for text in (token, f"a{token}b", f" {token} ", token + token, token[:-1], token[1:])
    ]
    texts = [*_FIXED, *named[: max(0, num_texts // 2)]]
    while len(texts) < num_texts:
        texts.append(_random_text(rng, control_tokens))
    return texts[:num_texts]


def _random_text(rng: random.Random, control_tokens: Sequence[str]) -> str:
    kind = rng.random()
    parts: list[str] = []
    for _ in range(rng.randint(1, _MAX_PARTS)):
        choice = rng.random()
        if choice < kind:
            parts.append(rng.choice(_WORDS))
        elif choice < 0.9 or not control_tokens:
            parts.append(_random_character(rng))
        else:
            parts.append(rng.choice(control_tokens))
    return "".join(parts)


def _random_character(rng: random.Random) -> str:
    while True:
        character = chr(rng.randrange(*rng.choice(_RANGES)))
        if unicodedata.category(character) != "Cn":
            return character
