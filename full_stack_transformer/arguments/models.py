"""Options of the commands that measure, change and try a model."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.arguments.checks import (
    at_least,
    between,
    check_sampling,
    parsed_logit_bias,
)
from full_stack_transformer.arguments.data import RowTaskName
from full_stack_transformer.errors import UsageError

# Where the path of data may be left out.
NO_DATA = Path("-")


@dataclass(frozen=True)
class AverageCheckpointsArguments:
    """Average the weights of models of one shape, such as checkpoints of one training, into a model
    directory."""

    models: tuple[Path, ...]
    """Two or more model directories, experiment directories or .ckpt files."""
    _: KW_ONLY
    output_dir: Path
    """Model directory to write; must not exist yet."""

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        if len(self.models) < 2:
            raise UsageError(f"--models must name at least two models, found {len(self.models)}")


@dataclass(frozen=True)
class WhitenArguments:
    """Fit BERT-whitening (Su et al. 2021) on texts and write a model that embeds with it, in the format of
    sentence-transformers."""

    model: Path
    """Model directory or experiment directory: a sentence encoder, a masked or a causal language model."""
    texts: tuple[Path, ...]
    """Files of texts, or directories of such: .jsonl, or one text per line; each plain, .gz or .zst."""
    _: KW_ONLY
    output_dir: Path
    """Model directory to write; must not exist yet."""
    num_dimensions: int | None = None
    """Dimensions to keep, at most; without it as many as the embeddings have variance in."""
    pooling: Literal["cls", "mean", "max", "first_last_avg", "last"] | None = None
    """What makes one vector of a text's tokens; without it what the model says, else mean."""
    text_field: tuple[str, ...] = ("text", "sentence1", "sentence2")
    """Fields of JSON Lines that hold texts; may be repeated."""
    max_length: int | None = None
    """Tokens of a text, at most; without it what fits into the model."""
    normalize: bool = False
    """Bring vectors to length 1."""
    epsilon: float = 1e-12
    """Part of the largest variance that is added to each; more damps directions of little variance."""
    batch_size: int = 32
    """Texts in a batch; the figures do not depend on it."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, mps."""

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        at_least(self, 1, "batch_size")
        between(self, 0, 1, "epsilon")
        for name in ("num_dimensions", "max_length"):
            if getattr(self, name) is not None:
                at_least(self, 1, name)
        if not self.texts:
            raise UsageError("TEXTS must name a file of texts at least")


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure a model on samples or labelled rows and print the figures of its task as JSON."""

    model: Path
    """Model directory, experiment directory or .ckpt file."""
    dataset_dir: Path = NO_DATA
    """Language models: dataset directory whose validation samples are used; its tokenizer must be the
    model's. Other tasks: a file of labelled rows, or a directory with train, valid and test rows. Not needed
    with --harness."""
    _: KW_ONLY
    split: Literal["auto", "train", "valid", "test"] = "auto"
    """Rows of a directory to measure on. auto: test where there are some, else valid."""
    task: RowTaskName | None = None
    """What to do with labelled rows; without it what the model was trained for. A causal model chooses by
    likelihood without a head, and any model embeds sentences, by the mean of its last layer."""
    train_file: Path | None = None
    """Rows that the baselines learn from, where the data are a single file."""
    baselines: bool = True
    """Measure beside it the commonest answer, counting words, and the same model untrained."""
    num_resamples: int = 500
    """Times that the rows are drawn again for the 95 % intervals; 0 for none."""
    output_dir: Path | None = None
    """Directory for predictions.jsonl, worst_errors.jsonl, results.json and confusion_matrix.svg."""
    batch_size: int = 16
    """Samples in a batch; the figures do not depend on it."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, mps."""
    weights_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Also measure the model with such weights, as fst generate and fst serve compute with them, and print
    the change of the perplexity beside it."""
    generation: int = 0
    """Also continue so many validation texts, and compare with how they go on; 0 for none."""
    max_new_tokens: int = 64
    """Tokens of such a continuation, at most."""
    temperature: float = 0.0
    """Randomness of such a continuation; 0 always takes the likeliest token."""
    harness: Path | None = None
    """Instead run this task file of lm-evaluation-harness (YAML) on the model, offline; the paths of its data
    are relative to it. Needs the extra harness."""

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        at_least(self, 1, "batch_size", "max_new_tokens")
        at_least(self, 0, "generation", "num_resamples")
        between(self, 0, 100, "temperature")
        if (self.dataset_dir == NO_DATA) == (self.harness is None):
            raise UsageError("pass data to measure on or --harness TASK.yaml, and not both")
        if self.harness is not None and self.generation:
            raise UsageError("--generation continues texts of a dataset directory; drop --harness")


@dataclass(frozen=True)
class GenerateArguments:
    """Continue a prompt and print the text while it is made."""

    model: Path
    """Model directory, experiment directory or .ckpt file."""
    _: KW_ONLY
    prompt: str | None = None
    """Text to continue; without it and --prompt_file the text comes from standard input."""
    prompt_file: Path | None = None
    """File that holds the text to continue, in UTF-8."""
    interactive: bool = False
    """Read line after line and answer each: a chat where the model has a chat template, else one text that
    goes on. /reset begins anew, /seed N seeds the next answer, /quit or Ctrl-D ends, Ctrl-C stops an
    answer."""
    max_new_tokens: int = 128
    """Tokens to add, at most."""
    min_new_tokens: int = 0
    """Tokens to add before the text may end."""
    temperature: float = 0.7
    """Randomness: 0 always takes the likeliest token, 1 follows the model's probabilities."""
    top_k: int = 0
    """Choose among the so many likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Choose among tokens with at least this part of the likeliest one's probability; 0 for all."""
    typical_p: float = 1.0
    """Choose among the tokens of the most typical surprise that together have this probability."""
    repetition_penalty: float = 1.1
    """Divides the scores of tokens that already occurred; 1 for none."""
    presence_penalty: float = 0.0
    """Subtracted from the scores of tokens that are in the new text."""
    frequency_penalty: float = 0.0
    """Subtracted from the scores of tokens for each time that they are in the new text."""
    logit_bias: tuple[str, ...] = ()
    """ID=VALUE: added to the score of this token id; may be repeated."""
    num_return_sequences: int = 1
    """Independent continuations of the prompt."""
    stop: tuple[str, ...] = ()
    """End before this text; may be repeated."""
    ignored_words: tuple[str, ...] = ()
    """Text that must never appear; may be repeated."""
    log_probabilities: int | None = None
    """Instead of the text print each token as a line of JSON: its log-probability and so many
    alternatives."""
    seed: int | None = None
    """Seed of the first continuation, the next ones follow it; without it a random one, which is logged."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, mps."""
    weights_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Arithmetic of the weights. auto: bfloat16 where the hardware computes in it. int8: the fastest,
    with a small loss of quality, which fst evaluate --weights_dtype int8 measures."""

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        check_sampling(self)
        at_least(self, 1, "num_return_sequences")
        at_least(self, 0, "top_k", "min_new_tokens")
        between(self, 0, 1, "min_p")
        between(self, 1e-6, 1, "typical_p")
        between(self, -100, 100, "presence_penalty", "frequency_penalty")
        self.logit_biases()
        for name in ("seed", "log_probabilities"):
            if getattr(self, name) is not None:
                at_least(self, 0, name)
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"--min_new_tokens {self.min_new_tokens} is above --max_new_tokens {self.max_new_tokens}"
            )
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("pass --prompt or --prompt_file, found both")
        if self.interactive and self.num_return_sequences > 1:
            raise UsageError(
                "--interactive gives one answer at a time; drop --num_return_sequences"
            )
        if self.interactive and self.log_probabilities is not None:
            raise UsageError("--interactive prints texts; drop --log_probabilities")
        if self.interactive and (self.prompt is not None or self.prompt_file is not None):
            raise UsageError("--interactive reads lines; drop --prompt and --prompt_file")

    def logit_biases(self) -> dict[int, float]:
        """--logit_bias by token id."""
        return parsed_logit_bias(self.logit_bias)
