"""What a person at a terminal types and sees: messages, answers that grow, Ctrl-C. Without one, plain lines.

Knows nothing of models.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from full_stack_transformer.storage import not_utf_8

logger = logging.getLogger(__name__)

# rich leaves tags of HTML out, which a model may well explain: here they are text.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable("table").enable("strikethrough")
_LONG = '"""'
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# What moves the cursor or changes the terminal; a model may write it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def read_message() -> str:
    """The next line, or the lines between two lines that begin and end with three quotation marks.

    Raises:
        EOFError: the input has ended.
    """
    line = _read_line("> ")
    if not line.startswith(_LONG):
        return line
    lines = [line.removeprefix(_LONG)]
    while not lines[-1].endswith(_LONG):
        lines.append(_read_line(". "))
    lines[-1] = lines[-1].removesuffix(_LONG)
    return "\n".join(lines).strip("\n")


def _read_line(sign: str) -> str:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # keys that edit the line, and earlier lines
            import readline  # noqa: F401
    while True:
        try:
            line = input(sign if is_terminal else "").rstrip()
            problem = not_utf_8(line)
            if problem is None:
                return line
            logger.info("this line is not UTF-8 (%s) and was passed over", problem)
        except KeyboardInterrupt:
            sys.stdout.write("\n")  # the line is given up, as in a shell


class Screen:
    """Shows answers: as Markdown in a terminal, else as they come.

    Args:
        markdown: off for plain texts in a terminal as well.
    """

    def __init__(self, *, markdown: bool = True) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._console = Console(file=sys.stdout) if markdown and self._is_terminal else None

    @contextlib.contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """What shows the next piece of an answer."""
        if self._console is None:
            try:
                yield self._write
            finally:
                sys.stdout.write("\n")
                sys.stdout.flush()
            return
        growing = _GrowingMarkdown(self._console)
        try:
            yield growing.add
        finally:
            growing.finish()

    def show_text(self, text: str) -> None:
        """A text that is complete."""
        with self.answer() as show:
            show(text)

    def _write(self, piece: str) -> None:
        sys.stdout.write(_CONTROL.sub("", piece) if self._is_terminal else piece)
        sys.stdout.flush()


class _GrowingMarkdown:
    """Markdown that grows: complete blocks are printed for good, the last one is drawn again and again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest = ""
        self._live = Live(console=console, refresh_per_second=10, transient=True)
        self._live.start()

    def add(self, piece: str) -> None:
        self._rest += _CONTROL.sub("", piece)
        num_complete = complete_blocks(self._rest)
        if num_complete:
            self._print(self._rest[:num_complete])
            self._rest = self._rest[num_complete:]
        self._live.update(_LastLines(self._rest))

    def finish(self) -> None:
        self._live.stop()
        self._print(self._rest)

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(_markdown(text))
            self._console.print()


class _LastLines:
    """As much of the end of a Markdown text as the terminal has room for."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(_markdown(self._text), options, pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def _markdown(text: str) -> Markdown:
    markdown = Markdown("")
    markdown.parsed = _PARSER.parse(text)
    return markdown


def complete_blocks(text: str) -> int:
    """Characters of a growing Markdown text up to the last empty line between blocks.

    A list and its indented parts go on behind an empty line, and so does a code block that is not closed.
    """
    complete = position = 0
    fence = ""
    is_after_empty = False
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        # What follows an empty line at the margin begins a block.
        begins = is_after_empty and line[:1].strip() and not re.match(r"([-*+]|\d+[.)])\s", line)
        if not fence and begins:
            complete = position
        if fence:
            if found and found[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif found:
            fence = found[1]
        is_after_empty = not line.strip()
        position += len(line)
    return complete
