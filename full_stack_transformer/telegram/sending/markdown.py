"""Markdown of a model's answer -> the text of messages and their entities.

    answer --parser--> tokens --> runs of text with a style each --cut--> pieces of a message's size

Never a parse mode: Telegram would refuse a text whose marks do not fit together, as in one that is still
being written. Knows Markdown and entities; not how messages are sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from aiogram.types import MessageEntity
from markdown_it import MarkdownIt
from markdown_it.token import Token

from full_stack_transformer.telegram.sending.formatting import Piece, split_text, text_pieces
from full_stack_transformer.telegram.state.store import Reply
from full_stack_transformer.telegram.texts import LANGUAGES

# Tags of HTML are text: a model may explain them.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable("table").enable("strikethrough")
_STYLES = {"strong": "bold", "em": "italic", "s": "strikethrough"}
# How a reply without a text ends; the bot's words have the same names.
FAILURES = ("refused", "failed", "unreadable")
_LINK_SCHEMES = ("http", "https", "tg", "mailto")
# https://core.telegram.org/bots/api#messageentity: more are left out by Telegram.
_MAX_ENTITIES = 100


@dataclass(frozen=True)
class _Style:
    """A kind of entity, with what belongs to it."""

    type: str
    url: str | None = None
    language: str | None = None


@dataclass
class _Runs:
    """Texts one after the other, each with the styles that hold there."""

    texts: list[tuple[str, tuple[_Style, ...]]] = field(default_factory=list)
    open: list[_Style] = field(default_factory=list)

    def add(self, text: str) -> None:
        if text:
            self.texts.append((text, tuple(self.open)))

    def break_block(self) -> None:
        """Begin a new block, after an empty line."""
        if self.texts:
            ending = (self.texts[-1][0])[-2:]
            styles = tuple(one for one in self.open if one.type == "blockquote")
            missing = "\n\n" if not ending.endswith("\n") else "\n" if ending != "\n\n" else ""
            self.texts.append((missing, styles))

    def break_line(self) -> None:
        """Begin a new line, unless this is one."""
        if self.texts and not self.texts[-1][0].endswith("\n"):
            self.add("\n")


def reply_pieces(reply: Reply) -> list[Piece]:
    """The messages of a finished reply; never empty."""
    words = LANGUAGES[reply.language]
    if reply.finish in FAILURES:
        return [Piece(getattr(words, reply.finish), [])]
    if reply.finish == "stopped" and not reply.text.strip():
        return [Piece(words.stopped, [])]
    return growing_pieces(reply, reply.text) or [Piece(words.empty, [])]


def growing_pieces(reply: Reply, text: str) -> list[Piece]:
    """The messages of a text as far as it is written: an answer in Markdown, or a continuation as it is."""
    return markdown_pieces(text) if reply.mode == "chat" else text_pieces(reply.prompt, text)


def markdown_pieces(text: str) -> list[Piece]:
    """An answer in as many messages as it needs; none for white space alone."""
    runs = _Runs()
    try:
        tokens = _PARSER.parse(text)
    except RecursionError:  # nested thousands of times
        tokens = []
    _add_blocks(tokens, runs, text.splitlines())
    whole = "".join(one for one, _ in runs.texts)
    if not whole.strip():  # nothing but marks, such as ---
        runs, whole = _Runs([(text, ())]), text
    pieces = []
    start = 0
    for part in split_text(whole):
        if part.strip():
            pieces.append(
                Piece(part, list(_entities(runs, start, start + len(part)))[:_MAX_ENTITIES])
            )
        start += len(part)
    return pieces


# ---------------------------------------------------------------------- tokens to runs


def _add_blocks(tokens: Sequence[Token], runs: _Runs, lines: list[str]) -> None:
    lists: list[int | None] = []  # of each open list the next number, none for bullets
    is_after_mark = table_end = 0
    for token in tokens:
        kind = token.type
        if table_end:
            table_end -= kind == "table_close"
        elif kind == "table_open":
            assert token.map is not None
            runs.break_block()
            _add_styled(runs, "\n".join(lines[slice(*token.map)]), _Style("pre"))
            table_end = 1
        elif kind in ("bullet_list_open", "ordered_list_open"):
            if not lists:
                runs.break_block()
            lists.append(int(token.attrs.get("start", 1)) if kind[0] == "o" else None)
        elif kind in ("bullet_list_close", "ordered_list_close"):
            lists.pop()
        elif kind == "list_item_open":
            runs.break_line()
            number = lists[-1]
            runs.add("  " * (len(lists) - 1) + ("• " if number is None else f"{number}. "))
            lists[-1] = None if number is None else number + 1
            is_after_mark = True
        elif kind in ("paragraph_open", "heading_open"):
            if lists and not is_after_mark:
                runs.break_line()
                runs.add("  " * len(lists))
            elif not lists:
                runs.break_block()
            is_after_mark = False
            if kind == "heading_open":
                runs.open.append(_Style("bold"))
        elif kind == "heading_close":
            runs.open.pop()
        elif kind == "blockquote_open":
            runs.break_block()
            runs.open.append(_Style("blockquote"))
        elif kind == "blockquote_close":
            runs.open.pop()
        elif kind in ("fence", "code_block"):
            runs.break_block()
            language = token.info.split()[0][:64] if token.info.strip() else None
            _add_styled(runs, token.content.rstrip("\n"), _Style("pre", language=language))
        elif kind == "hr":
            runs.break_block()
            runs.add("———")
        elif kind == "inline":
            _add_inline(token.children or [], runs)
        else:
            runs.add(token.content)


def _add_inline(tokens: Sequence[Token], runs: _Runs) -> None:
    for token in tokens:
        name, _, end = token.type.rpartition("_")
        if end == "open" and name in _STYLES:
            runs.open.append(_Style(_STYLES[name]))
        elif end == "open" and name == "link":
            url = str(token.attrs.get("href", ""))
            runs.open.append(_Style("text_link", url=url) if _is_link(url) else _Style(""))
        elif end == "close":
            runs.open.pop()
        elif token.type in ("softbreak", "hardbreak"):
            runs.add("\n")
        elif token.type == "code_inline":
            _add_styled(runs, token.content, _Style("code"))
        elif token.type == "image":
            url = str(token.attrs.get("src", ""))
            style = _Style("text_link", url=url) if _is_link(url) else _Style("")
            runs.open.append(style)
            runs.add(token.content or url)
            runs.open.pop()
        else:
            runs.add(token.content)


def _is_link(url: str) -> bool:
    return urlsplit(url).scheme in _LINK_SCHEMES


def _add_styled(runs: _Runs, text: str, style: _Style) -> None:
    """A text of one style alone: code takes no other beside it."""
    before, runs.open = runs.open, [style]
    runs.add(text)
    runs.open = before


# ---------------------------------------------------------------------- runs to entities


def _entities(runs: _Runs, start: int, end: int) -> Iterator[MessageEntity]:
    """Entities of the characters from `start` to `end`; offsets count UTF-16 units from `start`."""
    begun: dict[_Style, int] = {}
    position = units = 0
    for text, styles in runs.texts:
        shown = text[max(0, start - position) : max(0, end - position)]
        position += len(text)
        if not shown:
            continue
        for style in [one for one in begun if one not in styles]:
            yield _entity(style, begun.pop(style), units)
        for style in styles:
            if style.type:
                begun.setdefault(style, units)
        units += len(shown.encode("utf-16-le")) // 2
    for style, since in begun.items():
        yield _entity(style, since, units)


def _entity(style: _Style, since: int, until: int) -> MessageEntity:
    return MessageEntity(
        type=style.type, offset=since, length=until - since, url=style.url, language=style.language
    )
