"""Kills a small training at random moments, resumes it, and looks at what becomes of the model.

    python -m tests.faults.train_kills [--kills 20] [--seed 0] [--fresh] [--tmp_dir /dev/shm]

After each kill the newest checkpoint must be whole; after the last one the resumed training must end with
the weights, the state of the optimizer, the text samples and the exported model of a training that nobody
disturbed, bit for bit. Runs are forks of this process, which has imported what they need; with --fresh
they are new processes, as a person starts them.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

import full_stack_transformer.preparation.prepare
import full_stack_transformer.training.run  # noqa: F401 (imported before the forks, so that it is paid once)
from full_stack_transformer.command_line import run
from full_stack_transformer.training.checkpoints import LAST_FILE_NAME, find_checkpoint
from tests.conftest import write_documents
from tests.training.small_conversations import write_conversations

_NOISE = ("--neftune_alpha", "5")
# What else a training does, besides dropout, validations and text samples.
_KINDS: dict[str, tuple[str, ...]] = {
    "over epochs": ("--max_epochs", "3", "--checkpoint_every_n_minutes", "0"),
    "accumulating": (
        *("--max_epochs", "6", "--accumulate_grad_batches", "3", "--optimizer", "muon"),
        *("--checkpoint_every_n_minutes", "0.002", "--val_check_interval", "0.8"),
    ),
    "packed": (
        *("--max_epochs", "-1", "--max_steps", "70", "--batching", "packed"),
        *("--ema_decay", "0.9", "--checkpoint_every_n_minutes", "0"),
    ),
    # On conversations and preferences, from a pretrained model.
    "answers": (*("--max_epochs", "3", "--checkpoint_every_n_minutes", "0"), *_NOISE),
    "an adapter": (
        *("--max_epochs", "3", "--checkpoint_every_n_minutes", "0"),
        *("--lora_rank", "4", "--lora_dropout", "0.2", "--batching", "packed"),
    ),
    "preferences": ("--max_epochs", "3", "--checkpoint_every_n_minutes", "0"),
    "preferences of an adapter": (
        *("--max_epochs", "3", "--checkpoint_every_n_minutes", "0"),
        *("--lora_rank", "4", "--lora_dropout", "0.2"),
    ),
}
_FROM_SCRATCH = ("over epochs", "accumulating", "packed")
_MODEL = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
_KILLS_PER_TRAINING = 2
# Of the kills, that part comes while the command is still starting.
_EARLY_PART = 0.15
_TRAINING_LINE = "training "
_SECONDS_BETWEEN_LOOKS = 0.002
_PATIENCE_SECONDS = 300.0
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class CommandFailedError(Exception):
    """A run ended with an error that nobody had caused."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    exit_code: int
    """Negative: the number of the signal that ended it."""
    seconds: float
    """From its start."""
    seconds_of_training: float
    """From its line that says that it trains; 0 where it did not come to that."""
    log: str


class Place:
    """A dataset, and the command that trains on it.

    Args:
        directory: everything is written here.
        fresh: runs are new processes.
        tmp_dir: the temporary directory of the runs.
    """

    def __init__(self, directory: Path, *, fresh: bool, tmp_dir: Path) -> None:
        self.experiments = directory / "experiments"
        self._directory = directory
        self._fresh = fresh
        self._tmp_dir = tmp_dir
        self._log = directory / "log"
        config = directory / "model.json"
        config.write_text(json.dumps(_MODEL))
        for name, count, first in (("train", 240, 0), ("valid", 20, 1000)):
            write_documents(directory / f"{name}.txt", num_documents=count, first=first)
        self._run_to_the_end(
            "prepare_dataset",
            *("--documents_train_file", str(directory / "train.txt"), "--dataset_name", "small"),
            *("--documents_valid_file", str(directory / "valid.txt"), "--vocab_size", "300"),
            *("--datasets_root", str(directory), "--max_sample_length", "64"),
            *("--tokenizer_backend", "tokenizers", "--num_workers", "1"),
        )
        self._config = config
        self._words = (
            *("train", "--experiments_root", str(self.experiments), "--batch_size", "8"),
            *("--num_warmup_steps", "5", "--learning_rate", "5e-3", "--accelerator", "cpu"),
            *("--precision", "32", "--compile", "never", "--num_generated_samples", "1"),
        )

    def train(self, kind: str, name: str, *words: str) -> Ended:
        """Train to the end."""
        return self._run_to_the_end(*self._words_of(kind), "--experiment_name", name, *words)

    def kill(
        self, kind: str, name: str, *words: str, after: float, counting_from_start: bool
    ) -> Ended:
        """Train, and kill the training after so many seconds of training, or of the run."""
        given = (*self._words_of(kind), "--experiment_name", name, *words)
        return self._run(given, kill_after=after, counting_from_start=counting_from_start)

    def _words_of(self, kind: str) -> tuple[str, ...]:
        """The command of a kind of training: from scratch on documents, or from a model on conversations."""
        if kind in _FROM_SCRATCH:
            where = ("--dataset_dir", "small", "--model_config", str(self._config))
        else:
            where = (
                *("--dataset_dir", "choices" if kind.startswith("preferences") else "talks"),
                *("--model_path", str(self._base)),
            )
        where = (*where[:1], str(self._directory / where[1]), *where[2:])
        return (*self._words, *where, *_KINDS[kind])

    @cached_property
    def _base(self) -> Path:
        """A pretrained model, and the datasets for its tokenizer."""
        kind = _FROM_SCRATCH[0]
        self._run_to_the_end(
            *self._words_of(kind)[: -len(_KINDS[kind])],
            *("--max_steps", "1", "--experiment_name", "base"),
        )
        base = self.experiments / "base" / "0" / "model"
        write_conversations(self._directory / "talks" / "0", base)
        write_conversations(self._directory / "choices" / "0", base, kind="preferences")
        return base

    def _run_to_the_end(self, *words: str) -> Ended:
        ended = self._run(words)
        if ended.exit_code != 0:
            raise CommandFailedError(f"exit code {ended.exit_code}: {ended.log}")
        return ended

    def _run(
        self,
        words: Sequence[str],
        *,
        kill_after: float = _PATIENCE_SECONDS,
        counting_from_start: bool = True,
    ) -> Ended:
        self._log.unlink(missing_ok=True)
        started = time.monotonic()
        assert len(list(Path("/proc/self/task").iterdir())) == 1, (
            "a fork could dead-lock with threads"
        )
        process_id = os.fork()
        if process_id == 0:
            self._become(words)
        trains_since = None
        while True:
            ended_id, status = os.waitpid(process_id, os.WNOHANG)
            now = time.monotonic()
            if ended_id:
                break
            if trains_since is None and _TRAINING_LINE in _read(self._log):
                trains_since = now
            since = started if counting_from_start else trains_since
            if now - started > _PATIENCE_SECONDS or (
                since is not None and now - since >= kill_after
            ):
                os.kill(process_id, signal.SIGKILL)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return Ended(
            exit_code=os.waitstatus_to_exitcode(status),
            seconds=now - started,
            seconds_of_training=now - trains_since if trains_since is not None else 0.0,
            log=_read(self._log),
        )

    def _become(self, words: Sequence[str]) -> NoReturn:
        """In the fork: run the command and never come back."""
        file = os.open(self._log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        os.environ["TMPDIR"] = str(self._tmp_dir)
        tempfile.tempdir = None
        if self._fresh:
            command = [sys.executable, "-m", "full_stack_transformer", *words]
            os.execv(sys.executable, command)
        exit_code = 1
        try:
            exit_code = run(list(words))
            sys.stderr.flush()
        finally:
            os._exit(exit_code)


class KillLoop:
    """Trains undisturbed once for each kind, then with kills."""

    def __init__(self, place: Place, seed: int, kinds: Sequence[str]) -> None:
        self._place = place
        self._random = random.Random(seed)
        self._kinds = kinds
        self._undisturbed = {kind: place.train(kind, _slug(kind)) for kind in kinds}
        self.met: Counter[str] = Counter()
        self.num_trainings = 0

    @property
    def num_kills(self) -> int:
        """Kills so far."""
        return self.met.total()

    def seconds_of_training(self, kind: str) -> float:
        """How long the undisturbed one trained."""
        return self._undisturbed[kind].seconds_of_training

    def wrong_after_kills(self) -> Iterator[str]:
        """Kill a training of the next kind, resume it to its end; what is wrong then or was on the way."""
        kind = self._kinds[self.num_trainings % len(self._kinds)]
        name = f"{_slug(kind)}-killed-{self.num_trainings}"
        self.num_trainings += 1
        words: tuple[str, ...] = ()
        for _ in range(_KILLS_PER_TRAINING):
            ended = self._kill(kind, name, words)
            if ended.exit_code == 0:
                break
            if ended.exit_code != -signal.SIGKILL:
                yield f"{name}: exit code {ended.exit_code}: {ended.log}"
                return
            self.met[self._what_it_met(name)] += 1
            yield from self._wrong_checkpoints(name)
            words = ("--resume", "last") if self._experiment(name).is_dir() else ()
        try:
            self._place.train(kind, name, *words)
        except CommandFailedError as error:
            yield f"{name}: {error}"
            return
        yield from self._differences(_slug(kind), name)

    def _kill(self, kind: str, name: str, words: tuple[str, ...]) -> Ended:
        undisturbed = self._undisturbed[kind]
        early = self._random.random() < _EARLY_PART
        starting = undisturbed.seconds - undisturbed.seconds_of_training
        left = undisturbed.seconds_of_training * (1.0 - self._part_done(kind, name))
        after = self._random.uniform(0.0, starting if early else left)
        return self._place.kill(kind, name, *words, after=after, counting_from_start=early)

    def _part_done(self, kind: str, name: str) -> float:
        found, _ = find_checkpoint(self._experiment(name) / "checkpoints")
        last, _ = find_checkpoint(self._experiment(_slug(kind)) / "checkpoints")
        assert last is not None
        return found.step / last.step if found else 0.0

    def _experiment(self, name: str) -> Path:
        return self._place.experiments / name / "0"

    def _what_it_met(self, name: str) -> str:
        directory = self._experiment(name)
        if any(directory.rglob(".*partial*")):
            return "writing a file"
        found, _ = find_checkpoint(directory / "checkpoints")
        if found is None:
            return "no checkpoint yet"
        return "about a validation" if found.validation_is_due else "steps"

    def _wrong_checkpoints(self, name: str) -> Iterator[str]:
        directory = self._experiment(name) / "checkpoints"
        found, skipped = find_checkpoint(directory)
        yield from (f"{path} is damaged: {reason}" for path, reason in skipped.items())
        if found is None and directory.is_dir() and any(directory.glob("*.ckpt")):
            yield f"{directory} shows files, but no checkpoint"

    def _differences(self, undisturbed: str, killed: str) -> Iterator[str]:
        left, right = self._experiment(undisturbed), self._experiment(killed)
        exported = ("model/model.safetensors", "model/config.json")
        if (left / "adapter").is_dir():
            exported = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
        for name in (*exported, "generated.jsonl"):
            if (left / name).read_bytes() != (right / name).read_bytes():
                yield f"{killed} differs in {name}"
        contents = [
            torch.load(one / "checkpoints" / LAST_FILE_NAME, weights_only=True)
            for one in (left, right)
        ]
        for place in _unequal(*contents):
            yield f"{killed} differs in {LAST_FILE_NAME}{place}"


def _unequal(left: Any, right: Any, place: str = "") -> Iterator[str]:
    """Where two checkpoints differ, but for their clocks."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if not torch.equal(left, right):
            yield place
    elif isinstance(left, dict) and isinstance(right, dict):
        for key in left.keys() | right.keys():
            if key not in ("seconds", "Meter", "experiment_id"):
                yield from _unequal(left.get(key), right.get(key), f"{place}/{key}")
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, pair in enumerate(zip(left, right, strict=True)):
            yield from _unequal(*pair, f"{place}/{index}")
    elif left != right:
        yield place


def _slug(kind: str) -> str:
    return kind.replace(" ", "-")


def _read(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def main() -> int:
    """Run the loop; exit code 1 when something was wrong."""
    given = _parse()
    if any(os.environ.get(name) != "1" for name in THREADS):
        # NumPy starts threads when it is imported, and forking with live ones can dead-lock.
        command = [sys.executable, "-m", "tests.faults.train_kills", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **dict.fromkeys(THREADS, "1")})
    with (
        tempfile.TemporaryDirectory(dir=given.work_dir) as work_dir,
        tempfile.TemporaryDirectory(dir=given.tmp_dir) as tmp_dir,
    ):
        same = Path(work_dir).stat().st_dev == Path(tmp_dir).stat().st_dev
        print(f"$TMPDIR of the runs is on {'the same' if same else 'another'} file system")
        place = Place(Path(work_dir), fresh=given.fresh, tmp_dir=Path(tmp_dir))
        loop = KillLoop(place, given.seed, given.kinds.split(","))
        for kind in given.kinds.split(","):
            print(f"{kind}: undisturbed in {loop.seconds_of_training(kind):.1f} s", flush=True)
        num_wrong = 0
        while loop.num_kills < given.kills:
            wrong = list(loop.wrong_after_kills())
            print("".join(f"{one}\n" for one in wrong), end="", flush=True)
            num_wrong += bool(wrong)
    met = ", ".join(f"{what} {count}" for what, count in loop.met.most_common())
    print(
        f"{loop.num_kills} kills ({met}) in {loop.num_trainings} trainings, {num_wrong} of them with a "
        "violation"
    )
    return 1 if num_wrong else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="kills, at least")
    parser.add_argument("--kinds", default=",".join(_KINDS), help="some of them, with commas")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("--fresh", action="store_true", help="start each run as a new process")
    parser.add_argument("--work_dir", type=Path, help="directory on the disk to use")
    parser.add_argument("--tmp_dir", type=Path, help="where the runs have their $TMPDIR")
    given = parser.parse_args()
    if unknown := set(given.kinds.split(",")) - set(_KINDS):
        parser.error(f"--kinds must be among {', '.join(_KINDS)}; found {', '.join(unknown)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
