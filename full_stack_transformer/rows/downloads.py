"""Files that a `metadata.toml` names: fetched once, and never taken when their checksum is another.

filename = "aclImdb_v1.tar.gz"
url = "https://…/aclImdb_v1.tar.gz"
sha256 = "c40f74a1…"
"""

import logging
import os
import tomllib
from pathlib import Path

import httpx

from full_stack_transformer.errors import InputError, MachineError
from full_stack_transformer.storage import file_facts, make_directories

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60.0


def download(metadata: Path, directory: Path | None = None) -> Path:
    """The file that `metadata` names, fetched unless it is there with the right checksum.

    Args:
        metadata: the TOML file.
        directory: where to put it; beside `metadata` if None.

    Raises:
        InputError: the metadata lack a key or a valid URL, or what was fetched has another checksum.
        MachineError: there is no network, the server refuses, or the disk is full.
    """
    facts = _read(metadata)
    target = (directory or metadata.parent) / facts["filename"]
    if target.is_file():
        _check(target, facts)
        return target
    make_directories(target.parent)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        _fetch(facts["url"], partial)
        _check(partial, facts)
        partial.replace(target)
    except httpx.InvalidURL as error:
        raise InputError(f"{metadata}: the url {facts['url']!r} is none: {error}") from error
    except httpx.HTTPError as error:
        raise MachineError(
            f"{facts['url']} cannot be fetched: {error}; put the file to {target} by hand"
        ) from error
    except OSError as error:
        raise MachineError(f"writing {target} failed: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    logger.info("fetched %s, %s bytes", target, f"{target.stat().st_size:,}")
    return target


def _read(metadata: Path) -> dict[str, str]:
    try:
        content = tomllib.loads(metadata.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{metadata} should be a TOML file: {error}") from error
    facts = {name: content.get(name) for name in ("url", "filename", "sha256")}
    for name, value in facts.items():
        if not isinstance(value, str) or not value:
            raise InputError(f'{metadata} should have {name} = "…"; found {", ".join(content)}')
    filename = str(facts["filename"])
    if Path(filename).name != filename or filename.startswith("."):
        raise InputError(f"{metadata}: filename must be a plain name, found {filename!r}")
    return {name: str(value) for name, value in facts.items()}


def _fetch(url: str, target: Path) -> None:
    with (
        httpx.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT_SECONDS) as response,
        target.open("wb") as file,
    ):
        response.raise_for_status()
        for block in response.iter_bytes(_BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _check(file: Path, facts: dict[str, str]) -> None:
    found = str(file_facts(file)["sha256"])
    if found != facts["sha256"].lower():
        raise InputError(
            f"{facts['filename']} should have the SHA-256 {facts['sha256']}, found {found}; it was changed, "
            "or is damaged: delete it and fetch it again, or correct the metadata"
        )
