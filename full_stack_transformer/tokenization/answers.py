"""Which tokens of a rendered conversation are answers: what a model is to write, each with its end.

    messages --template--> text --where answers are--> token ids, and whether each is learned

Templates are not edited, so this works for any of them. Three ways, in this order:

    {% generation %} … {% endgeneration %}   the template says it itself
    prefixes      what stands before an answer is the rendering of the messages before it, as when a model is
                  asked; what ends it is the rendering up to and with it
    marked texts  for templates that write a message differently once others follow (Qwen 3 leaves out old
                  thoughts): letters of the messages are replaced by private characters, which tell in the
                  output of which message a letter is

An answer begins where the model is asked, so a space or a thought that the template writes there belongs to
it, and it ends with the token that ends its turn.
"""

import itertools
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.errors import RequestError
from full_stack_transformer.tokenization.chat import (
    ChatTemplate,
    render_with_blocks,
)
from full_stack_transformer.tokenization.control_tokens import Span
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer
from full_stack_transformer.tokenization.marked_letters import marked_messages
from full_stack_transformer.tokenization.templates import BLOCK_ENDS

# For models that come without a template. The end token ends an answer, so that a model learns to stop.
DOCUMENTED_TEMPLATE_NAME = "plain"
DOCUMENTED_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- set content = (message['content'] or '') | trim %}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant:' }}{% generation %}{{ ' ' + content + eos_token }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- message['role'] | capitalize + ': ' + content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}
"""
ANSWERER = "assistant"
_BLOCK = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as token ids."""

    token_ids: NDArray[np.int64]
    """(tokens,)."""
    learned: NDArray[np.uint8]
    """(tokens,) 1 where the token is an answer's, or ends one."""
    num_answers: int
    """That are learned."""
    num_without_end: int
    """Of these, the answers that no control token ends."""


def render_conversation(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: DocumentTokenizer,
    *,
    tools: Sequence[Any] = (),
    only_last: bool = False,
    ignored: frozenset[int] = frozenset(),
) -> RenderedConversation:
    """Token ids of a conversation, and which of them are learned.

    No text of a message becomes a control token. Answers begin with a token of their own, as when a model is
    asked, where the tokenizer's own merges across that border would differ.

    Args:
        template: of the model.
        messages: as in `messages` of the chat API.
        tokenizer: of the model.
        tools: descriptions of functions, as in `tools` of the chat API.
        only_last: learn the last answer only.
        ignored: indices of messages that are not learned.

    Raises:
        RequestError: the template refuses the messages, or changes the texts so that answers are not found.
    """
    rendered, spans = template.rendered(messages, tokenizer, tools=tools)
    found = answer_regions(template, messages, tokenizer, rendered, spans, tools=tools)
    if ignored and any(index is None for index, _ in found):
        raise RequestError(
            "it cannot be told which answer is left out (weight 0): the chat template has other "
            "{% generation %} blocks than answers"
        )
    regions = [region for index, region in found if index not in ignored]
    if only_last:
        regions = regions[-1:]
    token_ids, learned = _encode(template, tokenizer, rendered, spans, regions)
    ends = {span.stop for span in spans if span.token_id is not None}
    without_end = sum(stop not in ends for _, stop in regions)
    return RenderedConversation(
        np.array(token_ids, dtype=np.int64),
        np.array(learned, dtype=np.uint8),
        len(regions),
        without_end,
    )


def answer_regions(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: DocumentTokenizer,
    rendered: str,
    spans: Sequence[Span],
    *,
    tools: Sequence[Any] = (),
) -> list[tuple[int | None, tuple[int, int]]]:
    """Where the answers are in `rendered`.

    Returns:
        Of each answer that the template writes, the index of its message (None where it cannot be told), and
        its [start, stop).

    Raises:
        RequestError: the template changes the texts so that answers are not found.
    """
    finder = _Finder(template, messages, tokenizer, rendered, spans, tools)
    answers = [index for index, one in enumerate(messages) if one.get("role") == ANSWERER]
    found: list[tuple[int | None, tuple[int, int]]] = []
    blocks = finder.from_blocks()
    if blocks is not None:
        are_answers = len(blocks) == len(answers)
        found = [
            (index if are_answers else None, block)
            for index, block in zip(
                answers if are_answers else [0] * len(blocks), blocks, strict=True
            )
        ]
    else:
        earlier = 0
        for index in answers:
            region = finder.by_prefix(index, earlier) or finder.by_marks(index, earlier)
            if region is not None:
                found.append((index, region))
                earlier = region[1]
    return [(index, finder.trimmed(*region)) for index, region in found if region[0] < region[1]]


@dataclass
class _Header:
    """What the template writes before an answer when the model is asked."""

    text: str
    start: int
    """Its place in the rendering of the messages before `index`."""
    index: int
    controls: list[Span] | None = None
    """Its control tokens, once they are needed."""


class _Finder:
    """Finds the answers in one rendered conversation; see the module."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: DocumentTokenizer,
        rendered: str,
        spans: Sequence[Span],
        tools: Sequence[Any],
    ) -> None:
        self._template, self._tokenizer, self._tools = template, tokenizer, tools
        self._messages = messages
        self._rendered = rendered
        self._control = [span for span in spans if span.token_id is not None]
        self._header: _Header | None = None
        self._marks: list[tuple[int, int]] | None = None

    def _text(self, num_messages: int, *, asks: bool) -> str | None:
        """The rendering of the first messages; None if the template refuses them alone."""
        try:
            return self._template.text(
                self._messages[:num_messages],
                self._tokenizer,
                tools=self._tools,
                add_generation_prompt=asks,
            )
        except RequestError:
            return None

    def from_blocks(self) -> list[tuple[int, int]] | None:
        """What the template itself calls generated; None if it does not, or its output is changed by it."""
        if not _BLOCK.search(self._template.source):
            return None
        text = render_with_blocks(
            self._template, self._messages, self._tokenizer, tools=self._tools
        )
        parts = re.split(f"[{BLOCK_ENDS}]", text or "")
        if len(parts) < 3 or "".join(parts) != self._rendered:
            return None
        borders = list(itertools.accumulate(map(len, parts)))
        regions = list(zip(borders[0::2], borders[1::2], strict=False))
        return [(start, self._with_end(start, stop)) for start, stop in regions]

    def _with_end(self, start: int, stop: int) -> int:
        """The stop of a block with the control token right behind it, unless the block has one at its end."""
        _, trimmed = self.trimmed(start, stop)
        if any(span.stop == trimmed for span in self._control):
            return stop
        following = [span for span in self._control if span.start >= stop]
        is_next = following and not self._rendered[stop : following[0].start].strip()
        return following[0].stop if is_next else stop

    def by_prefix(self, index: int, earlier: int) -> tuple[int, int] | None:
        """Where message `index` is, by the renderings before it and with it; None if they are no prefixes."""
        asked = self._text(index, asks=True)
        if asked is None:
            return None
        start = _num_common(asked, self._rendered)
        if start < len(asked) or self._header is None:
            header_start = _num_common(asked, self._text(index, asks=False) or "")
            if self._header is None:
                self._header = _Header(asked[header_start:], header_start, index)
            if start < len(asked):
                # More may be asked for than is written (DeepSeek's `<think>`), but only in the header.
                if start < header_start:
                    return None
                start = self._last_control_in_common(header_start, start)
        if index + 1 == len(self._messages):
            stop = len(self._rendered)
        else:
            answered = self._text(index + 1, asks=False)
            if answered is None or not self._rendered.startswith(answered):
                return None
            stop = len(answered)
        return (start, stop) if earlier <= start <= stop else None

    def _last_control_in_common(self, header_start: int, start: int) -> int:
        """Where the first control token of the header is that is not written; `start` if it is none."""
        written = {(span.start, span.stop) for span in self._control}
        for place in self._header_controls():
            span = place.start + header_start, place.stop + header_start
            if span not in written:
                return min(start, span[0])
        return start

    def _header_controls(self) -> list[Span]:
        """The control tokens of the header, by their places in it."""
        assert self._header is not None
        if self._header.controls is None:
            _, spans = self._template.rendered(
                self._messages[: self._header.index],
                self._tokenizer,
                tools=self._tools,
                add_generation_prompt=True,
            )
            offset = self._header.start
            self._header.controls = [
                Span(span.start - offset, span.stop - offset, span.token_id)
                for span in spans
                if span.token_id is not None and span.start >= offset
            ]
        return self._header.controls

    def by_marks(self, index: int, earlier: int) -> tuple[int, int] | None:
        """Where message `index` is, by marked letters; None if the template writes nothing of it.

        Raises:
            RequestError: the template changes the letters.
        """
        marks = self._find_marks()
        own = [place for place, owner in marks if owner == index]
        before = [place for place, owner in marks if owner < index and (not own or place < own[0])]
        after = [place for place, owner in marks if owner > index and (not own or place > own[-1])]
        low = max(earlier, before[-1] + 1 if before else 0)
        high = after[0] if after else len(self._rendered)
        if own:
            return self._start_of(low, own[0]), self._stop_of(own[-1] + 1, high)
        starts = [self._after_header(span) for span in self._control if low <= span.start < high]
        start = next((start for start in starts if start is not None), None)
        return None if start is None else (start, self._stop_of(start, high))

    def _start_of(self, low: int, first: int) -> int:
        """Where an answer begins whose first marked letter is at `first`, after the place `low`."""
        before = [span for span in self._control if low <= span.start and span.stop <= first]
        for span in reversed(before):
            start = self._after_header(span)
            if start is not None and start <= first:
                return start
        header = self._header.text if self._header is not None else ""
        if header and (place := self._rendered.rfind(header, low, first)) >= 0:
            return place + len(header)
        return before[-1].stop if before else first

    def _after_header(self, span: Span) -> int | None:
        """Where the header ends that begins with this control token; None if none does."""
        header = self._header.text if self._header is not None else ""
        controls = self._header_controls() if header else []
        if not controls or controls[0].start:
            return None
        # As much of it as is written: Qwen 3 without thoughts leaves out the empty one of earlier answers.
        for cut in (len(header), *(control.start for control in reversed(controls[1:]))):
            if self._rendered.startswith(header[:cut], span.start):
                return span.start + cut
        return None

    def _stop_of(self, low: int, high: int) -> int:
        """Where an answer ends whose last marked letter is before `low`; the next message's is at `high`."""
        ends = _end_ids(self._template, self._tokenizer)
        for span in self._control:
            if low <= span.start < high and (span.token_id in ends):
                return span.stop
        for span in self._control:
            if low <= span.start < high:
                return span.start
        return low

    def _find_marks(self) -> list[tuple[int, int]]:
        """Places of marked letters in the rendered text, and the message that each is of."""
        if self._marks is not None:
            return self._marks
        marked, whole = marked_messages(self._template.source, self._messages, self._tools)
        text = self._template.text(marked, self._tokenizer, tools=self._tools)
        back = str.maketrans({mark: own for mark, (own, _) in whole.items()})
        if text.translate(back) != self._rendered:
            raise RequestError(
                "the chat template changes the texts of messages so that answers are not found in what it "
                "writes; put {% generation %} and {% endgeneration %} around the answer in the template"
            )
        self._marks = [
            (place, whole[character][1])
            for place, character in enumerate(text)
            if character in whole
        ]
        return self._marks

    def trimmed(self, start: int, stop: int) -> tuple[int, int]:
        """The same without what stands behind the token that ends the turn: white space, the end of all."""
        trailing: list[Span] = []  # from the last on
        place = stop
        for span in reversed(self._control):
            if span.stop > place:
                continue
            if span.start < start or self._rendered[span.stop : place].strip():
                break
            trailing.append(span)
            place = span.start
        ends = _end_ids(self._template, self._tokenizer)
        chosen = [span for span in trailing if span.token_id in ends] or trailing[:1]
        return start, chosen[-1].stop if chosen else stop


@lru_cache(maxsize=8)
def _end_ids(template: ChatTemplate, tokenizer: DocumentTokenizer) -> frozenset[int]:
    return template.stop_ids(tokenizer)


def _num_common(one: str, other: str) -> int:
    """Characters that two texts have in common at their beginning."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if other.startswith(one[:middle]) else (low, middle - 1)
    return low


def _encode(
    template: ChatTemplate,
    tokenizer: DocumentTokenizer,
    rendered: str,
    spans: Sequence[Span],
    regions: Sequence[tuple[int, int]],
) -> tuple[list[int], list[int]]:
    """Token ids, and 1 for each that is in a region."""
    markup = template.markup(tokenizer)
    borders = sorted({place for region in regions for place in region})
    starts = [start for start, _ in regions]
    stops = [stop for _, stop in regions]
    token_ids: list[int] = []
    learned: list[int] = []

    def is_inside(place: int) -> int:
        return int(bisect_right(starts, place) > bisect_right(stops, place))

    for span in spans:
        if span.token_id is not None:
            token_ids.append(span.token_id)
            learned.append(is_inside(span.start))
            continue
        inner = [place for place in borders if span.start < place < span.stop]
        cuts = [span.start, *inner, span.stop]
        pieces = [replace(span, start=a, stop=b) for a, b in itertools.pairwise(cuts)]
        encodings = [markup.encode_text(rendered, piece) for piece in pieces]
        ids = [token_id for encoding in encodings for token_id in encoding.ids]
        if inner and tokenizer.decode(ids) != rendered[span.start : span.stop]:
            whole = markup.encode_text(rendered, span)
            if tokenizer.decode(ids) != tokenizer.decode(whole.ids):
                # SentencePiece's space before a text would stand before each piece.
                token_ids += whole.ids
                learned += [is_inside(span.start + start) for start, _ in whole.offsets]
                continue
        token_ids += ids
        for piece, encoding in zip(pieces, encodings, strict=True):
            learned += [is_inside(piece.start)] * len(encoding.ids)
    return token_ids, learned
