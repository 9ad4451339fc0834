"""Options of the commands that write and check data, and of the demo."""

from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from full_stack_transformer.arguments.checks import (
    ClusterOptions,
    OwnClassesOptions,
    at_least,
    between,
    check_ray_address,
    num_bytes,
)
from full_stack_transformer.errors import UsageError
from full_stack_transformer.object_storage import check_url, is_url
from full_stack_transformer.storage import check_name
from full_stack_transformer.tasks.catalogue import EXAMPLE_ROWS, ExampleName

# The part of conversations that is for validation if nothing else is said.
_VALIDATION_OF_CONVERSATIONS = 0.05
# A page; less is a typing error.
_MIN_SHARD_BYTES = 4096
# A few hundred MB: requests for it cost little, and eight of them fit into a cache.
_STORED_SHARD_SIZE = "500MB"
# What --delimiter may be called.
_DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " ", "\\t": "\t"}


@dataclass(frozen=True, kw_only=True)
class RowFileOptions:
    """Files of labelled rows."""

    text_column: tuple[str, ...] = ()
    """Column with the text: its name or, in a table or CoNLL file, its number from 1; give the option
    twice for pairs of texts. Default: found by its name."""
    label_column: str | None = None
    """Column with the label, in the same way."""
    delimiter: str | None = None
    """Character between the columns of a table: tab, comma, semicolon, pipe, space or the character
    itself. Default: found in the file."""
    header: bool | None = None
    """Whether the first line of a table has the names of the columns; --no_header if it is a row. Default:
    found in the file."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Rows that cannot be read: stop with an error, or skip them and report how many."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        object.__setattr__(self, "text_column", tuple(self.text_column))  # JSON has lists
        if self.delimiter is not None and len(self.delimiter_character or "") != 1:
            raise UsageError(
                f"--delimiter must be one character, or one of {', '.join(list(_DELIMITERS)[:5])}; found "
                f"{self.delimiter!r}"
            )

    @property
    def delimiter_character(self) -> str | None:
        """What --delimiter stands for."""
        return None if self.delimiter is None else _DELIMITERS.get(self.delimiter, self.delimiter)

    def how_to_read(self) -> dict[str, Any]:
        """The options that are not the default, as JSON has them: they decide what the rows are."""
        values = {field: getattr(self, field.name) for field in fields(RowFileOptions)}
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field, value in values.items()
            if value != field.default
        }


@dataclass(frozen=True)
class CollectDocumentsArguments:
    """Write documents to start with: DOCUMENTS_ROOT/SOURCE/train.txt and valid.txt. With --task, write
    labelled rows: DOCUMENTS_ROOT/SOURCE_TASK/train.jsonl, valid.jsonl and test.jsonl."""

    source: Literal["python_docs", "nietzsche", "package_descriptions"]
    """python_docs: the documentation of the running Python interpreter, without network.
    nietzsche: public-domain translations, downloaded from Project Gutenberg. package_descriptions: what the
    installed Python packages say of themselves, without network."""
    _: KW_ONLY
    documents_root: Path = Path("data/documents")
    """Directory in which the folder of this source is written."""
    end_of_document: str = "[END_OF_DOCUMENT]"
    """Line that ends each document."""
    task: ExampleName | None = None
    """Write labelled rows of python_docs instead of documents. Classification: the package of a docstring.
    Token labelling: words that are names of code. Multiple choice: the first line of a docstring. Span
    selection: the sentence that answers a question. Sentence embedding: whether two sentences are from the
    same docstring. Supervised fine-tuning: conversations about the library, for --conversations."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        if self.task is not None and self.source != "python_docs":
            raise UsageError(f"--task works with python_docs only, found {self.source}")
        if self.task is not None and self.task not in EXAMPLE_ROWS:
            raise UsageError(
                f"--task must be one of {', '.join(EXAMPLE_ROWS)}; found {self.task!r}"
            )


@dataclass(frozen=True, kw_only=True)
class DataCacheOptions:
    """Data in object storage."""

    data_cache: Path | None = None
    """Dataset at a URL such as s3://bucket/datasets/NAME: directory of local copies of its files, which the
    processes of a machine share. Default: ~/.cache/full_stack_transformer/objects."""
    data_cache_bytes: str = "20GB"
    """Size of all copies in it, at most; those that were not read for longest are removed."""

    @property
    def cache_bytes(self) -> int:
        """--data_cache_bytes as a number."""
        return num_bytes(self.data_cache_bytes, "data_cache_bytes")


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """Documents."""

    validation_fraction: float = 0.0
    """Without --documents_valid_file: fraction of the training documents kept for validation, chosen by a
    hash of their text; of conversations 0.05 by default."""
    end_of_document: str = "[END_OF_DOCUMENT]"
    """Delimited text: the line that ends each document."""
    strip_lines: bool = True
    """Delimited text: strip white space at both ends of each line; --no_strip_lines keeps indentation."""
    text_field: str = "text"
    """Field of JSON Lines, or column of Parquet, with the text."""
    encoding_errors: Literal["error", "replace"] = "error"
    """Bytes that are not UTF-8: stop and show their position, or replace and count them."""
    deduplicate: Literal["none", "exact"] = "none"
    """exact: drop and count documents whose text occurred before."""


@dataclass(frozen=True, kw_only=True)
class ConversationOptions:
    """Conversations."""

    conversations: tuple[Path, ...] = ()
    """Conversations in place of documents: a file (.json, .jsonl or .parquet, also .gz and .zst of them), or
    a directory of such files; may be repeated. Rows of messages, ShareGPT or Alpaca, or an export of
    Telegram. Only answers are learned."""
    preferences: tuple[Path, ...] = ()
    """Preferences in place of documents, in such files: rows with a chosen and a rejected answer."""
    answers_of: str | None = None
    """Exports of Telegram: name of the person whose messages are answers. Default: who made the export."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Conversations that cannot be used: stop with an error, or leave them out and report how many."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Tokenizer."""

    tokenizer_cls_name: str | None = None
    """Built-in class such as GPT2Tokenizer, or your own subclass of DocumentTokenizer: my_module.MyClass."""
    tokenizer_path: str | None = None
    """Hub name of a tokenizer, or a directory with tokenizer.json or with vocab.json and merges.txt."""


@dataclass(frozen=True, kw_only=True)
class EncodingOptions(TokenizerOptions):
    """Tokenizer."""

    vocab_size: int = 4096
    """Vocabulary size of the byte-level BPE that is trained on the train file if neither
    --tokenizer_cls_name nor --tokenizer_path is given."""
    tokenizer_backend: Literal["auto", "tokenizers", "gigatoken"] = "auto"
    """tokenizers is the reference, gigatoken many times faster. auto: gigatoken if it is installed and
    gives the same ids."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Samples."""

    max_sample_length: int = 0
    """Maximum tokens per sample; longer documents are split into several samples, of longer conversations the
    last answers are left out in training. Default 0: 256, of conversations 2,048."""
    min_sample_length: int = 8
    """Minimum tokens per sample; shorter samples are dropped and counted."""


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Execution."""

    num_workers: int = 0
    """Threads, or above 4 processes, that encode; 0 for one per core. The dataset does not depend on it."""
    resume: bool = False
    """Resume an interrupted preparation with the same options and inputs."""


@dataclass(frozen=True)
class PrepareDatasetArguments(
    DocumentOptions,
    ConversationOptions,
    EncodingOptions,
    SampleOptions,
    ExecutionOptions,
    ClusterOptions,
    OwnClassesOptions,
):
    """Turn documents or conversations into a dataset directory: DATASETS_ROOT/DATASET_NAME/VERSION/."""

    _: KW_ONLY
    documents_train_file: tuple[Path, ...] = ()
    """Training documents: a file, a directory of files, a pipe, or - for standard input; may be repeated.
    Delimited text, .jsonl or .parquet, optionally compressed (.gz, .zst)."""
    documents_valid_file: tuple[Path, ...] = ()
    """Validation documents, or conversations or preferences: a file, or a directory of files; may be
    repeated."""
    dataset_name: str
    """Name of the dataset, a folder in --datasets_root."""
    datasets_root: Path = Path("data/datasets")
    """Directory of all datasets, or a URL in object storage such as s3://bucket/datasets."""
    max_shard_bytes: str | None = None
    """Write shards of at most this size, such as 500MB, instead of one file per array: for datasets that are
    copied, cached or read from elsewhere in parts. Default in object storage: 500MB."""

    @property
    def shard_bytes(self) -> int | None:
        """--max_shard_bytes as a number; None for the single form."""
        if self.max_shard_bytes is None:
            return None
        return num_bytes(self.max_shard_bytes, "max_shard_bytes")

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        check_name(self.dataset_name, "--dataset_name")
        if is_url(self.datasets_root):
            check_url(self.datasets_root, "--datasets_root")
            if self.max_shard_bytes is None:
                object.__setattr__(self, "max_shard_bytes", _STORED_SHARD_SIZE)
        self._check_kind()
        at_least(self, 2, "min_sample_length")
        at_least(self, self.min_sample_length, "max_sample_length")
        at_least(self, 260, "vocab_size")
        at_least(self, 0, "num_workers")
        between(self, 0, 0.5, "validation_fraction")
        check_ray_address(self)
        if self.shard_bytes is not None and self.shard_bytes < _MIN_SHARD_BYTES:
            raise UsageError(
                f"--max_shard_bytes must be at least {_MIN_SHARD_BYTES:,}, found {self.max_shard_bytes!r}"
            )
        if bool(self.documents_valid_file) == bool(self.validation_fraction):
            raise UsageError(
                "validation samples need either --documents_valid_file or --validation_fraction above 0; "
                f"found {'both' if self.documents_valid_file else 'neither'}"
            )
        if not self.end_of_document.strip():
            raise UsageError("--end_of_document must not be blank")

    def _check_kind(self) -> None:
        """What is prepared, and the defaults that depend on it."""
        given = [
            name
            for name in ("documents_train_file", "conversations", "preferences")
            if getattr(self, name)
        ]
        if len(given) != 1:
            raise UsageError(
                "pass --documents_train_file, --conversations or --preferences, and only one of them; found "
                f"{' and '.join(f'--{name}' for name in given) or 'none'}"
            )
        has_answers = given[0] != "documents_train_file"
        if has_answers and self.resume:
            raise UsageError(
                "--resume is for documents; conversations are prepared from the beginning"
            )
        if has_answers and self.ray_address is not None:
            raise UsageError(
                "--ray_address is for documents; conversations are prepared on one machine, leave it out"
            )
        if self.answers_of is not None and not self.conversations:
            raise UsageError("--answers_of needs --conversations")
        if not self.max_sample_length:
            object.__setattr__(self, "max_sample_length", 2048 if has_answers else 256)
        if has_answers and not self.documents_valid_file and not self.validation_fraction:
            object.__setattr__(self, "validation_fraction", _VALIDATION_OF_CONVERSATIONS)


@dataclass(frozen=True)
class VerifyDatasetArguments:
    """Check every file of a dataset directory against its description."""

    dataset_dir: Path
    """Dataset directory: DATASETS_ROOT/NAME/VERSION, or DATASETS_ROOT/NAME for its newest version; also in
    object storage, s3://…"""


@dataclass(frozen=True)
class CheckTokenizerArguments(TokenizerOptions, OwnClassesOptions):
    """Check that a tokenizer, such as your own class, can encode and decode any corpus."""


@dataclass(frozen=True)
class DemoArguments:
    """Run the whole pipeline on this machine, from documents in data/demo/ to a served model."""

    _: KW_ONLY
    chat: bool = False
    """Instead teach a pretrained model, SmolLM2-135M-Instruct, to answer questions about Python's library,
    compare its answers with those from before, and serve it."""
    root: Path = Path("data/demo")
    """Directory for all files of the demo."""
    serve: bool = True
    """Start the service (and, without --chat, TensorBoard) at the end; --no_serve ends before that."""
    minutes: float = 5.0
    """Training time in minutes."""
    fresh: bool = False
    """Train again even if an earlier demo finished."""
    port: int = 9228
    """Port of the service."""
    tensorboard_port: int = 6006
    """Port of TensorBoard."""
