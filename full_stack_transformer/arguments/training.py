"""Options of `fst train`, `fst run_experiment` and `fst tensorboard`."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.arguments.checks import at_least, between
from full_stack_transformer.errors import UsageError
from full_stack_transformer.storage import check_name

TaskName = Literal[
    "causal_lm",
    "masked_lm",
    "sequence_classification",
    "multiple_choice",
    "span_selection",
    "token_labelling",
    "sentence_embedding",
]
# These learn from a dataset directory of prepare_dataset, the others from labelled rows.
CORPUS_TASKS = ("causal_lm", "masked_lm")


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
        at_least(self, 4, "max_length")
        at_least(self, 0, "doc_stride")
        between(self, 1e-6, 100, "temperature")
        between(self, 0.01, 0.95, "mask_probability")
        between(self, 0, 0.5, "validation_fraction")
        at_least(self, 260, "vocab_size")
        at_least(
            self, 1, "batch_size", "accumulate_grad_batches", "num_cycles", "log_every_n_steps"
        )
        at_least(self, 1, "num_nodes")
        at_least(self, 0, "num_warmup_steps", "num_generated_samples", "weight_decay")
        at_least(self, 0, "gradient_clip_val", "seed", "unlikelihood_alpha", "z_loss")
        at_least(self, 0, "early_stopping_patience", "checkpoint_every_n_minutes")
        at_least(self, -1, "max_epochs", "max_steps")
        between(self, 0, 100, "learning_rate")
        between(self, 0, 1, "min_learning_rate_ratio")
        between(self, 0, 0.95, "dropout", "label_smoothing")
        between(self, 0, 0.99999, "ema_decay")
        between(self, 0, 1, "decay_fraction")
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
    """my_module.MyData: derives from full_stack_transformer.training.data.rows.BaseDataModule."""
    model_class: str = ""
    """my_module.MyModel: a transformers model class, or a task that derives from
    full_stack_transformer.tasks.task.Task. Without it the task's own."""

    def _check_data(self) -> None:
        if not (self.data_class or self.model_class):
            raise UsageError("pass --data_class or --model_class, or train with fst train")
        if not self.data_class:
            super()._check_data()


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
