"""Which control tokens in the text of a chat are the template's own, and which a message brought.

    messages, template --texts broken--> messages, template without a control token in any text
                       --rendered--> Markup.split --> control tokens, the texts between them --> ids

A template looks at the texts of messages: it strips, splits and searches them. So they are broken only by
characters of the same kind, and what the template looks for is broken in the same way. Knows nothing of files
and of what a template is given.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import nodes
from tokenizers import AddedToken, Encoding, Tokenizer, models

from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer
from full_stack_transformer.tokenization.templates import Program, program_of, template_tree

# Methods and filters that look for their first argument in a text, and do not write it.
_SEARCHES = frozenset(
    [
        *(
            "split",
            "rsplit",
            "partition",
            "rpartition",
            "startswith",
            "endswith",
            "count",
            "replace",
        ),
        *("find", "rfind", "index", "rindex", "strip", "lstrip", "rstrip"),
        *("removeprefix", "removesuffix"),
    ]
)
_PRIVATE_CHARACTERS = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


# ---------------------------------------------------------------------- broken texts


@dataclass(frozen=True)
class Alphabet:
    """What is broken in the texts of messages."""

    characters: str
    """Each of them once."""
    kept: tuple[str, ...] = ()
    """Strings whose characters stay."""


class Breaking:
    """Puts private characters in the place of those of an alphabet, and takes them back.

    Args:
        alphabet: what to break.
        private: a character of its own for each of the alphabet.
    """

    def __init__(self, alphabet: Alphabet, private: str) -> None:
        self._broken = dict(zip(alphabet.characters, private, strict=False))
        self._whole = str.maketrans({private: own for own, private in self._broken.items()})
        parts = sorted(map(re.escape, alphabet.kept), key=len, reverse=True)
        self._pattern = re.compile("|".join([*parts, *map(re.escape, self._broken)]) or "(?!)")

    def apply(self, text: str) -> str:
        """The text with private characters; as long as before."""
        return self._pattern.sub(lambda found: self._broken.get(found[0], found[0]), text)

    def undo(self, text: str) -> str:
        """The text as it was."""
        return text.translate(self._whole)


def unused_characters(source: str, messages: object) -> Iterator[str]:
    """Private characters that neither the template nor a message has."""
    used = set(source)

    def note(text: str) -> str:
        used.update(text)
        return text

    mapped(note, messages)
    return (character for code in _PRIVATE_CHARACTERS if (character := chr(code)) not in used)


def mapped(change: Callable[[str], str], value: Any) -> Any:
    """Messages with every text changed, except the roles, which are words of the template."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: one if name == "role" else mapped(change, one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(change, one) for one in value]
    return value


@lru_cache(maxsize=32)
def broken_template(
    source: str, alphabet: Alphabet, private: str, words: frozenset[str]
) -> tuple[Breaking, Program]:
    """The template that looks for broken strings in texts where it looked for whole ones.

    Args:
        source: the template.
        alphabet: what is broken.
        private: the characters for it.
        words: names and roles of messages, which are never broken.
    """
    breaking = Breaking(alphabet, private)
    tree = template_tree(source)
    constants = _named_constants(tree)

    def break_it(operand: Any) -> Any:
        if isinstance(operand, nodes.List | nodes.Tuple):
            operand.items = [break_it(item) for item in operand.items]
        value = constants.get(operand.name) if isinstance(operand, nodes.Name) else None
        value = operand.value if isinstance(operand, nodes.Const) else value
        if not isinstance(value, str) or value in words:
            return operand
        return nodes.Const(breaking.apply(value)).set_lineno(operand.lineno)

    _change_searched(tree, break_it)
    return breaking, program_of(tree)


def _named_constants(tree: nodes.Template) -> dict[str, str]:
    """Values of variables that are set once, to a string."""
    found: dict[str, list[nodes.Node]] = {}
    for one in tree.find_all(nodes.Assign):
        if isinstance(one.target, nodes.Name):
            found.setdefault(one.target.name, []).append(one.node)
    return {
        name: values[0].value
        for name, values in found.items()
        if len(values) == 1 and isinstance(values[0], nodes.Const)
    }


def _change_searched(tree: nodes.Template, change: Callable[[Any], Any]) -> None:
    """Put `change(operand)` in the place of what the template compares texts with and looks for in them."""
    for compare in tree.find_all(nodes.Compare):
        compare.expr = change(compare.expr)
        for operand in compare.ops:
            operand.expr = change(operand.expr)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEARCHES:
            call.args[:1] = [change(argument) for argument in call.args[:1]]
    for named in tree.find_all(nodes.Filter):
        if named.name in _SEARCHES:
            named.args[:1] = [change(argument) for argument in named.args[:1]]
    for test in tree.find_all(nodes.Test):
        test.args[:] = [change(argument) for argument in test.args]


# ---------------------------------------------------------------------- control tokens


@dataclass(frozen=True)
class Span:
    """A part of a text: a control token, or text without any."""

    start: int
    stop: int
    token_id: int | None = None
    """Of a control token."""


class Markup:
    """Tells control tokens from texts in what a template wrote.

    Control tokens are the special ones of the vocabulary, and others added to it that the template writes:
    `<|User|>` of DeepSeek or `</think>` are not called special.

    Args:
        tokenizer: of the model.
        tree: the template.
    """

    def __init__(self, tokenizer: DocumentTokenizer, tree: nodes.Template) -> None:
        constants = {one.value for one in tree.find_all(nodes.Const) if isinstance(one.value, str)}
        written = "\0".join([*constants, *(one.data for one in tree.find_all(nodes.TemplateData))])
        added = tokenizer.backend.get_added_tokens_decoder()
        self._control = {
            token.content: (token_id, token)
            for token_id, token in added.items()
            if token.content.strip() and (token.special or token.content in written)
        }
        self._finder = Tokenizer(models.BPE())
        self._finder.add_special_tokens([_exact(token) for _, token in self._control.values()])
        self._first, self._later = self._encoders(tokenizer.backend)
        self.alphabets = self._alphabets(constants)
        """What to break in texts, from the surest on."""

    def split(self, text: str) -> list[Span]:
        """Where control tokens are, and the texts between them."""
        encoding = self._finder.encode(text, add_special_tokens=False)
        spans: list[Span] = []
        end = 0
        for name, (start, stop) in zip(encoding.tokens, encoding.offsets, strict=True):
            spans += [Span(end, start), Span(start, stop, self._control[name][0])]
            end = stop
        spans.append(Span(end, len(text)))
        return [span for span in spans if span.token_id is not None or span.start < span.stop]

    def encode(self, text: str, spans: Iterable[Span]) -> list[int]:
        """Token ids of it all; no text becomes a control token."""
        token_ids: list[int] = []
        for span in spans:
            if span.token_id is not None:
                token_ids.append(span.token_id)
            else:
                token_ids += self.encode_text(text, span).ids
        return token_ids

    def encode_text(self, text: str, span: Span) -> Encoding:
        """The encoding of a part of a text that has no control token."""
        backend = self._later if span.start else self._first
        return backend.encode(text[span.start : span.stop], add_special_tokens=False)

    def _encoders(self, backend: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
        """What encodes the text at the beginning, and those that come after a control token.

        SentencePiece's space before a text belongs to the first one only.
        """
        others = [_exact(token) for _, token in self._control.values() if not token.special]
        written = json.loads(backend.to_str())
        is_changed = _without_prefix(written.get("pre_tokenizer"))
        first = Tokenizer.from_str(backend.to_str()) if others else backend
        later = Tokenizer.from_str(json.dumps(written)) if is_changed else first
        for one in (first, later):
            if one is not backend:
                one.add_special_tokens(others)
                one.encode_special_tokens = True
        return first, later

    def _alphabets(self, constants: Iterable[str]) -> tuple[Alphabet, ...]:
        """First every character of a control token: none can be part of a text then.

        Where the template keeps in a variable what it looks for, the ends of control tokens only, and not in
        such a string: none can begin or end in a text then.
        """
        names = sorted(name.strip() for name in self._control)
        ends = sorted({character for name in names for character in (name[0], name[-1])})
        kept = tuple(sorted(one for one in constants if one and not _could_be_part(one, names)))
        return Alphabet("".join(sorted(set("".join(names))))), Alphabet("".join(ends), kept)


def _exact(token: AddedToken) -> AddedToken:
    """The same token, found in the text as it is."""
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=True,
    )


def _could_be_part(text: str, names: Iterable[str]) -> bool:
    """Whether a control token may begin or end inside this text."""
    return any(
        name.startswith(text[place:])
        or text[place:].startswith(name)
        or name.endswith(text[: place + 1])
        or text[: place + 1].endswith(name)
        for name in names
        for place in range(len(text))
    )


def _without_prefix(written: Any) -> bool:
    """Let no text get the space that the beginning gets, in a pre-tokenizer as JSON; whether one did."""
    if not isinstance(written, dict):
        return False
    if written.get("prepend_scheme") == "first":
        written["prepend_scheme"] = "never"
        return True
    changed = [_without_prefix(one) for one in written.get("pretokenizers", [])]
    return any(changed)
