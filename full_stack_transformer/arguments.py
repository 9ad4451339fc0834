"""Every option of every command, on one page.

One frozen dataclass per command; the docstring under a field is its help. Fields before the marker
`_` may be given by position. `__post_init__` refuses contradictions and names the flag. Standard
library only: `fst COMMAND --help` reads this module and nothing heavier.
"""

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.errors import UsageError
from full_stack_transformer.storage import check_name

# Where the path of data may be left out.
NO_DATA = Path("-")


def _at_least(options: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not (value >= least and math.isfinite(value)):
            raise UsageError(f"--{name} must be at least {least:g}, found {value!r}")


def _between(options: object, least: float, most: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not least <= value <= most:
            raise UsageError(f"--{name} must lie between {least:g} and {most:g}, found {value!r}")


def _check_sampling(options: object) -> None:
    _at_least(options, 1, "max_new_tokens")
    _between(options, 0, 100, "temperature")
    _between(options, 1e-6, 1, "top_p")
    _between(options, 1e-6, 10, "repetition_penalty")


def _parsed_logit_bias(words: tuple[str, ...]) -> dict[int, float]:
    """The token ids and values of `ID=VALUE` words.

    Raises:
        UsageError: a word is none, or a value no number up to 100 in size.
    """
    biases: dict[int, float] = {}
    for word in words:
        token_id, _, value = word.partition("=")
        try:
            biases[int(token_id)] = float(value)
        except ValueError:
            raise UsageError(
                f"--logit_bias must be ID=VALUE, such as 11=-100, found {word!r}"
            ) from None
        if not abs(float(value)) <= 100:
            raise UsageError(f"--logit_bias must lie between -100 and 100, found {word!r}")
    return biases


TaskName = Literal[
    "causal_lm",
    "masked_lm",
    "sequence_classification",
    "multiple_choice",
    "span_selection",
    "token_labelling",
    "sentence_embedding",
]
# Of these python_docs has labelled rows.
RowTaskName = Literal[
    "sequence_classification",
    "token_labelling",
    "multiple_choice",
    "span_selection",
    "sentence_embedding",
]
# These learn from a dataset directory of prepare_dataset, the others from labelled rows.
CORPUS_TASKS = ("causal_lm", "masked_lm")


@dataclass(frozen=True)
class CollectDocumentsArguments:
    """Write documents to start with: DOCUMENTS_ROOT/SOURCE/train.txt and valid.txt. With --task labelled
    rows: DOCUMENTS_ROOT/SOURCE_TASK/train.jsonl, valid.jsonl and test.jsonl."""

    source: Literal["python_docs", "nietzsche"]
    """python_docs: the running interpreter's own documentation, no network.
    nietzsche: public-domain translations, downloaded from Project Gutenberg."""
    _: KW_ONLY
    documents_root: Path = Path("data/documents")
    """Directory under which a folder of this source's name is written."""
    end_of_document: str = "[END_OF_DOCUMENT]"
    """Line that ends each document."""
    task: RowTaskName | None = None
    """Labelled rows of python_docs instead of documents. sequence_classification: which package a docstring
    is from. token_labelling: which words are names of code. multiple_choice: which line begins a docstring.
    span_selection: which sentence of a page answers a question. sentence_embedding: whether two sentences
    are from one docstring."""

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        if self.task is not None and self.source != "python_docs":
            raise UsageError(f"--task makes rows of python_docs only, found {self.source}")


@dataclass(frozen=True)
class PrepareDatasetArguments:
    """Turn documents into a dataset directory: DATASETS_ROOT/DATASET_NAME/VERSION/."""

    _: KW_ONLY
    documents_train_file: tuple[Path, ...]
    """File of training documents, or a directory of such; may be repeated. Delimited text, .jsonl or
    .parquet; each plain, .gz or .zst."""
    documents_valid_file: tuple[Path, ...] = ()
    """File of validation documents, or a directory of such; may be repeated."""
    validation_fraction: float = 0.0
    """Without --documents_valid_file: the part of the training documents that is kept for validation,
    chosen by a hash of their text."""
    dataset_name: str
    """Name of the dataset, a folder below --datasets_root."""
    datasets_root: Path = Path("data/datasets")
    """Directory that holds all datasets."""
    end_of_document: str = "[END_OF_DOCUMENT]"
    """In delimited text a document is what stands before a line that, stripped, equals this."""
    strip_lines: bool = True
    """Strip white space at both ends of each line of delimited text; --no_strip_lines keeps indentation."""
    text_field: str = "text"
    """Field of JSON Lines, or column of Parquet, that holds the text."""
    encoding_errors: Literal["error", "replace"] = "error"
    """What to do with bytes that are not UTF-8: end with their place, or replace and count them."""
    deduplicate: Literal["none", "exact"] = "none"
    """exact: drop documents whose text occurred before, and count them."""
    tokenizer_cls_name: str | None = None
    """Class of full_stack_transformer.tokenization, such as GPT2Tokenizer, or my_module.MyClass."""
    tokenizer_path: str | None = None
    """Directory (tokenizer.json, or vocab.json and merges.txt) or hub name of a tokenizer.
    With neither this nor --tokenizer_cls_name a byte-level BPE is trained on the train file."""
    vocab_size: int = 4096
    """Number of tokens of a tokenizer trained here."""
    max_sample_length: int = 256
    """Tokens in a sample, at most; longer documents are cut into several samples."""
    min_sample_length: int = 8
    """Tokens in a sample, at least; shorter samples are dropped and counted."""
    tokenizer_backend: Literal["auto", "tokenizers", "gigatoken"] = "auto"
    """What encodes: tokenizers, the reference, or gigatoken, many times faster. auto: gigatoken where it
    is installed and gives the reference's ids."""
    num_workers: int = 0
    """Threads, or above 4 processes, that encode; 0 for one per core. The files do not depend on it."""
    resume: bool = False
    """Go on with an interrupted preparation of the same options and inputs."""

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        check_name(self.dataset_name, "--dataset_name")
        _at_least(self, 2, "min_sample_length")
        _at_least(self, self.min_sample_length, "max_sample_length")
        _at_least(self, 260, "vocab_size")
        _at_least(self, 0, "num_workers")
        _between(self, 0, 0.5, "validation_fraction")
        if bool(self.documents_valid_file) == bool(self.validation_fraction):
            raise UsageError(
                "pass either --documents_valid_file or --validation_fraction above 0 for the validation "
                f"samples; found {'both' if self.documents_valid_file else 'neither'}"
            )
        if not self.end_of_document.strip():
            raise UsageError("--end_of_document must hold a character that is not white space")


@dataclass(frozen=True)
class VerifyDatasetArguments:
    """Check every file of a dataset directory against its description; writes nothing."""

    dataset_dir: Path
    """Dataset directory: DATASETS_ROOT/NAME/VERSION, or DATASETS_ROOT/NAME for its newest version."""


@dataclass(frozen=True)
class CheckTokenizerArguments:
    """Check that a tokenizer, also one of your own, is fit for a corpus; writes nothing."""

    _: KW_ONLY
    tokenizer_cls_name: str | None = None
    """Class of full_stack_transformer.tokenization, such as GPT2Tokenizer, or my_module.MyClass."""
    tokenizer_path: str | None = None
    """Directory or hub name of a tokenizer."""


@dataclass(frozen=True)
class TrainArguments:
    """Train a model on a dataset directory or on labelled rows: EXPERIMENTS_ROOT/EXPERIMENT_NAME/VERSION/."""

    _: KW_ONLY
    task: TaskName = "causal_lm"
    """What is learned. causal_lm and masked_lm take a --dataset_dir, the others labelled rows."""
    dataset_dir: Path | None = None
    """Dataset directory that prepare_dataset wrote: DATASETS_ROOT/NAME/VERSION, or DATASETS_ROOT/NAME
    for its newest version. With labelled rows: a directory of files or folders train, valid and test, or
    the name of a data set that the package datasets loads."""
    train_file: Path | None = None
    """Labelled rows to learn from, instead of --dataset_dir: .jsonl, .csv, .tsv, .parquet, CoNLL or SQuAD
    files, or a folder with a folder of texts for each label."""
    validation_file: Path | None = None
    """Labelled rows to validate on; without it --validation_fraction of the training rows."""
    test_file: Path | None = None
    """Labelled rows for --do_predict."""
    validation_fraction: float = 0.1
    """Without validation rows: the part of the training rows that is kept for validation, chosen by a hash
    of their text (or of the field `group`, whose rows stay together)."""
    do_train: bool | None = None
    """Train; what happens if none of the three is given."""
    do_eval: bool | None = None
    """Measure the best model on the validation rows, into eval_results.json."""
    do_predict: bool | None = None
    """Predict the test rows with the best model, into test_predictions.jsonl."""
    experiments_root: Path = Path("data/experiments")
    """Directory that holds all experiments."""
    experiment_name: str = "experiment"
    """Name of the experiment, a folder below --experiments_root."""
    model_config: str = "small"
    """Shape of a model from scratch: tiny, mini, small, base, gpt2, or a JSON file with the fields of a
    transformers config."""
    model_path: str | None = None
    """Start from this model directory or hub name instead of from scratch; --model_name_or_path is the
    same."""
    tokenizer_path: str | None = None
    """Labelled rows and a model from scratch: directory or hub name of its tokenizer; without it a
    byte-level BPE of --vocab_size tokens is trained on the training rows."""
    vocab_size: int = 4096
    """Number of tokens of a tokenizer trained here."""
    max_length: int = 128
    """Tokens of a labelled row, at most; longer ones are cut, or for spans and labels read in windows."""
    doc_stride: int = 32
    """Spans and labels: tokens that two windows share; half of --max_length at most."""
    problem_type: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    """What the labels of sequence_classification are. auto: lists of names are multi_label, fractions
    regression."""
    mask_probability: float = 0.15
    """Masked language model: part of the tokens that is hidden."""
    whole_word_masking: bool = False
    """Masked language model: hide whole words."""
    pooling: Literal["cls", "mean", "max", "first_last_avg", "last"] = "mean"
    """Sentence embedding: what of the hidden states becomes the vector of a text."""
    embedding_loss: Literal["auto", "simcse", "cosine"] = "auto"
    """Sentence embedding. simcse: a text is closest to its pair (without pairs, to itself under other
    dropout). cosine: the cosine equals the score. auto: cosine where rows have a score."""
    temperature: float = 0.05
    """Sentence embedding: of the softmax over the texts of a batch in simcse."""
    resume: str | None = None
    """Go on with a training that was interrupted: `last` for the newest one of --experiment_name, or an
    experiment directory; with the options that it was started with."""
    batch_size: int = 16
    """Samples in a batch, on each device; with --batching packed or concatenated rows of
    max_sample_length tokens."""
    batching: Literal["length", "packed", "concatenated"] = "length"
    """length: samples of similar length share a batch. packed: several samples share a row and do not
    see each other. concatenated: rows are cut from all samples in a chain and see across their borders."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients are added up before an optimizer step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices and adamw for the rest: fewer tokens to the same loss, more time a
    step; it pays for small models and on a GPU."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    min_learning_rate_ratio: float = 0.1
    """Share of --learning_rate that is left at the end of a decay."""
    num_warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises from zero."""
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """What follows the warm-up. wsd: constant, then a linear decay over the last
    --decay_fraction."""
    num_cycles: int = 1
    """Cosine cycles with hard restarts over the whole training."""
    decay_fraction: float = 0.2
    """Part of the training over which --lr_schedule wsd decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    dropout: float = 0.0
    """Dropout of a model from scratch, where its architecture has one."""
    gradient_clip_val: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    unlikelihood_alpha: float = 0.0
    """Weight of the unlikelihood loss, which lowers the probability of tokens that occurred before in the
    sample (Welleck et al. 2019)."""
    label_smoothing: float = 0.0
    """Part of the target's probability that is spread over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, which keeps logits small."""
    ema_decay: float = 0.0
    """Validate and export an exponential moving average of the weights with this decay; 0 for none."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third
    more time."""
    max_epochs: int = 1
    """Times that the training samples are seen, at most; -1 for no limit."""
    max_steps: int = -1
    """Optimizer steps, at most; -1 for no limit but --max_epochs."""
    max_minutes: float | None = None
    """End after this time, with the learning rate fully decayed by then."""
    metric_for_best_model: str = "loss"
    """Figure of the validation that says which model is the best, such as accuracy, f1 or spearman."""
    early_stopping_patience: int = 0
    """End after so many validations in a row without a better one; 0 for never."""
    val_check_interval: float = 1.0
    """Validate each so many batches (above 1), or parts of an epoch (up to 1)."""
    limit_train_batches: float = 1.0
    """Use so many batches (above 1), or this part of them, in each epoch."""
    limit_val_batches: float = 1.0
    """Use so many batches (above 1), or this part of them, in each validation."""
    log_every_n_steps: int = 10
    """Optimizer steps between two points of a curve."""
    checkpoint_every_n_minutes: float = 5.0
    """Minutes between two checkpoints to resume from, beside those of each validation."""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Arithmetic of the forward and backward pass; weights stay in fp32. auto: bf16 where the hardware
    computes in it."""
    accelerator: str = "auto"
    """Lightning accelerator: auto, cpu, gpu, mps."""
    devices: str = "auto"
    """Number of devices, or a list such as 0,1."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the model with torch.compile. auto: where a compiler is there, the training is long enough
    and it is faster here."""
    strategy: str = "auto"
    """Lightning strategy: auto, ddp, fsdp."""
    num_nodes: int = 1
    """Machines that train together."""
    seed: int = 0
    """Seed of weights, dropout and the order of samples."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run on a GPU."""
    num_generated_samples: int = 2
    """Text samples at each validation; 0 for none. Their sampling parameters are read from
    text_generator_params.json in the experiment directory each time."""
    histograms: bool = False
    """Write histograms of weights and gradients at each validation."""
    profile: bool = False
    """Measure where the time of a step goes, print a table at the end and write profile.json."""
    find_learning_rate: bool = False
    """Before training, raise the learning rate until the loss diverges, and train with what it suggests."""
    find_batch_size: bool = False
    """Before training, double the batch size while it raises the tokens per second and fits into memory."""
    enable_progress_bar: bool = True
    """Show a progress line on a terminal."""

    @property
    def trains(self) -> bool:
        """Whether to train: where --do_train says so, or nothing else is asked for."""
        return not (self.do_eval or self.do_predict) if self.do_train is None else self.do_train

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        check_name(self.experiment_name, "--experiment_name")
        self._check_data()
        _at_least(self, 4, "max_length")
        _at_least(self, 0, "doc_stride")
        _between(self, 1e-6, 100, "temperature")
        _between(self, 0.01, 0.95, "mask_probability")
        _between(self, 0, 0.5, "validation_fraction")
        _at_least(self, 260, "vocab_size")
        _at_least(
            self, 1, "batch_size", "accumulate_grad_batches", "num_cycles", "log_every_n_steps"
        )
        _at_least(self, 1, "num_nodes")
        _at_least(self, 0, "num_warmup_steps", "num_generated_samples", "weight_decay")
        _at_least(self, 0, "gradient_clip_val", "seed", "unlikelihood_alpha", "z_loss")
        _at_least(self, 0, "early_stopping_patience", "checkpoint_every_n_minutes")
        _at_least(self, -1, "max_epochs", "max_steps")
        _between(self, 0, 100, "learning_rate")
        _between(self, 0, 1, "min_learning_rate_ratio")
        _between(self, 0, 0.95, "dropout", "label_smoothing")
        _between(self, 0, 0.99999, "ema_decay")
        _between(self, 0, 1, "decay_fraction")
        for name in ("val_check_interval", "limit_train_batches", "limit_val_batches"):
            limit = getattr(self, name)
            if not limit > 0 or (limit > 1 and limit != int(limit)):
                raise UsageError(
                    f"--{name} must be a part of an epoch (above 0, up to 1) or a whole number of "
                    f"batches, found {limit!r}"
                )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UsageError(f"--max_minutes must be above 0, found {self.max_minutes!r}")
        if self.max_epochs == -1 and self.max_steps == -1 and self.max_minutes is None:
            raise UsageError("--max_epochs -1 has no end; pass --max_steps or --max_minutes")

    def _check_data(self) -> None:
        if self.task in CORPUS_TASKS:
            if self.dataset_dir is None or self.train_file is not None:
                raise UsageError(
                    f"--task {self.task} needs --dataset_dir, which prepare_dataset wrote"
                    + ("; --train_file is for labelled rows" if self.train_file else "")
                )
            if self.do_eval or self.do_predict:
                raise UsageError(
                    f"--do_eval and --do_predict are for labelled rows; measure --task {self.task} with "
                    "fst evaluate"
                )
        elif (self.dataset_dir is None) == (self.train_file is None):
            found = "neither" if self.dataset_dir is None else "both"
            raise UsageError(
                f"--task {self.task} needs --dataset_dir or --train_file with labelled rows; found {found}"
            )


@dataclass(frozen=True)
class RunExperimentArguments(TrainArguments):
    """Train classes of one's own, named by dotted path; all options of fst train."""

    _: KW_ONLY
    data_class: str = ""
    """my_module.MyData: derives from full_stack_transformer.training.rows.BaseDataModule."""
    model_class: str = ""
    """my_module.MyModel: a transformers model class, or a task that derives from
    full_stack_transformer.tasks.task.Task. Without it the task's own."""

    def _check_data(self) -> None:
        if not (self.data_class or self.model_class):
            raise UsageError("pass --data_class or --model_class, or train with fst train")
        if not self.data_class:
            super()._check_data()


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
        _at_least(self, 1, "batch_size")
        _between(self, 0, 1, "epsilon")
        for name in ("num_dimensions", "max_length"):
            if getattr(self, name) is not None:
                _at_least(self, 1, name)
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
        _at_least(self, 1, "batch_size", "max_new_tokens")
        _at_least(self, 0, "generation", "num_resamples")
        _between(self, 0, 100, "temperature")
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
        _check_sampling(self)
        _at_least(self, 1, "num_return_sequences")
        _at_least(self, 0, "top_k", "min_new_tokens")
        _between(self, 0, 1, "min_p")
        _between(self, 1e-6, 1, "typical_p")
        _between(self, -100, 100, "presence_penalty", "frequency_penalty")
        self.logit_biases()
        for name in ("seed", "log_probabilities"):
            if getattr(self, name) is not None:
                _at_least(self, 0, name)
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
        return _parsed_logit_bias(self.logit_bias)


@dataclass(frozen=True)
class ServeArguments:
    """Serve a model over HTTP, OpenAI-compatible; writes nothing."""

    model: Path
    """Model directory, experiment directory or .ckpt file."""
    _: KW_ONLY
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface of the machine."""
    port: int = 9228
    """Port to listen on; 0 for any free one."""
    served_model_name: str | None = None
    """Name of the model for clients; without it the name of its experiment or directory."""
    more_models: tuple[str, ...] = ()
    """NAME=PATH of another model that is served beside; may be repeated."""
    watch: bool = False
    """When training writes a better model into the directory, serve that, between two requests."""
    max_batch_size: int = 32
    """Texts that are generated at once, of each model."""
    max_queue_size: int = 64
    """Texts that may wait, for each model; more are answered 429."""
    max_length: int | None = None
    """Tokens of prompt and answer together, at most; without it the model's context."""
    weights_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Arithmetic of the weights. auto: bfloat16 where the hardware computes in it. int8: the fastest,
    with a small loss of quality, which fst evaluate --weights_dtype int8 measures."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, mps."""
    api_keys_file: Path | None = None
    """File with a key on each line (or sha256: and its digest); the environment variable FST_API_KEYS adds
    more, separated by commas. With keys, everything but /health and the page at / needs one."""
    allowed_origins: tuple[str, ...] = ()
    """Site whose web pages may ask from a browser, such as https://example.org; may be repeated; *: all."""
    request_timeout_seconds: float = 600.0
    """Time of a request in queue and slot, at most."""
    header_timeout_seconds: float = 10.0
    """Time in which the head of a request must arrive."""
    body_timeout_seconds: float = 30.0
    """Time in which the body of a request must arrive."""
    max_body_bytes: int = 1_048_576
    """Bytes of a body, at most."""
    shutdown_seconds: float = 20.0
    """After SIGTERM: time in which running requests may finish; the others end with an error then."""
    log_format: Literal["text", "json"] = "text"
    """json: log JSON lines, with one for each request: sizes, times and outcome, never texts."""
    workers: int = 1
    """Always 1: one process owns the device. For more, run several services behind a balancer."""

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        _between(self, 0, 65535, "port")
        _at_least(self, 1, "max_batch_size", "max_body_bytes")
        _at_least(self, 0, "max_queue_size", "shutdown_seconds")
        _at_least(self, 0.01, "request_timeout_seconds", "header_timeout_seconds")
        _at_least(self, 0.01, "body_timeout_seconds")
        if self.max_length is not None:
            _at_least(self, 2, "max_length")
        for word in self.more_models:
            name, _, path = word.partition("=")
            if not name or not path:
                raise UsageError(f"--more_models must be NAME=PATH, found {word!r}")
        if self.workers != 1:
            raise UsageError(
                f"--workers {self.workers}: one process owns the device and generates for all requests "
                "together, a second one would only compete with it; for more machines or devices run one "
                "service on each, with --port, behind a balancer"
            )


@dataclass(frozen=True)
class TelegramBotArguments:
    """Answer Telegram messages with texts of a model; what is owed is kept in a database."""

    _: KW_ONLY
    service_url: str = "http://127.0.0.1:9228"
    """Address of the service that `fst serve` printed, or of any OpenAI-compatible server such as vLLM.
    The environment variable SERVICE_API_KEY holds its key where it wants one."""
    checkpoint: Path | None = None
    """Model directory, experiment directory or .ckpt file: the bot starts the service by itself."""
    device: str = "auto"
    """Where the service of --checkpoint computes: auto, cpu, cuda, mps."""
    token_file: Path | None = None
    """File that holds the bot's token; without it the environment variable TELEGRAM_BOT_TOKEN is read."""
    telegram_api_base: str = "https://api.telegram.org"
    """Address of the Bot API server, such as a local one."""
    database: Path = Path("data/telegram_bot.sqlite3")
    """SQLite file that holds what is owed, settings and conversations; one for each bot."""
    mode: Literal["auto", "continue", "chat"] = "auto"
    """What a chat does with a message before it changes its settings. auto: chat where the service says
    that the model has a chat template, else continue."""
    max_new_tokens: int = 80
    """Tokens in a text, at most, before a chat changes it."""
    temperature: float = 0.7
    """Randomness, before a chat changes it: 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the so many likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.1
    """Divides the scores of tokens that already occurred; 1 for none."""
    allowed_ids: tuple[int, ...] = ()
    """Number of a user or chat that may use the bot; may be repeated. Without any, everybody may."""
    admin_ids: tuple[int, ...] = ()
    """Number of a user who may use the bot without limits, and let others in with /allow and /deny."""
    max_tokens_per_day: int = 0
    """New tokens for each user and day (UTC); 0 for no limit."""
    webhook_url: str | None = None
    """Public https address at which Telegram delivers updates; without it the bot polls. The environment
    variable TELEGRAM_WEBHOOK_SECRET must hold a secret of at least 16 letters, digits, - or _."""
    webhook_host: str = "127.0.0.1"
    """Address to listen on for the webhook, behind a proxy that holds the certificate."""
    webhook_port: int = 8443
    """Port to listen on for the webhook; 0 for any free one."""
    monitoring_port: int | None = None
    """Port on 127.0.0.1 for /health and Prometheus /metrics; 0 for any free one, none without it."""
    log_texts: bool = False
    """Write prompts and texts to the log, and say so in /privacy; otherwise only their sizes."""

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        _check_sampling(self)
        _at_least(self, 0, "top_k", "max_tokens_per_day")
        _between(self, 0, 65535, "webhook_port")
        if self.monitoring_port is not None:
            _between(self, 0, 65535, "monitoring_port")


@dataclass(frozen=True)
class TensorboardArguments:
    """Show the curves of all experiments in a browser; writes nothing."""

    experiments_root: Path = Path("data/experiments")
    """Directory that holds all experiments."""
    _: KW_ONLY
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 6006
    """Port to listen on; 0 for any free one."""


@dataclass(frozen=True)
class DemoArguments:
    """Walk the whole road on this machine: data/demo/ with documents, dataset, experiment; then serve."""

    _: KW_ONLY
    root: Path = Path("data/demo")
    """Directory for everything that the demo writes."""
    serve: bool = True
    """Serve the model and TensorBoard at the end; --no-serve ends after generating."""
    minutes: float = 5.0
    """Time to train, in minutes."""
    fresh: bool = False
    """Train anew even when an earlier demo finished."""
    port: int = 9228
    """Port of the service."""
    tensorboard_port: int = 6006
    """Port of TensorBoard."""
