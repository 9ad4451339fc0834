"""Options of `fst train`, `fst run_experiment` and `fst tensorboard`."""

import math
import re
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.arguments.checks import (
    ClusterOptions,
    OwnClassesOptions,
    at_least,
    between,
    check_ray_address,
)
from full_stack_transformer.arguments.data import DataCacheOptions, RowFileOptions
from full_stack_transformer.arguments.fine_tuning import (
    AdapterOptions,
    FineTuningOptions,
    check_fine_tuning,
)
from full_stack_transformer.errors import UsageError
from full_stack_transformer.storage import check_name, versions
from full_stack_transformer.tasks.catalogue import DEFAULT_TASK, TaskName, check_task_name

_ACCELERATOR = re.compile("auto|cpu|gpu|cuda|mps|tpu|hpu|xpu")
_DEVICES = re.compile(r"auto|-1|\[?\s*[0-9]+(\s*,\s*[0-9]+)*\s*,?\s*\]?")
# The options of a run, in its experiment directory.
ARGUMENTS_FILE_NAME = "arguments.json"
RESUME_LAST, RESUME_AUTO = "last", "auto"
# Defaults of the optimization, from scratch and from --model_path. SmolLM2-135M-Instruct on Python's
# documentation, validation loss 3.63 at the start: after 150 steps 4.62 with 1e-3, 3.33 with 5e-5.
_LEARNING_RATE, _TUNING_LEARNING_RATE = 1e-3, 5e-5
_NUM_WARMUP_STEPS, _NUM_TUNING_WARMUP_STEPS = 100, 20
# Names of --model_config; see modelling/backbones.py for their sizes.
MODEL_PRESETS = ("tiny", "micro", "mini", "small", "base", "gpt2")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data."""

    validation_file: Path | None = None
    """Labelled rows for validation. Default: --validation_fraction of the training rows."""
    test_file: Path | None = None
    """Labelled rows for --do_predict."""
    validation_fraction: float = 0.1
    """Without validation rows: fraction of the training rows kept for validation, chosen by a hash of
    their text. Rows with the same value in the field "group" stay together."""
    max_length: int = 128
    """Maximum tokens of a labelled row. Longer rows are truncated; span selection and token labelling
    split them into windows instead."""
    batching: Literal["length", "packed", "concatenated"] = "length"
    """length: samples of similar length share a batch. packed: several samples share a row and do not
    attend to each other. concatenated: rows are cut from the concatenated samples and attend across
    their borders."""
    limit_train_batches: float = 1.0
    """Batches per epoch: a number of batches (above 1), or a fraction of them (up to 1)."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model."""

    resize_embeddings: Literal["no", "new"] = "no"
    """With --model_path and a dataset that was made with another tokenizer. no: refuse it. new: take the
    dataset's tokenizer; tokens that the model knows keep their embedding, others start at the mean."""
    tokenizer_path: str | None = None
    """Labelled rows, model from scratch: directory or hub name of the tokenizer. Default: train a
    byte-level BPE of --vocab_size tokens on the training rows."""
    vocab_size: int = 4096
    """Vocabulary size of a tokenizer trained here."""
    dropout: float = 0.0
    """Dropout probability of a model from scratch, if its architecture has dropout."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is then validated and exported; 0
    turns it off."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third
    more time."""


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """Optimization."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for matrices and AdamW for the rest. It needs fewer tokens for the same loss but more
    time per step; it pays off for small models and on GPUs."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients are accumulated before an optimizer step."""
    gradient_clip_val: float = 1.0
    """Maximum gradient norm; 0 turns clipping off."""
    label_smoothing: float = 0.0
    """Fraction of the target's probability that is spread over the vocabulary."""
    unlikelihood_alpha: float = 0.0
    """Weight of the unlikelihood loss, which lowers the probability of tokens that occurred before in
    the sample (Welleck et al. 2019)."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax denominator, which keeps logits small."""
    find_batch_size: bool = False
    """Before training, double the batch size while it raises the tokens per second and fits into
    memory."""
    find_learning_rate: bool = False
    """Before training, raise the learning rate until the loss diverges, and train with the suggested
    rate."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Schedule."""

    max_steps: int = -1
    """Maximum optimizer steps; -1 for no limit other than --max_epochs."""
    num_warmup_steps: int | None = None
    """Optimizer steps over which the learning rate rises from zero. Default: 100, with --model_path 20."""
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warmup. wsd: constant, then a linear decay over the last
    --decay_fraction."""
    num_cycles: int = 1
    """Cosine cycles with hard restarts over the whole training."""
    decay_fraction: float = 0.2
    """Fraction of the training over which --lr_schedule wsd decays."""
    min_learning_rate_ratio: float = 0.1
    """Learning rate at the end of a decay, as a fraction of --learning_rate."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation."""

    val_check_interval: float = 1.0
    """Validate every N batches (above 1), or every fraction of an epoch (up to 1)."""
    limit_val_batches: float = 1.0
    """Batches per validation: a number of batches (above 1), or a fraction of them (up to 1)."""
    metric_for_best_model: str = "loss"
    """Validation metric that selects the best model, such as accuracy, f1 or spearman."""
    early_stopping_patience: int = 0
    """Stop after N validations in a row without improvement; 0 for never."""
    num_generated_samples: int = 2
    """Text samples per validation; 0 for none. Their sampling parameters are read from
    text_generator_params.json in the experiment directory each time."""
    do_train: bool | None = None
    """Train. This is the default without --do_eval and --do_predict."""
    do_eval: bool | None = None
    """Evaluate the best model on the validation rows and write eval_results.json."""
    do_predict: bool | None = None
    """Predict the test rows with the best model and write test_predictions.jsonl."""


@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """Hardware."""

    accelerator: str = "auto"
    """Lightning accelerator: auto, cpu, gpu or mps."""
    devices: str = "auto"
    """Number of devices, or a list of them such as 0,1. auto: one for each process of torchrun or srun."""
    num_nodes: int = 1
    """Number of machines that train together; torchrun and srun tell it."""
    strategy: str = "auto"
    """How several processes share the work. auto: ddp, each has the whole model. fsdp: each keeps a part of
    all weights, gradients and optimizer states (FSDP2). Or another strategy of Lightning."""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Precision of the forward and backward pass; weights stay in fp32. auto: bf16 if the hardware
    supports it."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the model with torch.compile. auto: if a compiler is installed, the training is long
    enough and it is faster on this hardware."""
    deterministic: bool = False
    """On GPUs compute slower, so that the same command gives the same bits, also after --resume; raise on
    operations that cannot. On a processor it is always so."""


@dataclass(frozen=True, kw_only=True)
class TrainingClusterOptions(ClusterOptions):
    """Cluster."""

    ray_workers: int | None = None
    """Processes that train together on the cluster of --ray_address. Default: one for each GPU, or without
    GPUs one for each node."""
    max_restarts: int = 3
    """How often Ray starts all processes again when one was lost; they go on from the last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Output."""

    experiments_root: Path = Path("data/experiments")
    """Directory of all experiments."""
    checkpoint_every_n_minutes: float = 5.0
    """Minutes between checkpoints to resume from, in addition to one per validation."""
    checkpoints: Literal["auto", "single", "sharded"] = "auto"
    """A file that the main process writes while the training waits, or a directory to which each process
    writes its part while the training goes on; auto: sharded with --strategy fsdp."""
    log_every_n_steps: int = 10
    """Optimizer steps between two points of a TensorBoard curve."""
    histograms: bool = False
    """Write histograms of weights and gradients at each validation."""
    profile: bool = False
    """Measure where the time of a step goes; print a table at the end and write profile.json."""
    enable_progress_bar: bool = True
    """Show a progress bar on a terminal."""


@dataclass(frozen=True, kw_only=True)
class MaskedLMOptions:
    """Masked language model."""

    mask_probability: float = 0.15
    """Fraction of the tokens that are masked."""
    whole_word_masking: bool = False
    """Mask whole words."""


@dataclass(frozen=True, kw_only=True)
class SequenceClassificationOptions:
    """Sequence classification."""

    problem_type: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    """Type of the labels. auto: lists of names are multi_label, fractions are regression."""


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """Span selection and token labelling."""

    doc_stride: int = 32
    """Tokens that two windows of a long text share; at most half of --max_length."""


@dataclass(frozen=True, kw_only=True)
class SentenceEmbeddingOptions:
    """Sentence embedding."""

    pooling: Literal["cls", "mean", "max", "first_last_avg", "last"] = "mean"
    """How the hidden states become the vector of a text."""
    embedding_loss: Literal["auto", "simcse", "cosine"] = "auto"
    """simcse: a text is closest to its pair (without pairs, to itself under other dropout). cosine: the
    cosine equals the score. auto: cosine if the rows have scores, else simcse."""
    simcse_temperature: float = 0.05
    """Temperature of the softmax over the texts of a batch in the SimCSE loss."""


@dataclass(frozen=True)
class TrainArguments(
    DataOptions,
    RowFileOptions,
    ModelOptions,
    OptimizationOptions,
    ScheduleOptions,
    ValidationOptions,
    HardwareOptions,
    TrainingClusterOptions,
    OutputOptions,
    FineTuningOptions,
    AdapterOptions,
    MaskedLMOptions,
    SequenceClassificationOptions,
    WindowOptions,
    SentenceEmbeddingOptions,
    DataCacheOptions,
    OwnClassesOptions,
):
    """Train a model on a dataset directory or on labelled rows: EXPERIMENTS_ROOT/EXPERIMENT_NAME/VERSION/."""

    _: KW_ONLY
    task: TaskName = DEFAULT_TASK
    """What is learned, or your own my_module.MyTask. Language models are trained on a --dataset_dir, other
    tasks on labelled rows."""
    dataset_dir: Path | None = None
    """Dataset directory written by prepare_dataset: DATASETS_ROOT/NAME/VERSION, or DATASETS_ROOT/NAME
    for its newest version; also in object storage (s3://…). Labelled rows: a directory with train, valid
    and test files or folders, or the name of a data set for the package datasets."""
    train_file: Path | None = None
    """Labelled rows to train on, instead of --dataset_dir: a .jsonl, .csv, .tsv, .parquet, CoNLL or
    SQuAD file, or a folder with one folder of texts per label."""
    experiment_name: str = "experiment"
    """Name of the experiment, a folder in --experiments_root."""
    model_config: str = "small"
    """Architecture of a model from scratch: tiny, micro, mini, small, base, gpt2, or a JSON file with the
    fields of a transformers config."""
    model_path: str | None = None
    """Model directory or hub name to start from, instead of from scratch; also --model_name_or_path."""
    batch_size: int = 16
    """Samples per batch and process; with --batching packed or concatenated, rows of max_sample_length
    tokens. An optimizer step learns batch_size x processes x accumulate_grad_batches of them."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 1e-3; with --model_path 5e-5, as what a model has learned is soon lost;
    some tasks, and adapters, have their own."""
    max_epochs: int = 1
    """Maximum passes over the training samples; -1 for no limit."""
    max_minutes: float | None = None
    """Maximum training time in minutes; the learning rate schedule ends by then."""
    seed: int = 0
    """Seed of weights, dropout and the order of samples."""
    resume: str | None = None
    """Resume an interrupted training: last for the newest one of --experiment_name, auto for the same if it
    is not finished and else a new one, or an experiment directory. Its saved options are used; of those that
    you type, limits, hardware, output and places of data may differ from them."""

    @property
    def peak_learning_rate(self) -> float:
        """--learning_rate, or its default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return _LEARNING_RATE if self.model_path is None else _TUNING_LEARNING_RATE

    @property
    def warmup_steps(self) -> int:
        """--num_warmup_steps, or its default."""
        if self.num_warmup_steps is not None:
            return self.num_warmup_steps
        return _NUM_WARMUP_STEPS if self.model_path is None else _NUM_TUNING_WARMUP_STEPS

    @property
    def trains(self) -> bool:
        """Whether to train: with --do_train, or without --do_eval and --do_predict."""
        return not (self.do_eval or self.do_predict) if self.do_train is None else self.do_train

    def check_data(self, *, reads_datasets: bool) -> None:
        """Refuse data of another kind than the task reads.

        Args:
            reads_datasets: whether it reads a dataset directory, or labelled rows.

        Raises:
            UsageError: they are.
        """
        if reads_datasets:
            if self.dataset_dir is None or self.train_file is not None:
                raise UsageError(
                    f"--task {self.task} needs --dataset_dir, a dataset written by prepare_dataset"
                    + ("; --train_file is for labelled rows" if self.train_file else "")
                )
            if self.do_eval or self.do_predict:
                raise UsageError(
                    f"--do_eval and --do_predict are for labelled rows; for --task {self.task} use "
                    "fst evaluate"
                )
        elif (self.dataset_dir is None) == (self.train_file is None):
            raise UsageError(
                f"--task {self.task} needs --dataset_dir or --train_file with labelled rows; found "
                f"{'neither' if self.dataset_dir is None else 'both'}"
            )

    def directory_to_resume(self) -> Path:
        """The experiment directory that --resume names.

        Raises:
            UsageError: there is none.
        """
        assert self.resume is not None
        if self.resume != RESUME_LAST:
            directory = Path(self.resume)
            if len(directory.parts) < 3:  # its parents are the name and the root
                directory = directory.resolve()
            if not (directory / ARGUMENTS_FILE_NAME).is_file():
                raise UsageError(
                    f"--resume must be {RESUME_LAST}, {RESUME_AUTO} or an experiment directory; {directory} "
                    f"has no {ARGUMENTS_FILE_NAME}"
                )
            return directory
        found = versions(self.experiments_root, self.experiment_name)
        if not found:
            raise UsageError(
                f"--resume {RESUME_LAST}: there is no experiment in "
                f"{self.experiments_root / self.experiment_name}; start one without --resume"
            )
        return found[-1]

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        super().__post_init__()
        check_name(self.experiment_name, "--experiment_name")
        check_task_name(self.task)
        check_fine_tuning(self)
        at_least(self, 4, "max_length")
        at_least(self, 0, "doc_stride")
        between(self, 1e-6, 100, "simcse_temperature")
        between(self, 0.01, 0.95, "mask_probability")
        between(self, 0, 0.5, "validation_fraction")
        at_least(self, 260, "vocab_size")
        at_least(
            self, 1, "batch_size", "accumulate_grad_batches", "num_cycles", "log_every_n_steps"
        )
        at_least(self, 1, "num_nodes", "ray_workers")
        at_least(self, 0, "max_restarts")
        check_ray_address(self)
        if self.ray_address is not None and (self.devices != "auto" or self.num_nodes != 1):
            raise UsageError(
                "--ray_address starts one process for each of --ray_workers, with one device each; leave out "
                "--devices and --num_nodes"
            )
        if self.ray_workers is not None and self.ray_address is None:
            raise UsageError("--ray_workers needs --ray_address, such as --ray_address local")
        at_least(self, 0, "num_warmup_steps", "num_generated_samples", "weight_decay")
        at_least(self, 0, "gradient_clip_val", "seed", "unlikelihood_alpha", "z_loss")
        at_least(self, 0, "early_stopping_patience", "checkpoint_every_n_minutes")
        at_least(self, -1, "max_epochs", "max_steps")
        between(self, 0, 100, "learning_rate")
        between(self, 0, 1, "min_learning_rate_ratio")
        between(self, 0, 0.95, "dropout", "label_smoothing")
        between(self, 0, 0.99999, "ema_decay")
        between(self, 0, 1, "decay_fraction")
        if self.resize_embeddings != "no" and self.model_path is None and self.resume is None:
            raise UsageError("--resize_embeddings is for --model_path, which is missing")
        if self.resize_embeddings != "no" and self.lora_rank:
            raise UsageError(
                "--lora_rank leaves the embeddings as they are; omit --resize_embeddings"
            )
        if not _ACCELERATOR.fullmatch(self.accelerator):
            raise UsageError(
                f"--accelerator must be auto, cpu, gpu or mps, found {self.accelerator!r}"
            )
        if not _DEVICES.fullmatch(self.devices):
            raise UsageError(
                f"--devices must be auto, a number of devices, or a list of them such as 0,1; found "
                f"{self.devices!r}"
            )
        for name in ("val_check_interval", "limit_train_batches", "limit_val_batches"):
            limit = getattr(self, name)
            if not 0 < limit < math.inf or (limit > 1 and limit != int(limit)):
                raise UsageError(
                    f"--{name} must be a fraction of an epoch (above 0, up to 1) or a whole number of "
                    f"batches, found {limit!r}"
                )
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise UsageError(
                f"--max_minutes must be a number of minutes above 0, found {self.max_minutes!r}"
            )
        if self.max_epochs == -1 and self.max_steps == -1 and self.max_minutes is None:
            raise UsageError("--max_epochs -1 never ends; add --max_steps or --max_minutes")


@dataclass(frozen=True)
class RunExperimentArguments(TrainArguments):
    """Train your own data and model classes, named by dotted path; takes all options of fst train."""

    _: KW_ONLY
    data_class: str = ""
    """my_module.MyData, a subclass of full_stack_transformer.training.data.rows.BaseDataModule."""
    model_class: str = ""
    """my_module.MyModel, a transformers model class or a subclass of
    full_stack_transformer.tasks.task.RowTask. Default: the model class of --task."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        super().__post_init__()
        if not (self.data_class or self.model_class or self.resume):
            raise UsageError("pass --data_class or --model_class, or use fst train")


@dataclass(frozen=True)
class TensorboardArguments:
    """Show the TensorBoard curves of all experiments in a browser."""

    experiments_root: Path = Path("data/experiments")
    """Directory of all experiments."""
    _: KW_ONLY
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 6006
    """Port to listen on; 0 for any free one."""


@dataclass(frozen=True)
class DoctorArguments:
    """Show this machine, what follows from it, its speed, and what is installed or missing."""

    _: KW_ONLY
    json: bool = False
    """Print JSON instead of a page."""
    seconds: float = 10.0
    """Seconds of measuring; 0 measures nothing."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        between(self, 0, 600, "seconds")
