"""Options of the commands that make and check data, and of the demo."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.arguments.checks import at_least, between
from full_stack_transformer.errors import UsageError
from full_stack_transformer.storage import check_name

# The tasks for which python_docs has labelled rows.
RowTaskName = Literal[
    "sequence_classification",
    "token_labelling",
    "multiple_choice",
    "span_selection",
    "sentence_embedding",
]


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
        at_least(self, 2, "min_sample_length")
        at_least(self, self.min_sample_length, "max_sample_length")
        at_least(self, 260, "vocab_size")
        at_least(self, 0, "num_workers")
        between(self, 0, 0.5, "validation_fraction")
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
