"""The job of a plan: which model is trained on how many tokens, in which batches, on which machines.

Knows nothing of seconds.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from full_stack_transformer.arguments.planning import PlanArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.planning.machines import Machines, parse_machines
from full_stack_transformer.planning.needs import (
    USABLE_FRACTION,
    Strategy,
    TrainingMemory,
    training_memory,
)
from full_stack_transformer.planning.shapes import (
    Shape,
    default_vocab_size,
    shape_of_option,
    shape_of_size,
)

# Hoffmann et al. 2022 (arXiv 2203.15556), table 3: about 20 tokens a parameter give the lowest loss for the
# arithmetic that is spent.
OPTIMAL_TOKENS_PER_PARAMETER = 20.0
# Tokens of an optimizer step by size: Brown et al. 2020 (GPT-3), table 2.1.
_STEP_TOKENS = ((1e9, 0.5e6), (5e9, 1e6), (5e10, 2e6), (math.inf, 4e6))
_LARGEST_BATCH = 16
_COMPRESSED = (".gz", ".zst", ".parquet")
# Before anything is measured.
_BYTES_PER_TOKEN = 4.0
_NUM_VALIDATIONS = 10
_MOST_VALIDATION_TOKENS = 1e6
_VALIDATION_FRACTION = 0.01
# Whole documents are chosen: of a short corpus a hundredth may be none.
_FEWEST_VALIDATION_TOKENS = 2e4
_LARGEST_VALIDATION_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained on what."""

    shape: Shape
    num_tokens: float
    """That the training sees."""
    max_epochs: int
    max_sample_length: int
    batch_size: int
    """Samples of a device in a batch."""
    accumulate_grad_batches: int
    optimizer: str
    activation_checkpointing: bool
    strategy: Strategy
    machines: Machines
    num_generated_tokens: int
    dataset_validation_tokens: float | None = None
    """Of the dataset, where it is there already."""
    documents_bytes: float | None = None
    """Of the documents that are all there is to learn from; the number of tokens is known after measuring."""

    @property
    def has_dataset(self) -> bool:
        """Whether the dataset is there already."""
        return self.dataset_validation_tokens is not None

    @property
    def corpus_tokens(self) -> float:
        """Of the dataset."""
        return self.num_tokens / self.max_epochs

    @property
    def validation_fraction(self) -> float:
        """Of the corpus: a hundredth, more of a short one, and a million tokens at most."""
        fewest = min(_LARGEST_VALIDATION_FRACTION, _FEWEST_VALIDATION_TOKENS / self.corpus_tokens)
        most = _MOST_VALIDATION_TOKENS / self.corpus_tokens
        fraction = min(max(_VALIDATION_FRACTION, fewest), most)
        return float(f"{fraction:.1g}")

    @property
    def validation_tokens(self) -> float:
        """Of each validation."""
        if self.dataset_validation_tokens is not None:
            return self.dataset_validation_tokens
        return self.corpus_tokens * self.validation_fraction

    @property
    def num_validations(self) -> int:
        """Of the training."""
        return _NUM_VALIDATIONS if self.max_epochs == 1 else self.max_epochs

    def num_validations_in(self, num_steps: float) -> int:
        """Of a training of so many steps: with few, `--val_check_interval` of a part is rounded down."""
        if self.max_epochs > 1:
            return self.num_validations
        return int(num_steps) // max(1, int(num_steps / _NUM_VALIDATIONS))

    @property
    def checkpoint_minutes(self) -> float:
        """Between checkpoints."""
        return 5.0 if self.machines.gpu is None else 30.0

    @property
    def tokens_per_parameter(self) -> float:
        """Seen for each parameter."""
        return self.num_tokens / self.shape.num_parameters

    @property
    def flops(self) -> float:
        """Of the training, without recomputation."""
        return self.num_tokens * self.shape.flops_per_token(self.max_sample_length)


def job_of(arguments: PlanArguments) -> Job:
    """What the options mean.

    Raises:
        UsageError: they contradict each other.
        DatasetError: --dataset_dir is no dataset directory.
    """
    machines = parse_machines(arguments.machines)
    tokens, vocab_size, length = arguments.tokens, arguments.vocab_size, arguments.max_sample_length
    validation_tokens = None
    if arguments.dataset_dir is not None:
        from full_stack_transformer.datasets.corpus import open_dataset

        found = open_dataset(arguments.dataset_dir).description
        tokens = float(found["number_of_train_tokens"] * arguments.max_epochs)
        validation_tokens = float(found["number_of_valid_tokens"])
        vocab_size = int(found["vocab_size"])
        length = length or int(found["max_sample_length"])
    length = length or (256 if machines.gpu is None else 2048)
    shape = _shape(arguments, tokens, vocab_size, length)
    documents_bytes = None
    if tokens is None and arguments.documents_train_file:
        documents_bytes = _documents_bytes(arguments.documents_train_file)
        tokens = documents_bytes / _BYTES_PER_TOKEN * arguments.max_epochs
    if tokens is None:
        tokens = OPTIMAL_TOKENS_PER_PARAMETER * shape.num_parameters
    if tokens / arguments.max_epochs < 10 * length:
        raise UsageError(
            f"--tokens {tokens:g} in {arguments.max_epochs} epochs are fewer than ten samples of {length} "
            "tokens; pass more tokens or fewer epochs"
        )
    job = Job(
        shape=shape,
        num_tokens=tokens,
        max_epochs=arguments.max_epochs,
        max_sample_length=length,
        batch_size=arguments.batch_size or _LARGEST_BATCH,
        accumulate_grad_batches=1,
        optimizer=arguments.optimizer,
        activation_checkpointing=arguments.activation_checkpointing,
        strategy="one device" if machines.num_devices == 1 else "ddp",
        machines=machines,
        num_generated_tokens=arguments.num_generated_tokens,
        dataset_validation_tokens=validation_tokens,
        documents_bytes=documents_bytes,
    )
    return job if machines.gpu is None else _fitted(job, is_fixed=bool(arguments.batch_size))


def _documents_bytes(paths: tuple[Path, ...]) -> float:
    """Of all files.

    Raises:
        DocumentsError: there is no such file.
        UsageError: the size of the texts cannot be told from that of a file.
    """
    from full_stack_transformer.documents.formats import StreamCopies, find_document_files

    with StreamCopies() as copies:
        files = find_document_files(paths, "--documents_train_file", copies)
    unknown = [file for file in files if file.suffix.lower() in _COMPRESSED]
    if unknown:
        raise UsageError(
            f"--documents_train_file {unknown[0]} is compressed, so its size does not tell its tokens; pass "
            "--tokens"
        )
    return float(sum(file.stat().st_size for file in files))


def _shape(arguments: PlanArguments, tokens: float | None, vocab_size: int, length: int) -> Shape:
    if arguments.model_config is not None:
        name = arguments.model_config
        return shape_of_option(name, vocab_size or 4096, length)
    size = arguments.parameters
    if size is None:
        if tokens is None:
            raise UsageError(
                "--documents_train_file alone names no model; add --parameters or --model_config"
            )
        size = max(1e5, tokens / OPTIMAL_TOKENS_PER_PARAMETER)
    return shape_of_size(size, vocab_size or default_vocab_size(size))


def _fitted(job: Job, *, is_fixed: bool) -> Job:
    """The job with the strategy, batch and recomputation that fit into the GPUs, or the smallest."""
    num_devices = job.machines.num_devices
    strategies: list[Strategy] = ["one device"] if num_devices == 1 else ["ddp", "fsdp"]
    size = job.batch_size
    sizes = [size] if is_fixed else [size >> shift for shift in range(5) if size >> shift]
    recomputing = (True,) if job.activation_checkpointing else (False, True)
    tries = [
        replace(job, strategy=strategy, batch_size=size, activation_checkpointing=recomputes)
        for strategy in strategies
        for recomputes in recomputing
        for size in sizes
        # Small batches leave a GPU idle: rather recompute, or share the model.
        if size >= 4 or is_fixed or (recomputes and strategy == strategies[-1])
    ]
    gpu = job.machines.gpu
    assert gpu is not None
    limit = USABLE_FRACTION * gpu.memory_bytes
    found = next((one for one in tries if memory_of(one).total <= limit), tries[-1])
    wanted = next(tokens for most, tokens in _STEP_TOKENS if job.shape.num_parameters < most)
    wanted = min(wanted, job.num_tokens / 1000)  # some steps there must be
    batch_tokens = found.batch_size * found.max_sample_length * num_devices
    return replace(found, accumulate_grad_batches=max(1, round(wanted / batch_tokens)))


def memory_of(job: Job, *, bfloat16: bool = True) -> TrainingMemory:
    """What one device needs."""
    return training_memory(
        job.shape,
        optimizer=job.optimizer,
        strategy=job.strategy,
        num_devices=job.machines.num_devices,
        tokens_per_batch=job.batch_size * job.max_sample_length,
        checkpointed=job.activation_checkpointing,
        bfloat16=bfloat16,
    )
