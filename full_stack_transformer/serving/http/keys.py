"""API keys: read from files and the environment, kept as digests."""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from full_stack_transformer.arguments.serving import AccessOptions
from full_stack_transformer.errors import UsageError

KEYS_VARIABLE, ADMIN_KEYS_VARIABLE = "FST_API_KEYS", "FST_ADMIN_KEYS"
_MIN_KEY_CHARACTERS, _MAX_KEY_CHARACTERS = 16, 512
_MAX_FILE_BYTES = 1 << 20
# A line of the file may hold the digest instead of the key: sha256:… of `printf %s KEY | sha256sum`.
_DIGEST_LINE = re.compile(r"sha256:([0-9a-f]{64})")


class ApiKeys:
    """The keys that open the service, kept as digests and compared in constant time.

    Args:
        digests: SHA-256 of each key; none leaves the service open.
    """

    def __init__(self, digests: frozenset[bytes]) -> None:
        self._digests = sorted(digests)

    @property
    def is_open(self) -> bool:
        """Whether everybody may ask."""
        return not self._digests

    @property
    def num_keys(self) -> int:
        """Number of different keys."""
        return len(self._digests)

    def find(self, authorization: bytes) -> str | None:
        """A short name of the key in an Authorization header; none when it opens nothing.

        Every digest is compared, in constant time, so that no timing tells how near a guess was.
        """
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                found = known.hex()[:8]
        return found if scheme.lower() == b"bearer" else None


def read_api_keys(
    file: Path | None,
    environment: Mapping[str, str] = os.environ,
    *,
    variable: str = KEYS_VARIABLE,
    option: str = "--api_keys_file",
) -> ApiKeys:
    """The keys of a file (one a line, # begins a comment) and of the environment (separated by commas).

    Args:
        file: names the keys; none for those of the environment alone.
        environment: of the process.
        variable: of it, that names keys.
        option: that names the file, for errors.

    Raises:
        UsageError: the file cannot be read or holds no key, or a key is too short to be one.
    """
    digests = {
        _digest(word.strip(), variable)
        for word in environment.get(variable, "").split(",")
        if word.strip()
    }
    if file is not None:
        try:
            with file.open(encoding="utf-8") as opened:
                lines = opened.read(_MAX_FILE_BYTES).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UsageError(f"{option} {file} cannot be read: {reason}") from None
        keys = [key for line in lines if (key := line.partition("#")[0].strip())]
        if not keys:
            # An empty file must not open the service to everybody.
            raise UsageError(f"{option} {file} holds no key; put one on each line")
        digests |= {_digest(key, f"{option} {file}") for key in keys}
    return ApiKeys(frozenset(digests))


def _digest(key: str, source: str) -> bytes:
    if given := _DIGEST_LINE.fullmatch(key):
        return bytes.fromhex(given.group(1))
    is_plain = key.isascii() and key.isprintable() and " " not in key
    if not is_plain or not _MIN_KEY_CHARACTERS <= len(key) <= _MAX_KEY_CHARACTERS:
        # Without the key itself: it may be a real one with a slip.
        raise UsageError(
            f"{source}: a key must have {_MIN_KEY_CHARACTERS} to {_MAX_KEY_CHARACTERS} plain characters "
            "without spaces; make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True)
class Keys:
    """Who may ask, and who may do more."""

    clients: ApiKeys
    admins: ApiKeys

    @classmethod
    def read(cls, options: AccessOptions) -> "Keys":
        """Those of files and environment.

        Raises:
            UsageError: a file cannot be read, or a key is none.
        """
        admins = read_api_keys(
            options.admin_keys_file, variable=ADMIN_KEYS_VARIABLE, option="--admin_keys_file"
        )
        return cls(read_api_keys(options.api_keys_file), admins)
