"""A small preparation in a directory of its own, run undisturbed and disturbed, and what it must leave.

Knows what a dataset root may show; knows nothing of where disturbances come from.
"""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.errors import FullStackTransformerError
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME
from tests.faults import gate
from tests.faults.runner import Finished, GatedRunner, gated_runner

_Result = TypeVar("_Result")
_NAME = "small"
# Several blocks and a line of the journal after each, in a preparation that takes 0.2 s.
_CONSTANTS = {
    "documents.blocks.BLOCK_BYTES": 64 << 10,
    "preparation.journal._SECONDS_BETWEEN_LINES": 0.0,
}
_NUM_DOCUMENTS = {"train": 1400, "valid": 100}
_TEXT = "the corpus holds every token that a reader of documents writes down, café and 日本語 🙂"
_PROCESS = re.compile(r"-\d+(-[0-9a-f]{8})?")  # in the names of temporary files


class Laboratory:
    """Documents, a tokenizer and the files of an undisturbed run; made by `laboratory`."""

    def __init__(self, directory: Path, runner: GatedRunner, options: Sequence[str]) -> None:
        self.directory = directory
        self.root = directory / "datasets"
        self._documents = {split: directory / f"{split}.txt" for split in _NUM_DOCUMENTS}
        self._tokenizer = directory / "tokenizer"
        self._kept = directory / "kept"
        self._runner = runner
        self._options = options
        self._expected: dict[str, bytes] = {}
        self._known_states: dict[str, object] = {}

    @property
    def versions_of(self) -> Path:
        """The directory that holds the numbered versions."""
        return self.root / _NAME

    def concerns(self, path: str) -> bool:
        """Whether a preparation reads or writes this: inputs, the dataset root, and its name on the disk."""
        inputs_and_root = (*self._documents.values(), self._tokenizer, self.root)
        return path == str(self.directory) or any(
            path == str(one) or path.startswith(f"{one}/") for one in inputs_and_root
        )

    def tell(self, text: str) -> str:
        """The text without what differs from run to run: this directory, and who wrote a temporary file."""
        return _PROCESS.sub("", text.replace(f"{self.directory}/", ""))

    def words(self, *words: str) -> list[str]:
        """The command, with `words` besides the fixed ones."""
        fixed = [
            *("--documents_train_file", str(self._documents["train"])),
            *("--documents_valid_file", str(self._documents["valid"])),
            *("--datasets_root", str(self.root), "--dataset_name", _NAME),
            # The reference: comparing a fast back end with it takes a second.
            *("--max_sample_length", "64", "--tokenizer_backend", "tokenizers"),
        ]
        if self._tokenizer.is_dir():
            fixed += ["--tokenizer_path", str(self._tokenizer)]
        return ["prepare_dataset", *fixed, *self._options, *words]

    def prepare(self, *words: str, decide: gate.Decide | None = None) -> Finished:
        """Run the command."""
        return self._runner.run(self.words(*words), decide)

    def set_up(self) -> None:
        """Write the documents, train a tokenizer on them and learn what an undisturbed run writes."""
        for split, path in self._documents.items():
            _write_documents(path, _NUM_DOCUMENTS[split])
        trained = self.prepare("--vocab_size", "300")
        shutil.copytree(_printed_path(trained) / "tokenizer", self._tokenizer)
        self.clear()
        undisturbed = self.prepare()
        self._expected = _contents(_printed_path(undisturbed))
        wrong = [*self.wrong_versions(), *self.wrong_result(undisturbed)]
        assert not wrong, (wrong, undisturbed.stderr)

    def clear(self) -> None:
        """Take away the dataset root."""
        shutil.rmtree(self.root, ignore_errors=True)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Afterwards the dataset root is as it was before."""
        if self.root.is_dir():
            shutil.copytree(self.root, self._kept)
        try:
            yield
        finally:
            self.clear()
            if self._kept.is_dir():
                self._kept.rename(self.root)

    def once_for_this_state(self, look: Callable[["Laboratory"], _Result]) -> _Result:
        """What `look` returns; most errors leave one of a few states, and each is looked at once."""
        state = self._state()
        if state not in self._known_states:
            self._known_states[state] = look(self)
        return cast(_Result, self._known_states[state])

    def _state(self) -> str:
        """A hash of the dataset root that is equal where later runs cannot tell the difference."""
        digest = hashlib.sha256()
        for path in sorted(self.root.rglob("*")):
            digest.update(self.tell(str(path)).encode() + b"\0")
            # A description tells how long it took; whether a version is whole was looked at.
            if path.is_file() and path.parent.parent != self.versions_of:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def wrong_versions(self) -> list[str]:
        """What the dataset root shows and must not show: all but whole versions; hidden names are free."""
        return [
            f"{path.relative_to(self.root)} {one}"
            for path in [*_visible(self.root), *_visible(self.versions_of)]
            if path != self.versions_of
            for one in self._wrong_version(path)
        ]

    def wrong_result(self, done: Finished) -> list[str]:
        """What contradicts success: exit code 0 and the path of a version of this dataset."""
        if done.exit_code != 0:
            return [f"exit code {done.exit_code}, standard error ends with {done.stderr[-200:]!r}"]
        path = Path(done.stdout.removesuffix("\n"))
        if path.parent == self.versions_of and path.is_dir():
            return []
        return [f"exit code 0, but it printed {done.stdout!r} and that is no version"]

    def left_behind(self) -> list[str]:
        """Hidden names in the dataset root."""
        paths = self.root.rglob(".*") if self.root.is_dir() else []
        return sorted(str(path.relative_to(self.root)) for path in paths)

    def _wrong_version(self, path: Path) -> Iterator[str]:
        if not (path.name.isdecimal() and path.is_dir() and path.parent.name == _NAME):
            yield "is no version, yet visible"
            return
        try:
            described = open_dataset(path).description["output_files"]
        except FullStackTransformerError as error:
            yield f"cannot be opened: {error}"
            return
        found = _contents(path)
        if found.keys() != described.keys():
            yield f"holds {sorted(found)}, but describes {sorted(described)}"
        for name in found.keys() | self._expected.keys():
            if found.get(name) != self._expected.get(name):
                yield f"differs from an undisturbed run in {name}"


@contextlib.contextmanager
def laboratory(directory: Path, options: Sequence[str] = ()) -> Iterator[Laboratory]:
    """A laboratory in `directory`, set up; `options` are further words for prepare_dataset."""
    with gated_runner(directory / "output", _CONSTANTS) as runner:
        place = Laboratory(directory, runner, options)
        place.set_up()
        yield place


def _printed_path(done: Finished) -> Path:
    assert done.exit_code == 0, done.stderr
    return Path(done.stdout.removesuffix("\n"))


def _visible(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if not path.name.startswith(".")]


def _contents(version: Path) -> dict[str, bytes]:
    return {
        path.relative_to(version).as_posix(): path.read_bytes()
        for path in version.rglob("*")
        if path.is_file() and path != version / DESCRIPTION_FILE_NAME
    }


def _write_documents(path: Path, num_documents: int) -> None:
    vocabulary = _TEXT.split()
    documents = []
    for number in range(num_documents):
        words = [
            vocabulary[(number * 7 + place * place) % len(vocabulary)]
            for place in range(number % 40)
        ]
        documents.append(f"{number} {' '.join(words)}.\n[END_OF_DOCUMENT]\n")
    path.write_text("".join(documents), encoding="utf-8")
