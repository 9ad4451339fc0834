"""Jinja as chat templates are written for it.

Templates are only parsed here: they are foreign programs, which `template_process` compiles and runs.
"""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Around what a template calls generated, in a rendering that looks for it.
BLOCK_ENDS = "\U000ffffc\U000ffffd"
# Of a template's file; the longest of known models has 23,000.
MAX_SOURCE_CHARACTERS = 1 << 20
_MAX_REASON_CHARACTERS = 200


class _GenerationBlocks(Extension):
    """`{% generation %} … {% endgeneration %}`: what a model learns to write.

    Without effect, or with a private character at both ends.
    """

    tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        """A call of a macro with the block as its body, as in transformers: its variables are its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        ends = BLOCK_ENDS if self.environment.shows_blocks else ""  # type: ignore[attr-defined]
        return f"{ends[:1]}{caller()}{ends[1:]}"


@lru_cache(maxsize=2)
def _environment(*, shows_blocks: bool = False) -> ImmutableSandboxedEnvironment:
    """As transformers sets it up, so that a template means the same there and here."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"],
    )
    environment.extend(shows_blocks=shows_blocks)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def template_tree(source: str) -> nodes.Template:
    """The template as Jinja reads it.

    Raises:
        TemplateError: it is not valid.
    """
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise TemplateSyntaxError(f"it has more than {MAX_SOURCE_CHARACTERS:,} characters", 1)
    try:
        return _environment().parse(source)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # a number of thousands of digits
        raise TemplateSyntaxError(str(error)[:_MAX_REASON_CHARACTERS], 1) from error


def _too_deep() -> TemplateSyntaxError:
    return TemplateSyntaxError("its expressions are nested too deeply", 1)


@dataclass(frozen=True)
class Program:
    """A template, to be compiled where it runs."""

    tree: bytes
    shows_blocks: bool = False
    """Whether BLOCK_ENDS are written around what is called generated."""

    @cached_property
    def key(self) -> bytes:
        """Tells it from others."""
        return hashlib.sha256(self.tree + bytes([self.shows_blocks])).digest()


def program_of(tree: nodes.Template, *, shows_blocks: bool = False) -> Program:
    """The tree as a program; the tree is not to be used any more.

    Raises:
        TemplateError: its expressions are nested too deeply.
    """
    tree.set_environment(None)  # type: ignore[arg-type]
    try:
        return Program(pickle.dumps(tree), shows_blocks)
    except RecursionError as error:  # long sums are parsed by a loop
        raise _too_deep() from error


def compiled(tree: bytes, *, shows_blocks: bool) -> Template:
    """The template of a program; compiling it computes what is constant in it."""
    environment = _environment(shows_blocks=shows_blocks)
    parsed = pickle.loads(tree)  # noqa: S301 (of `program_of`)
    parsed.set_environment(environment)
    code = environment.compile(parsed)
    return Template.from_code(environment, code, environment.make_globals(None))
