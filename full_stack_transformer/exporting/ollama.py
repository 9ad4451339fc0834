"""Modelfiles of Ollama: the chat template in Go's language, stops and sampling settings.

The Go template is not translated from Jinja. What the Jinja template writes around the texts of each role is
read from one rendering, and has to explain its renderings of many other conversations.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from full_stack_transformer.errors import ModelError, RequestError
from full_stack_transformer.exporting.source import Source

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
_ROLES = ("system", "user", "assistant")
# Between them the template's own words are found; no template has them.
_TEXTS = {"system": "Zq1Sys", "user": "Zq2Usr", "assistant": "Zq3Ans"}
# Sampling settings of generation_config.json -> those of a Modelfile.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class Turns:
    """A chat format that writes each message between two strings that depend on its role."""

    head: str
    """Before the first message."""
    without_system: str
    """After the head, where the first message is no system message."""
    around: dict[str, tuple[str, str]]
    """Role -> what stands before and after its text."""
    answer: str
    """What begins the answer."""

    def rendered(self, messages: Messages) -> str:
        """As the Go template renders them."""
        has_system = any(message["role"] == "system" for message in messages)
        parts = [self.head, "" if has_system else self.without_system]
        for message in messages:
            before, after = self.around[message["role"]]
            parts += [before, message["content"], after]
        return "".join([*parts, self.answer])

    def go_template(self) -> str:
        """The same for Ollama, in one line: every text is a string of Go, so that no space is lost."""
        branches = "".join(
            f"{{{{ {'else ' * bool(index)}if eq .Role {json.dumps(role)} }}}}"
            f"{_go(before)}{{{{ .Content }}}}{_go(after)}"
            for index, (role, (before, after)) in enumerate(self.around.items())
        )
        default = (
            f"{{{{ if not .System }}}}{_go(self.without_system)}{{{{ end }}}}"
            if self.without_system
            else ""
        )
        messages = f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
        return f"{_go(self.head)}{default}{messages}{_go(self.answer)}"


def _go(text: str) -> str:
    """A text as an action that writes it; JSON's escapes are Go's."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def turns_of(source: Source) -> Turns:
    """The chat format of a model.

    Raises:
        ModelError: its template does more than to write texts around messages.
    """
    try:
        turns = _read(source)
        for messages in _conversations(with_system="system" in turns.around):
            if _rendered(source, messages) != turns.rendered(messages):
                raise ValueError("what it writes depends on more than the role of a message")
    except (RequestError, ValueError) as error:
        raise ModelError(
            f"the chat template of {source.name} cannot be written for Ollama: {error}; export with --format "
            "gguf, which carries the template as it is, and run llama-server --jinja"
        ) from error
    if turns.head and turns.head == _begin(source):
        # llama.cpp puts the begin token before the prompt by itself.
        return Turns("", turns.without_system, turns.around, turns.answer)
    return turns


def _begin(source: Source) -> str:
    return source.tokenizer.prefix


def _rendered(source: Source, messages: Messages, *, asks: bool = True) -> str:
    return source.template.text(messages, source.tokenizer, add_generation_prompt=asks)


def _read(source: Source) -> Turns:
    def chat(*roles: str) -> Messages:
        return [{"role": role, "content": _TEXTS[role]} for role in roles]

    def cut(text: str, *roles: str) -> list[str]:
        parts = []
        for role in roles:
            part, found, text = text.partition(_TEXTS[role])
            if not found:
                raise ValueError(f"it leaves out the text of the role {role}")
            parts.append(part)
        return [*parts, text]

    # user, assistant, user: what stands between them is the end of one and the beginning of the next.
    start, to_answer, to_user, last = cut(
        _rendered(source, chat("user", "assistant", "user")), "user", "assistant", "user"
    )
    once, end = cut(_rendered(source, chat("user")), "user")
    if start != once or last != end:
        raise ValueError("what it writes depends on the number of messages")
    # Where a finished chat ends as one that goes on, this is the end of its last message; else the end counts
    # as the beginning of what follows.
    (_, bare_end) = cut(_rendered(source, chat("user"), asks=False), "user")
    is_end = end.startswith(bare_end) and to_answer.startswith(bare_end)
    after_user = bare_end if is_end else ""
    answer, before_answer = end.removeprefix(after_user), to_answer.removeprefix(after_user)
    (_, _, bare_end) = cut(
        _rendered(source, chat("user", "assistant"), asks=False), "user", "assistant"
    )
    before_user = to_user.removeprefix(bare_end)
    if not (to_user.startswith(bare_end) and start.endswith(before_user)):
        before_user = _common_end(start, to_user)
    after_answer = to_user.removesuffix(before_user)
    first = start.removesuffix(before_user)
    around = {
        "user": (before_user, after_user),
        "assistant": (before_answer, after_answer),
    }
    try:
        opening, rest, _ = cut(_rendered(source, chat("system", "user")), "system", "user")
    except (RequestError, ValueError):
        return Turns(first, "", around, answer)  # it has no system message
    if not rest.endswith(before_user):
        raise ValueError("it writes the system message into that of the user")
    after_system = rest.removesuffix(before_user)
    begin = _begin(source)
    head = begin if begin and opening.startswith(begin) and first.startswith(begin) else ""
    if not head and first and opening.startswith(first):
        head = first
    around["system"] = (opening.removeprefix(head), after_system)
    return Turns(head, first.removeprefix(head), around, answer)


def _common_end(first: str, second: str) -> str:
    size = 0
    while size < min(len(first), len(second)) and first[-1 - size] == second[-1 - size]:
        size += 1
    return first[len(first) - size :]


def _conversations(*, with_system: bool) -> list[Messages]:
    """Chats to compare, as Ollama gives them to a template: texts without spaces around, roles in turn."""
    texts = [
        "Hi",
        "What is 2 + 2?",
        "a\n\nb",
        "日本語 🙂",
        "{{ x }} {% y %}",
        "x" * 500,
        "/no_think",
        "\"'",
    ]
    chats: list[Messages] = []
    for length in (1, 3, 5):
        for shift in range(len(texts)):
            turns = [
                {"role": _ROLES[1 + index % 2], "content": texts[(index + shift) % len(texts)]}
                for index in range(length)
            ]
            chats.append(turns)
            if with_system:
                chats.append([{"role": "system", "content": texts[-shift]}, *turns])
    return chats


def modelfile(source: Source, gguf_name: str, *, num_ctx: int) -> str:
    """The content of the Modelfile.

    Raises:
        ModelError: the chat template cannot be written for Ollama.
    """
    turns = turns_of(source)
    lines = [
        f"# {source.name}: ollama create NAME -f Modelfile",
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{turns.go_template()}"""',
        f"PARAMETER num_ctx {num_ctx}",
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in _stops(source)),
        *_sampling(source.settings),
    ]
    if '"""' in turns.go_template():
        raise ModelError(f"the chat template of {source.name} has three quotes in a row")
    _warn(source, turns)
    return "\n".join(lines) + "\n"


def _stops(source: Source) -> Sequence[str]:
    ends = (source.tokenizer.backend.id_to_token(one) for one in source.end_ids)
    return [*(one for one in ends if one), *source.template.stops]


def _sampling(settings: dict[str, Any]) -> list[str]:
    if not settings.get("do_sample", False):
        return ["PARAMETER temperature 0"]
    return [
        f"PARAMETER {name} {settings[key]}"
        for key, name in _PARAMETERS.items()
        if settings.get(key) is not None
    ]


def _warn(source: Source, turns: Turns) -> None:
    spaced = [{"role": "user", "content": "  x \n"}]
    if _rendered(source, spaced).removeprefix(_begin(source)) != turns.rendered(
        spaced
    ).removeprefix(_begin(source)):
        logger.warning("the chat template strips spaces around texts; Ollama's cannot")
    if _begin(source) and not source.template.is_plain:
        written = _rendered(source, spaced)
        if not written.startswith(_begin(source)):
            logger.warning(
                "Ollama begins each prompt with %s, which the chat template does not write",
                _begin(source),
            )
