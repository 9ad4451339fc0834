"""Files that a `metadata.toml` names: fetched once by pooch, and only taken with the right checksum.

filename = "aclImdb_v1.tar.gz"
url = "https://…/aclImdb_v1.tar.gz"
sha256 = "c40f74a1…"
"""

import logging
import tomllib
from pathlib import Path

import pooch
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema, RequestException

from full_stack_transformer.errors import InputError, MachineError
from full_stack_transformer.storage import file_facts

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60.0


def download(metadata: Path, directory: Path | None = None) -> Path:
    """The file that `metadata` names; it is fetched unless it is there with the right checksum.

    Args:
        metadata: the TOML file.
        directory: where to put the file; beside `metadata` if None.

    Raises:
        InputError: the metadata lack a key or a valid URL, or the file has another checksum.
        MachineError: there is no network, the server refuses, or the disk is full.
    """
    facts = _read(metadata)
    target = (directory or metadata.parent) / facts["filename"]
    if target.is_file():  # pooch would replace one with another checksum
        found = str(file_facts(target)["sha256"])
        if found != facts["sha256"].lower():
            raise _wrong_checksum(facts, found)
        return target
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        pooch.retrieve(
            facts["url"],
            known_hash=facts["sha256"],
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(chunk_size=_BLOCK_BYTES, timeout=_TIMEOUT_SECONDS),
        )
        target.chmod(0o644)  # pooch leaves it readable for its owner alone
    except (InvalidURL, InvalidSchema, MissingSchema) as error:
        raise InputError(f"{metadata}: invalid URL {facts['url']!r}: {error}") from error
    except RequestException as error:
        raise MachineError(
            f"{facts['url']} cannot be fetched: {error}; put the file to {target} by hand"
        ) from error
    except OSError as error:
        raise MachineError(f"writing {target} failed: {error.strerror or error}") from error
    except ValueError as error:  # of pooch, for a checksum
        raise _wrong_checksum(facts, str(error)) from error
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


def _wrong_checksum(facts: dict[str, str], found: str) -> InputError:
    return InputError(
        f"{facts['filename']} should have the SHA-256 {facts['sha256']}, found {found}; it was changed or is "
        "damaged: delete it and fetch it again, or correct the metadata"
    )
