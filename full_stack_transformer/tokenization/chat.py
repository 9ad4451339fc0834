"""Messages of a chat -> token ids, by the Jinja template of the model directory or a plain default.

    messages --template--> text, as transformers renders it
        \\--texts broken, template--> the same text, in which only the template wrote control tokens
                                       --> control tokens and the texts between them --> token ids

A template is a program that looks at the texts, so it is given the real ones. Which control tokens are its
own is seen in a second rendering, of broken texts, in which none can arise: if it is the first one again once
the broken characters are put back, the two have control tokens in the same places.

Knows nothing of models and of HTTP.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypedDict

from jinja2 import TemplateError

from full_stack_transformer.errors import ModelError, RequestError
from full_stack_transformer.storage import write_text
from full_stack_transformer.tokenization.control_tokens import (
    Markup,
    Span,
    broken_template,
    mapped,
    unused_characters,
)
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer
from full_stack_transformer.tokenization.template_process import run
from full_stack_transformer.tokenization.templates import (
    BLOCK_ENDS,
    Program,
    program_of,
    template_tree,
)

# For a base model that has never seen a chat: the form in which texts report a conversation.
_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_PLAIN_STOPS = ("\nUser:", "\nSystem:")
TEMPLATE_FILE_NAME, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_PROCESSOR_FILE_NAME = "chat_template.json"
_CONFIG_FILE_NAMES = ("special_tokens_map.json", "tokenizer_config.json")
_TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class ChatMessage(TypedDict):
    """One turn, as chat templates read it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """How a chat becomes tokens."""

    source: str
    is_plain: bool = False
    """No template came with the model."""
    special_tokens: tuple[tuple[str, str], ...] = ()
    """What the template may write by name; without any begin, end and padding of the tokenizer."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer, in addition to the end token."""
        return _PLAIN_STOPS if self.is_plain else ()

    def encode(
        self,
        messages: Sequence[ChatMessage],
        tokenizer: DocumentTokenizer,
        *,
        continues: bool = False,
    ) -> list[int]:
        """Token ids up to the beginning of the answer.

        Args:
            messages: the chat so far.
            tokenizer: of the model.
            continues: the last message is an answer that has begun; the ids end with its text.

        Raises:
            RequestError: the template refuses the messages.
        """
        if continues and not messages[-1]["content"].strip():  # nothing has begun
            messages, continues = messages[:-1], False
        if self.is_plain:
            return tokenizer.encode_prompt(_plain(messages, continues=continues))
        rendered, spans = self.rendered(
            messages, tokenizer, add_generation_prompt=not continues, continues=continues
        )
        return self.markup(tokenizer).encode(rendered, spans)

    def stop_ids(self, tokenizer: DocumentTokenizer) -> frozenset[int]:
        """The control token that the template writes after an answer, where it has one."""
        if self.is_plain:
            return frozenset()
        answer = "0123456789"
        example: list[ChatMessage] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer},
        ]
        try:
            rendered, spans = self.rendered(example, tokenizer)
        except RequestError:
            return frozenset()
        end = rendered.rfind(answer) + 1
        after = [span.token_id for span in spans if end and span.start >= end]
        return frozenset([token_id for token_id in after if token_id is not None][:1])

    def markup(self, tokenizer: DocumentTokenizer) -> Markup:
        """What tells control tokens from texts."""
        return _markup(tokenizer, self.source)

    def variables(self, tokenizer: DocumentTokenizer, tools: Sequence[Any] = ()) -> dict[str, Any]:
        """What the template is given besides the messages."""
        named = self._named_tokens(tokenizer)
        return {"tools": list(tools) or None, "documents": None, **named}

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: DocumentTokenizer,
        *,
        tools: Sequence[Any] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """What the template writes, as transformers renders it.

        Raises:
            RequestError: the template refuses the messages.
        """
        variables = {
            **self.variables(tokenizer, tools),
            "add_generation_prompt": add_generation_prompt,
            "messages": [_normalized(message, tokenizer) for message in messages],
        }
        return _render(_program(self.source), variables)

    def rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: DocumentTokenizer,
        *,
        tools: Sequence[Any] = (),
        add_generation_prompt: bool = False,
        continues: bool = False,
    ) -> tuple[str, list[Span]]:
        """What the template writes, and where in it are its control tokens and the texts between them.

        Raises:
            RequestError: the template refuses the messages.
        """
        markup = self.markup(tokenizer)
        given = [_normalized(message, tokenizer) for message in messages]
        # Names and roles of messages are words of the template.
        words = frozenset(word for one in given for word in (*one, str(one.get("role"))))
        num_private = 1 + max(len(one.characters) for one in markup.alphabets)
        unused = unused_characters(self.source, [given, list(tools)])
        end, *others = itertools.islice(unused, num_private)
        private, end = "".join(others), end if continues else ""
        if continues:
            given[-1]["content"] += end
        variables = {
            **self.variables(tokenizer, tools),
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = _render(_program(self.source), {**variables, "messages": given}, end)
        with_broken_texts = ""
        for alphabet in markup.alphabets:
            breaking, program = broken_template(self.source, alphabet, private, words)
            with suppress(RequestError):  # where the template decides by what was broken
                broken = {
                    **variables,
                    "messages": mapped(breaking.apply, given),
                    "tools": mapped(breaking.apply, list(tools)) or None,
                }
                with_broken_texts = _render(program, broken, end)
            if breaking.undo(with_broken_texts) == rendered:
                return rendered, markup.split(with_broken_texts)
        spans = markup.split(rendered)
        if _ids(spans) != _ids(markup.split(with_broken_texts)):
            raise RequestError(
                "the chat template decides by control tokens that the text of a message has; leave them out"
            )
        return rendered, spans

    def _named_tokens(self, tokenizer: DocumentTokenizer) -> dict[str, str]:
        if self.special_tokens:
            return dict(self.special_tokens)
        return {
            "bos_token": tokenizer.begin,
            "eos_token": tokenizer.end,
            "pad_token": tokenizer.pad,
        }


PLAIN_TEMPLATE = ChatTemplate(_PLAIN_TEMPLATE, is_plain=True)


# ---------------------------------------------------------------------- the files of a model


def load_chat_template(directory: Path) -> ChatTemplate:
    """The template of a model directory; the plain one where it has none.

    Raises:
        ModelError: the template is not a text, or not valid Jinja.
    """
    try:
        config = _read_config(directory)
        source = _found_template(directory, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{directory}: the chat template cannot be read: {error}") from error
    if source is None:
        return PLAIN_TEMPLATE
    try:
        if not isinstance(source, str):
            raise ModelError(
                f"{directory}: chat_template should be one text, or several of which one has the name "
                f"default; found {source!r:.60}"
            )
        _program(source)
    except TemplateError as error:
        raise ModelError(f"{directory}: the chat template is not valid Jinja: {error}") from error
    tokens = {name: config.get(name) for name in _TOKEN_NAMES}
    texts = {
        name: str(token["content"] if isinstance(token, Mapping) else token)
        for name, token in tokens.items()
        if token is not None
    }
    return ChatTemplate(source, special_tokens=tuple(texts.items()))


def keep_chat_template(source: Path, directory: Path) -> None:
    """Write the template of a tokenizer beside a copy that lacks it: one that was made here is saved anew.

    Raises:
        ModelError: the template is not valid.
    """
    if load_chat_template(directory).is_plain:
        template = load_chat_template(source)
        if not template.is_plain:
            write_text(directory / TEMPLATE_FILE_NAME, template.source)


def _read_config(directory: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for file in (directory / name for name in _CONFIG_FILE_NAMES):
        if file.is_file():
            merged |= json.loads(file.read_text(encoding="utf-8"))
    return merged


def _found_template(directory: Path, config: Mapping[str, Any]) -> Any:
    """Files win over the configuration, as in transformers; of several the one for chats without tools."""
    named: dict[str, Any] = {}
    if (file := directory / TEMPLATE_FILE_NAME).is_file():
        named["default"] = file.read_text(encoding="utf-8")
    for file in sorted((directory / _MORE_TEMPLATES).glob("*.jinja")):
        named[file.stem] = file.read_text(encoding="utf-8")
    if not named:
        written = config.get("chat_template")
        file = directory / _PROCESSOR_FILE_NAME
        if written is None and file.is_file():
            written = json.loads(file.read_text(encoding="utf-8"))
            written = written.get("chat_template") if isinstance(written, dict) else written
        if not isinstance(written, list | dict):
            return written
        entries = written.items() if isinstance(written, dict) else None
        named = dict(entries or ((entry["name"], entry["template"]) for entry in written))
    return named.get("default", next(iter(named.values())) if len(named) == 1 else sorted(named))


# ---------------------------------------------------------------------- rendering


def render_with_blocks(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: DocumentTokenizer,
    *,
    tools: Sequence[Any] = (),
) -> str | None:
    """What the template writes, with BLOCK_ENDS around each `{% generation %}`; None if a text has these.

    Raises:
        RequestError: the template refuses the messages.
    """
    given = [_normalized(message, tokenizer) for message in messages]
    written = template.source + json.dumps([given, list(tools)], ensure_ascii=False, default=str)
    if any(end in written for end in BLOCK_ENDS):
        return None
    variables = {**template.variables(tokenizer, tools), "add_generation_prompt": False}
    return _render(_program(template.source, shows_blocks=True), {**variables, "messages": given})


@lru_cache(maxsize=8)
def _program(source: str, *, shows_blocks: bool = False) -> Program:
    return program_of(template_tree(source), shows_blocks=shows_blocks)


def _render(program: Program, variables: Mapping[str, Any], end: str = "") -> str:
    """What the template writes, up to `end`, which stands behind the message to be continued."""
    text = run(program, variables)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("a message has half of a surrogate pair, which is no text") from error
    if end not in text:
        raise RequestError("the chat template leaves out the message that is to be continued")
    return text[: text.rindex(end)] if end else text


def _ids(spans: Sequence[Span]) -> list[int]:
    return [span.token_id for span in spans if span.token_id is not None]


@lru_cache(maxsize=8)
def _markup(tokenizer: DocumentTokenizer, source: str) -> Markup:
    return Markup(tokenizer, template_tree(source))


def _plain(messages: Sequence[ChatMessage], *, continues: bool) -> str:
    stripped = [{**message, "content": message["content"].strip()} for message in messages]
    text = _render(
        _program(_PLAIN_TEMPLATE), {"messages": stripped, "add_generation_prompt": not continues}
    )
    if not continues:
        return text
    last = messages[-1]["content"]
    return text.removesuffix("\n") + last[len(last.rstrip()) :]


def _normalized(message: Mapping[str, Any], tokenizer: DocumentTokenizer) -> dict[str, Any]:
    """What the template sees of a message: its text as the model sees it, and nothing that is None."""
    seen = {name: value for name, value in message.items() if value is not None}
    if isinstance(text := seen.get("content"), str) and (stripped := text.strip()):
        seen["content"] = text.replace(stripped, tokenizer.normalize(stripped), 1)
    return seen
