"""Objects in a store such as S3, over fsspec: read and written whole, with bounded retries and time.

    s3://bucket/key   s3fs         gs://bucket/key   gcsfs         abfs://container/key   adlfs

Credentials come from the environment or the usual files of each store, the address of another S3 server from
AWS_ENDPOINT_URL; neither is ever in an error or a log line. An object appears when it is complete, or not at
all: a large one is sent in parts that the store joins at the end. Knows nothing of what the objects hold.
"""

import hashlib
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from full_stack_transformer.errors import (
    InputError,
    MachineError,
    MissingExtraError,
    UsageError,
    install_command,
)

logger = logging.getLogger(__name__)

# Package that opens a scheme; "memory" lives in one process, for tests.
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "memory": "fsspec",
}
# pathlib makes one slash of two.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,3}([^/].*)", re.DOTALL)
_NUM_ATTEMPTS = 6
# Waits 0.2, 0.4 … 3.2 s between them, and up to half as much more, so that clients do not come at once.
_FIRST_WAIT_SECONDS = 0.2
_CONNECT_SECONDS, _READ_SECONDS = 5, 20
# A cut connection costs one piece. S3 gives the most bytes a second with 8 to 16 MB a request ("Performance
# guidelines for Amazon S3").
_PIECE_BYTES = 8 << 20
# Trying these again gives the same.
_FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
_CODE = re.compile(r"\((\w+)\) when calling the (\w+) operation")

_Result = TypeVar("_Result")


class ObjectPath(type(Path())):  # type: ignore[misc]
    """The place of objects as a path, whose text is the URL again."""

    def __str__(self) -> str:
        """The URL."""
        return url_of(Path(super().__str__())) or super().__str__()


def url_of(place: Path | str) -> str | None:
    """The URL that a place is, also one that pathlib shortened (`s3:/bucket/key`); None of a path."""
    found = _URL.fullmatch(place if isinstance(place, str) else Path.__str__(place))
    if found is None:
        return None
    return f"{found[1].lower()}://{found[2].rstrip('/')}"


def is_url(place: Path | str) -> bool:
    """Whether a place is in a store."""
    return url_of(place) is not None


def check_url(place: Path | str, flag: str) -> str:
    """The URL of an option.

    Raises:
        UsageError: no store has this scheme, or the URL holds credentials.
        MissingExtraError: the package of the scheme is not installed.
    """
    url = url_of(place)
    assert url is not None, "only URLs are checked"
    scheme, _, rest = url.partition("://")
    if scheme not in PACKAGES:
        raise UsageError(
            f"{flag}: {scheme}:// is not an object store that can be used; use s3:// (package s3fs), "
            "gs:// (gcsfs) or abfs:// (adlfs), or a directory"
        )
    if "@" in rest.partition("/")[0] and not scheme.startswith("abfs"):
        raise UsageError(
            f"{flag}: credentials do not belong in a URL; set them in the environment or in the files of the "
            "store (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials)"
        )
    package = PACKAGES[scheme]
    if find_spec(package) is None:
        command = (
            install_command("object_storage") if package == "s3fs" else f"pip install {package}"
        )
        raise MissingExtraError(
            f"{flag} {url} needs the package {package}, which is not installed; install it with: {command}"
        )
    return url


def open_store(place: Path | str, flag: str) -> "ObjectStore":
    """The objects below a URL; raises as `check_url` does."""
    return ObjectStore(check_url(place, flag))


class ObjectStore:
    """The objects below a URL, by their names after it, such as `train/corpus-00000.npy`.

    Several threads may use it. A process that is forked must open its own.

    Raises (all methods):
        InputError: an object is missing.
        MachineError: the store refuses, or does not answer, after several attempts.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        scheme, _, path = url.partition("://")
        options: dict[str, Any] = {"use_listings_cache": False}
        if PACKAGES[scheme] == "s3fs":
            for name in (
                "botocore",
                "aiobotocore",
            ):  # they log credentials, or where they found some
                logging.getLogger(name).setLevel(logging.WARNING)
            options["config_kwargs"] = {
                "connect_timeout": _CONNECT_SECONDS,
                "read_timeout": _READ_SECONDS,
                "retries": {"mode": "standard", "total_max_attempts": 1},  # `_tried` does
            }
            # Named, since fsspec shares one client between the same options.
            names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
            options["endpoint_url"] = next(filter(None, map(os.environ.get, names)), None)
        try:
            self._files = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            raise MissingExtraError(f"{url}: {error}") from error
        if PACKAGES[scheme] == "s3fs":
            self._files.retries = 1
        self._root = path if scheme != "memory" else f"/{path}"

    def below(self, name: str) -> "ObjectStore":
        """The objects below a name."""
        return ObjectStore(f"{self.url}/{name}")

    def where(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    def size(self, name: str) -> int:
        """Bytes of an object."""
        return int(self._tried("looking at", name, lambda: self._info(name))["size"])

    def version_of(self, name: str) -> str:
        """A text that changes when the object is written anew."""
        facts = self._tried("looking at", name, lambda: self._info(name))
        return repr(
            [facts.get(key) for key in ("size", "ETag", "etag", "md5Hash", "mtime", "created")]
        )

    def names(self, below: str = "") -> list[str]:
        """All objects below a name, with that name, sorted; none if there are none."""
        place = self._place(below)
        found = self._tried("listing", below, lambda: self._files.find(place))
        return sorted(str(path)[len(self._root) :].strip("/") for path in found)

    def folders(self, below: str = "") -> list[str]:
        """The next part of the names of the objects below a name, sorted."""
        place = self._place(below)
        try:
            found = self._tried("listing", below, lambda: self._files.ls(place, detail=False))
        except InputError:  # nothing there yet
            return []
        return sorted(
            {str(path)[len(place) :].strip("/").partition("/")[0] for path in found} - {""}
        )

    def read(self, name: str) -> bytes:
        """The whole object."""
        return b"".join(self.pieces(name))

    def pieces(self, name: str, size: int | None = None) -> Iterator[bytes]:
        """The object, piece by piece; each is asked for again where the connection breaks.

        Raises:
            InputError: it is shorter than `size`, which is asked for if it is None.
        """
        size = self.size(name) if size is None else size
        for start in range(0, size, _PIECE_BYTES):
            yield self.part(name, start, size)

    def open(self, name: str) -> BinaryIO:
        """The object as a file that is read from the start, or from near to where it was read."""
        return cast(BinaryIO, io.BufferedReader(_ObjectFile(self, name)))

    def download(self, name: str, target: Path, size: int, sha256: str | None = None) -> None:
        """Write the first `size` bytes of an object into a file, which the caller made and renames.

        Raises:
            InputError: it has another hash than the one that is given.
        """
        digest = hashlib.sha256()
        with target.open("r+b") as file:
            for piece in self.pieces(name, size):
                file.write(piece)
                digest.update(piece)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise InputError(
                f"{self.where(name)} holds other content than described: SHA-256 {digest.hexdigest()}, "
                f"expected {sha256}; write it again"
            )

    def part(self, name: str, start: int, size: int) -> bytes:
        """A piece of an object of `size` bytes from `start` on."""
        end = min(start + _PIECE_BYTES, size)
        return self._tried("reading", name, partial(self._piece, name, start, end))

    def put(self, name: str, content: bytes) -> None:
        """Write a small object whole, or replace it."""
        self._tried("writing", name, lambda: self._files.pipe_file(self._place(name), content))

    def put_file(self, path: Path, name: str) -> None:
        """Write a file as an object, which appears when all of it is there; parts that failed are removed."""

        def send() -> None:
            self._files.put_file(str(path), self._place(name))
            if int(self._info(name)["size"]) != path.stat().st_size:
                raise OSError("the object has another size than the file")

        self._tried("writing", name, send)

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object if there is none of this name; whether this call did.

        S3, Google and Azure decide that by themselves (If-None-Match). The content must be this writer's own,
        so that a request whose answer was lost is recognized.
        """
        place = self._place(name)

        def send() -> bool:
            try:
                self._files.pipe_file(place, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if not re.search(
                    "PreconditionFailed|ConditionNotMet|At least one of the pre", str(error)
                ):
                    raise
                return False
            return True

        return self._tried("writing", name, send) or self.read(name) == content

    def remove(self, name: str) -> None:
        """Delete an object, if it is there."""

        def send() -> None:
            try:
                self._files.rm_file(self._place(name))
            except FileNotFoundError:
                return

        self._tried("deleting", name, send)

    def exists(self, name: str) -> bool:
        """Whether there is this object."""
        try:
            self.size(name)
        except InputError:
            return False
        return True

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._files.info(self._place(name))
        if found.get("type") == "directory":
            raise FileNotFoundError(name)
        return found

    def _piece(self, name: str, start: int, end: int) -> bytes:
        piece: bytes = self._files.cat_file(self._place(name), start=start, end=end)
        if len(piece) != end - start:
            if self.size(name) < end:
                raise InputError(f"{self.where(name)} is shorter than described; write it again")
            raise OSError("the answer is too short")
        return piece

    def _tried(self, what: str, name: str, request: Callable[[], _Result]) -> _Result:
        """The answer to a request that may be sent again."""
        for attempt in range(_NUM_ATTEMPTS):
            try:
                return request()
            except Exception as error:
                if isinstance(error, InputError):
                    raise
                if isinstance(error, FileNotFoundError):
                    raise InputError(f"{self.where(name)} does not exist") from None
                is_last = attempt == _NUM_ATTEMPTS - 1 or isinstance(error, _FINAL_ERRORS)
                if is_last or type(error).__name__ in _FINAL_NAMES:
                    raise MachineError(self._refused(what, name, error, attempt + 1)) from None
                logger.debug("%s %s: %s, again", what, self.where(name), _reason(error))
            time.sleep(_FIRST_WAIT_SECONDS * 2**attempt * (1 + random.random() / 2))  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    def _refused(self, what: str, name: str, error: Exception, num_attempts: int) -> str:
        advice = "check the network and the store, and run the command again"
        if type(error).__name__ in _FINAL_NAMES or isinstance(error, PermissionError):
            advice = "check the credentials in the environment or the files of the store, and their rights"
        times = "once" if num_attempts == 1 else f"{num_attempts} times"
        return f"{what} {self.where(name)} failed, tried {times}: {_reason(error)}; {advice}"


class _ObjectFile(io.RawIOBase):
    """An object as a file: one piece of it is in memory."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name
        self._size = store.size(name)
        self._position = self._start = 0
        self._piece = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(
            whence, self._size
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        if not self._start <= self._position < self._start + len(self._piece):
            self._start = self._position - self._position % _PIECE_BYTES
            self._piece = self._store.part(self._name, self._start, self._size)
        begin = self._position - self._start
        part = self._piece[begin : begin + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def _reason(error: Exception) -> str:
    """What a library says, without the text of the server, which may repeat credentials."""
    cause = error.__cause__
    found = _CODE.search(f"{error} {cause}")
    if found is not None:
        return f"{found[1]} in {found[2]}"
    return type(error).__name__ + (f" ({type(cause).__name__})" if cause is not None else "")
