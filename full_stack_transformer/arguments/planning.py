"""Options of `fst plan`."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.arguments.checks import at_least, between
from full_stack_transformer.errors import UsageError

# What the tables and formulas were made for; outside of it a plan would pretend to know something.
_LEAST_TOKENS, _MOST_TOKENS = 1e4, 1e14
_LEAST_PARAMETERS, _MOST_PARAMETERS = 1e5, 1e13


@dataclass(frozen=True)
class PlanArguments:
    """Estimate time, cost, memory and disk of preparing, training and generating, and print the commands."""

    _: KW_ONLY
    tokens: float | None = None
    """Tokens that the training sees, repetitions counted, such as 1e9. Default: those of --dataset_dir or
    --documents_train_file times --max_epochs, else 20 per parameter."""
    parameters: float | None = None
    """Parameters of the model, such as 2e6. Default: those of --model_config, else a twentieth of --tokens.
    Of a model that is no preset the plan prints the file for --model_config."""
    model_config: str | None = None
    """Instead of --parameters: tiny, micro, mini, small, base, gpt2, or a JSON file with the fields of a
    transformers config."""
    machines: str = "this"
    """Where it runs: this (the machine is measured), or GPUs such as H100, 8xH100, or 4x8xH100 for four
    machines of eight."""
    dataset_dir: Path | None = None
    """A dataset written by prepare_dataset: its tokens, vocabulary and sample length are used."""
    documents_train_file: tuple[Path, ...] = ()
    """Documents to measure with, as for prepare_dataset; may be repeated. Default: the source files of
    Python's library."""
    max_epochs: int = 1
    """Passes over the training samples; the corpus has --tokens divided by it."""
    vocab_size: int = 0
    """Vocabulary size. Default 0: that of --dataset_dir, else 1,024 to 65,536 with the size of the model."""
    max_sample_length: int = 0
    """Tokens per sample. Default 0: that of --dataset_dir, else 256 on this machine and 2,048 on GPUs."""
    batch_size: int = 0
    """Samples per batch and device. Default 0: 16 on this machine; on GPUs as many as fit, up to 16."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the training."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    num_generated_tokens: int = 200
    """Tokens that are generated at the end, one text at a time."""
    price_per_hour: float | None = None
    """Price of one device for an hour, in any currency; of the whole machine with --machines this. Default:
    an assumption for GPUs, which the plan states."""
    utilization: float | None = None
    """On GPUs: fraction of the peak that one device uses for the model's arithmetic (MFU). Default: 0.4."""
    seconds: float = 8.0
    """Seconds of measured training steps on this machine; preparation, start, validation and generation are
    measured too and take about 15 more."""
    json: bool = False
    """Print JSON instead of a page."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        if self.parameters is not None and self.model_config is not None:
            raise UsageError("pass --parameters or --model_config, not both")
        if self.dataset_dir is not None and (
            self.tokens is not None or self.documents_train_file or self.vocab_size
        ):
            raise UsageError(
                "--dataset_dir has its own tokens, documents and vocabulary; omit --tokens, "
                "--documents_train_file and --vocab_size, or --dataset_dir"
            )
        given = (self.tokens, self.parameters, self.model_config, self.dataset_dir)
        if all(one is None for one in given) and not self.documents_train_file:
            raise UsageError(
                "pass --tokens, --parameters, --model_config or --dataset_dir; for example "
                "fst plan --tokens 1e7 --parameters 2e6"
            )
        between(self, _LEAST_TOKENS, _MOST_TOKENS, "tokens")
        between(self, _LEAST_PARAMETERS, _MOST_PARAMETERS, "parameters")
        at_least(self, 1, "max_epochs", "num_generated_tokens")
        at_least(self, 0, "batch_size", "price_per_hour")
        between(self, 0.01, 1, "utilization")
        between(self, 1, 600, "seconds")
        if self.vocab_size:
            between(self, 260, 1e7, "vocab_size")
        if self.max_sample_length:
            between(self, 8, 1e7, "max_sample_length")
