"""What options of several commands share: own code, the cluster, and checks, which raise UsageError."""

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from full_stack_transformer.errors import UsageError
from full_stack_transformer.storage import not_utf_8

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_HOST_AND_PORT = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):(?P<port>\d{1,5})", re.ASCII)
_DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class OwnClassesOptions:
    """Own classes."""

    allow_code_from: tuple[str, ...] = ()
    """Python module that you trust: classes that a model, dataset or file of options names in it may be
    imported, also from the working directory; may be repeated. Modules of typed options are trusted."""


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Cluster."""

    ray_address: str | None = None
    """Run on a cluster of Ray: auto for the one that this machine is a node of, HOST:PORT for the one with
    this head, local for one of this machine that ends with the command. Default: without Ray."""


def check_ray_address(options: ClusterOptions) -> None:
    """Refuse a --ray_address that is none."""
    address = options.ray_address
    if address is None or address in ("auto", "local"):
        return
    found = _HOST_AND_PORT.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 1 << 16:
        raise UsageError(
            f"--ray_address must be auto, local, or HOST:PORT of the head, such as 10.0.0.1:6379; found "
            f"{address!r}"
        )


def at_least(options: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise UsageError(f"--{name} must be at least {least:g}, found {value!r}")


def between(options: object, least: float, most: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} must be between {least:g} and {most:g}, found {value!r}")


def num_bytes(text: str, name: str) -> int:
    """Bytes that a text like 2GB, 1.5 GiB or 800000000 says, of the option with this name."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"--{name} must be a number of bytes such as 2GB or 500MiB, found {text!r}"
        )
    number, prefix, is_binary = found.groups()
    unit = (1024 if is_binary else 1000) ** " kmgt".index(prefix.lower() or " ")
    return int(float(number) * unit)


def check_device(options: Any) -> None:
    """Refuse a --device that is none anywhere; torch knows whether this machine has it."""
    if not _DEVICE.fullmatch(options.device):
        raise UsageError(
            f"--device must be auto, cpu, cuda, cuda:1 or mps, found {options.device!r}"
        )


def check_texts(arguments: Any) -> None:
    """Raise UsageError for a text that is not UTF-8; paths may be anything.

    Python keeps the other bytes of a command line as surrogates (PEP 383), which no tokenizer takes.
    """
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            problem = not_utf_8(text) if isinstance(text, str) else None
            if problem is not None:
                raise UsageError(
                    f"--{field.name} is not UTF-8: {problem}; convert it, or set the terminal to UTF-8"
                )
