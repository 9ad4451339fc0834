"""Messages of a chat -> token ids, by the Jinja template of the model directory or a plain default.

    messages --template--> markup, marks in place of texts --control tokens found--> pieces
      --texts put in, encoded as text--> token ids

Only the template can write control tokens: they are looked for before the texts of messages are put in.
Knows nothing of models and of HTTP.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypedDict

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from full_stack_transformer.errors import ModelError, RequestError
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

# For a base model that has never seen a chat: the form in which texts report a conversation.
_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_PLAIN_STOPS = ("\nUser:", "\nSystem:")
_TEMPLATE_FILE_NAME = "chat_template.jinja"
_CONFIG_FILE_NAME = "tokenizer_config.json"


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
            plain = [_with_content(message, message["content"].strip()) for message in messages]
            rendered = self._render(plain, tokenizer, add_generation_prompt=not continues)
            if continues:
                rendered = rendered.removesuffix("\n") + _space_behind(messages[-1]["content"])
            return tokenizer.encode_prompt(rendered)
        token_ids: list[int] = []
        for piece in self._pieces(
            messages, tokenizer, add_generation_prompt=not continues, continues=continues
        ):
            token_ids += [piece] if isinstance(piece, int) else tokenizer.encode_text(piece)
        return token_ids

    def stop_ids(self, tokenizer: DocumentTokenizer) -> frozenset[int]:
        """The control token that the template writes after an answer, where it has one."""
        if self.is_plain:
            return frozenset()
        answer = secrets.token_hex(8)
        example: list[ChatMessage] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer},
        ]
        try:
            pieces = list(self._pieces(example, tokenizer, add_generation_prompt=False))
        except RequestError:
            return frozenset()
        found = [
            index
            for index, piece in enumerate(pieces)
            if isinstance(piece, str) and answer in piece
        ]
        if not found:
            return frozenset()
        after = [piece for piece in pieces[found[-1] + 1 :] if isinstance(piece, int)]
        return frozenset(after[:1])

    def _pieces(
        self,
        messages: Sequence[ChatMessage],
        tokenizer: DocumentTokenizer,
        *,
        add_generation_prompt: bool,
        continues: bool = False,
    ) -> Iterator[int | str]:
        """Control tokens of the template, and the texts between them."""
        # Marks that no message can contain stand for the texts while the template is rendered and its
        # control tokens are found. White space around a text stays visible: templates strip it.
        mark = secrets.token_hex(16)
        marked = [
            _with_content(message, _marked(message["content"], f"<{mark}:{index}>"))
            for index, message in enumerate(messages)
        ]
        rendered = self._render(marked, tokenizer, add_generation_prompt=add_generation_prompt)
        last = f"<{mark}:{len(messages) - 1}>"
        if continues and last in rendered:
            rendered = rendered[: rendered.rindex(last) + len(last)]
            rendered += _space_behind(messages[-1]["content"])
        for piece in tokenizer.split_markup(rendered):
            if isinstance(piece, int):
                yield piece
                continue
            for index, message in enumerate(messages):
                text = tokenizer.normalize(message["content"].strip())
                piece = piece.replace(f"<{mark}:{index}>", text)
            if mark in piece.lower():
                raise RequestError(
                    "the chat template changes the texts of messages, not only white space at their ends; "
                    "such a template cannot be used here"
                )
            yield piece

    def _render(
        self,
        messages: Sequence[ChatMessage],
        tokenizer: DocumentTokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        try:
            return _compiled(self.source).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=tokenizer.begin,
                eos_token=tokenizer.end,
                pad_token=tokenizer.pad,
            )
        # A template is a foreign program and can raise anything.
        except Exception as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error


PLAIN_TEMPLATE = ChatTemplate(_PLAIN_TEMPLATE, is_plain=True)


def load_chat_template(directory: Path) -> ChatTemplate:
    """The template of a model directory; the plain one where it has none.

    Raises:
        ModelError: the template is not a text, or not valid Jinja.
    """
    file, config = directory / _TEMPLATE_FILE_NAME, directory / _CONFIG_FILE_NAME
    source: Any = None
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    elif config.is_file():
        source = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(source, list):  # several, for chats with and without tools
        named = [entry for entry in source if entry.get("name") == "default"]
        source = named[0]["template"] if named else source
    if source is None:
        return PLAIN_TEMPLATE
    try:
        if not isinstance(source, str):
            raise ModelError(f"{directory}: chat_template should be one text, found {source!r:.60}")
        _compiled(source)
    except TemplateError as error:
        raise ModelError(f"{directory}: the chat template is not valid Jinja: {error}") from error
    return ChatTemplate(source)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    # As transformers sets it up, so that a template means the same there and here.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _with_content(message: ChatMessage, content: str) -> ChatMessage:
    return {"role": message["role"], "content": content}


def _marked(content: str, mark: str) -> str:
    """`mark` in the place of the content, between its white space."""
    return content.replace(stripped, mark, 1) if (stripped := content.strip()) else content


def _space_behind(content: str) -> str:
    return content[len(content.rstrip()) :]


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _refuse(message: str) -> None:
    raise TemplateError(message)
