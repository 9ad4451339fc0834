"""Text <-> token ids: the built-in tokenizers, training a tokenizer, decoding a stream.

A `DocumentTokenizer` wraps a raw `tokenizers.Tokenizer` and adds the tokens that frame a document. Text never
becomes a control token. Knows nothing of files of
documents and of models, and never imports torch.

How to implement a new tokenizer: subclass `DocumentTokenizer`, override `load` (where the vocabulary
comes from) and, to change the text before encoding, `normalize`; then pass the class:
`--tokenizer_cls_name my_module.MyTokenizer`.
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from full_stack_transformer.errors import TokenizerError, UsageError
from full_stack_transformer.own_classes import class_of_file, class_of_option
from full_stack_transformer.storage import check_pointer, versions
from full_stack_transformer.tokenization.encoders import (
    explained_failures,
    is_plain_byte_level,
    pieces,
)

BEGIN_OF_DOCUMENT = "[DOC_START]"
END_OF_DOCUMENT = "[DOC_END]"
PADDING = "[PAD]"
# In the place of a token id (or another label): nothing to predict here. PyTorch's default `ignore_index`.
IGNORED_LABEL = -100

# Of texts to train on.
_PIECE_CHARACTERS = 1 << 16
_CONFIG_FILE_NAME = "tokenizer_config.json"
_TOKENIZER_FILE_NAME = "tokenizer.json"
# The replacement for bytes that are not valid UTF-8.
_BROKEN = "\ufffd"
# In other directories: SentencePiece and WordPiece.
_OTHER_FORMS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
# What belongs to a tokenizer in the directory of a model, chat templates included.
_FILES = (
    *(
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ),
    *("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *_TEMPLATES,
)
# Key of our own class in tokenizer_config.json.
_CLASS_KEY = "full_stack_transformer_cls_name"


class DocumentTokenizer:
    """Text <-> token ids, with the tokens that begin and end a document and that pad a batch."""

    hub_name: str | None = None
    """Where `load` looks when no path is given."""
    text_before: str = ""
    """Encoded with the text of a document, before it."""
    text_after: str = ""
    """Encoded with the text of a document, after it."""

    def __init__(self, backend: Tokenizer, *, begin: str, end: str, pad: str) -> None:
        # Lost when a tokenizer is saved or copied, so it is set here, for all of them.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.begin, self.end, self.pad = begin, end, pad
        self.begin_id = self._id_of(begin)
        self.end_id = self._id_of(end)
        self.pad_id = self._id_of(pad)
        self.prefix_ids = [self.begin_id]
        """What stands before every document and every text that the model is given. A pretrained model's own
        tokenizer may add nothing."""
        self.source: Path | None = None
        """The directory of a pretrained model's tokenizer, whose files are kept as they are."""

    @classmethod
    def load(cls, path: str | None) -> Self:
        """Open a directory or hub name.

        A document, like any text, begins with what this tokenizer puts before a text, which may be nothing,
        and it ends with its end token. A class of one's own frames it by begin and end token.

        Raises:
            TokenizerError: there is no tokenizer at `path`, or it has no begin and end token.
        """
        directory = _local_directory(path, cls.hub_name)
        backend = _read_backend(directory)
        config = _read_config(directory)
        begin = _first_named(config, ("bos_token", "cls_token", "eos_token"))
        end = _first_named(config, ("eos_token", "sep_token", "bos_token"))
        if begin is None or end is None:
            raise TokenizerError(
                f"the tokenizer at {directory} has no begin or end token (bos_token, eos_token, "
                f"cls_token, sep_token in {_CONFIG_FILE_NAME}); name them there, or write a class with "
                "its own and pass --tokenizer_cls_name"
            )
        pad = _first_named(config, ("pad_token",)) or end
        tokenizer = cls(backend, begin=begin, end=end, pad=pad)
        if cls is DocumentTokenizer and (directory / _TOKENIZER_FILE_NAME).is_file():
            tokenizer.prefix_ids = _own_prefix(tokenizer, directory, config)
            tokenizer.source = directory
        return tokenizer

    def normalize(self, text: str) -> str:
        """The text of a document, or of its beginning, as the model sees it."""
        return text

    @property
    def can_be_cut(self) -> bool:
        """Whether two parts of a text, cut between words, give the token ids of the whole."""
        is_unchanged = type(self).normalize is DocumentTokenizer.normalize
        return is_unchanged and is_plain_byte_level(self.backend)

    def after_decoding(self, text: str) -> str:
        """The text to show, from the decoded tokens."""
        return text

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each document, between what stands before it and the end token."""
        prepared = [f"{self.text_before}{self.normalize(text)}{self.text_after}" for text in texts]
        with explained_failures():
            encodings = self.backend.encode_batch_fast(prepared, add_special_tokens=False)
        return [[*self.prefix_ids, *encoding.ids, self.end_id] for encoding in encodings]

    @property
    def prefix(self) -> str:
        """The names of the tokens that stand before a document."""
        return "".join(self.backend.id_to_token(token_id) or "" for token_id in self.prefix_ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of the beginning of a document, without an end; an empty one has its begin token."""
        return [*self.prefix_ids, *self._ids_of_beginning(text)] or [self.begin_id]

    def encode_after_begin(self, text: str) -> list[int]:
        """The same with something before the first token of `text`, so that it can be predicted."""
        return [*(self.prefix_ids or [self.begin_id]), *self._ids_of_beginning(text)]

    def _ids_of_beginning(self, text: str) -> list[int]:
        prepared = f"{self.text_before}{self.normalize(text)}" if text else ""
        return self.encode_text(prepared)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, not normalized and not framed."""
        with explained_failures():
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def split_markup(self, text: str) -> list[int | str]:
        """The output of a chat template as ids of its control tokens and the texts between them."""
        encoding = self._markup_backend.encode(text, add_special_tokens=False)
        pieces: list[int | str] = []
        end = 0
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._control_ids:
                pieces += [text[end:start], token_id]
                end = stop
        return [piece for piece in [*pieces, text[end:]] if piece != ""]

    @cached_property
    def _markup_backend(self) -> Tokenizer:
        # A backend of its own: the flag is a setting of the whole object, and other threads encode texts.
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens; control tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    def leaves_out(self, token_id: int) -> bool:
        """Whether `decode` skips this id: a control token, or an id that is not in the vocabulary."""
        return token_id in self._control_ids or self.backend.id_to_token(token_id) is None

    @property
    def control_tokens(self) -> list[str]:
        """Names of the control tokens, in the order of their ids."""
        return [self.backend.id_to_token(token_id) or "" for token_id in sorted(self._control_ids)]

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of SentencePiece's tokens for single bytes, if the decoder supports them."""
        sample = self.backend.token_to_id("<0x41>")
        if sample is None or self.decode([sample]) != "A":
            return frozenset()
        ids = (self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token_id for token_id in ids if token_id is not None)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids: the largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def _id_of(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"the tokenizer has no token {token!r} in its vocabulary")
        return int(token_id)

    def save(self, directory: Path, *, model_max_length: int) -> None:
        """Write what `transformers.AutoTokenizer` and `tokenizers.Tokenizer` both open.

        The files of a pretrained model are copied, so that its chat template, its lengths and whatever else
        they say is kept.
        """
        if self.source is not None:
            copy_tokenizer_files(self.source, directory)
            return
        directory.mkdir(parents=True, exist_ok=True)
        # Not by the backend, which raises a bare Exception if the disk is full.
        content = self.backend.to_str(pretty=True)
        (directory / _TOKENIZER_FILE_NAME).write_text(content, encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.begin,
            "eos_token": self.end,
            "pad_token": self.pad,
            "model_max_length": model_max_length,
            "clean_up_tokenization_spaces": False,
            # So that text never becomes a control token in transformers either.
            "split_special_tokens": True,
            _CLASS_KEY: class_name(type(self)),
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / _CONFIG_FILE_NAME).write_text(text, encoding="utf-8")


class GPT2Tokenizer(DocumentTokenizer):
    """GPT-2's vocabulary with three tokens appended; a document is framed by them and by spaces.

    The space before the text gives its first word the token that it has inside a sentence.
    """

    hub_name = "openai-community/gpt2"
    text_before = " "
    text_after = " "

    @classmethod
    def load(cls, path: str | None) -> Self:
        """Open GPT-2's vocabulary and append begin, end and padding."""
        backend = _read_backend(_local_directory(path, cls.hub_name))
        return cls(
            _with_control_tokens(backend), begin=BEGIN_OF_DOCUMENT, end=END_OF_DOCUMENT, pad=PADDING
        )

    def after_decoding(self, text: str) -> str:
        """Without the space before the end of the document."""
        return text.removesuffix(" ")


class TrainedTokenizer(DocumentTokenizer):
    """A byte-level BPE trained on documents: every text can be encoded and decoded."""

    @classmethod
    def train(cls, documents: Iterable[str], *, vocab_size: int) -> Self:
        """Train on the documents, which are read once; deterministic."""
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        control_tokens = [BEGIN_OF_DOCUMENT, END_OF_DOCUMENT, PADDING]
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[
                AddedToken(token, special=True, normalized=False) for token in control_tokens
            ],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        # The trainer holds 256 texts at a time, and its time grows with the square of the longest word. It
        # counts words, and a piece ends where a word ends.
        size = _PIECE_CHARACTERS
        parts = (part for text in documents for part in pieces(text, size, max_word=size))
        backend.train_from_iterator(parts, trainer=trainer)
        backend = _with_control_tokens(backend)
        return cls(backend, begin=BEGIN_OF_DOCUMENT, end=END_OF_DOCUMENT, pad=PADDING)


def load_tokenizer(cls_name: str | None, path: str | None) -> DocumentTokenizer:
    """The tokenizer that `--tokenizer_cls_name` and `--tokenizer_path` name.

    A directory written by this package names its class; `GPT2Tokenizer` reads one with GPT-2's two files and
    no tokenizer.json.

    Raises:
        UsageError: the class does not exist.
        InputError: the directory names a class of a module that is not trusted.
        TokenizerError: no tokenizer can be opened.
    """
    if cls_name is None and path is not None:
        directory = Path(path)
        saved_cls_name = _read_config(directory).get(_CLASS_KEY) if directory.is_dir() else None
        if saved_cls_name is not None:
            return open_saved_tokenizer(directory)
        if (directory / "merges.txt").is_file() and not (
            directory / _TOKENIZER_FILE_NAME
        ).is_file():
            cls_name = GPT2Tokenizer.__name__
    return _find_class(cls_name or DocumentTokenizer.__name__, None).load(path)


def open_saved_tokenizer(directory: Path) -> DocumentTokenizer:
    """Open the tokenizer of a dataset or model directory, as it was when it was saved.

    What was made here frames a text as its documents were. A pretrained model is given what its own tokenizer
    gives it: a begin token or none.

    Raises:
        InputError: its class is of a module that is not trusted.
        TokenizerError: it cannot be opened.
    """
    config = _read_config(directory)
    cls_name = config.get(_CLASS_KEY)
    if cls_name is None:
        pretrained = DocumentTokenizer.load(str(directory))
        pretrained.prefix_ids = _own_prefix(pretrained, directory, config)
        return pretrained
    tokens = {
        name: _first_named(config, [f"{key}_token"])
        for name, key in (("begin", "bos"), ("end", "eos"), ("pad", "pad"))
    }
    if not all(tokens.values()):
        raise TokenizerError(
            f"{directory / _CONFIG_FILE_NAME} should name bos_token, eos_token and pad_token"
        )
    cls = _find_class(str(cls_name), directory / _CONFIG_FILE_NAME)
    return cls(_read_backend(directory), **{name: str(token) for name, token in tokens.items()})


def local_tokenizer(path: str) -> Path:
    """The directory with the files of a tokenizer: `path` itself, or what a hub name stands for.

    Raises:
        TokenizerError: there is none.
    """
    return _local_directory(path, None)


def copy_tokenizer_files(source: Path, directory: Path) -> None:
    """Copy the files of a tokenizer, and nothing else, from the directory of a model."""
    _copy(source, directory, _FILES)


def copy_chat_templates(source: Path, directory: Path) -> None:
    """Copy the chat templates beside a tokenizer."""
    _copy(source, directory, _TEMPLATES)


def _copy(source: Path, directory: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            target = directory / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _own_prefix(tokenizer: DocumentTokenizer, directory: Path, config: dict[str, Any]) -> list[int]:
    """What transformers' tokenizer of this directory puts before a text."""
    if not (directory / _TOKENIZER_FILE_NAME).is_file():
        return [tokenizer.begin_id] if config.get("add_bos_token") else []
    # Where there is a tokenizer.json, its post-processor decides, as in transformers 5.
    encoding = tokenizer.backend.encode("a", add_special_tokens=True)
    added = list(itertools.takewhile(bool, encoding.special_tokens_mask))
    return list(encoding.ids[: len(added)])


def class_name(cls: type[DocumentTokenizer]) -> str:
    """How `--tokenizer_cls_name` names the class."""
    return cls.__name__ if cls.__module__ == __name__ else f"{cls.__module__}.{cls.__name__}"


class TextStream:
    """Decodes token by token; the joined pieces equal the decoding of all tokens.

    Text that a later token may change is held back: an unfinished character, and a run of byte tokens, which
    SentencePiece's decoder reads as a whole. Only the newest tokens are decoded again, so the time per token
    does not grow with the text.
    """

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoders may treat the first token differently, so other tokens always have one before them.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""
        if self._tokenizer.leaves_out(token_id):
            return ""
        self._pending.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._text(self._pending)
        if not text.endswith(_BROKEN):
            return self._release(text, len(self._pending))
        # The text before is complete if decoding the newest token alone gives the rest.
        complete = self._text(self._pending[:-1])
        if complete + self._tokenizer.decode([token_id]) == text:
            return self._release(complete, len(self._pending) - 1)
        return ""

    @property
    def held_back(self) -> str:
        """What `finish` would give now."""
        return self._text(self._pending) if self._pending else ""

    def finish(self) -> str:
        """The text that was held back: broken characters at the end."""
        return self._release(self._text(self._pending), len(self._pending))

    def _text(self, token_ids: list[int]) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + token_ids)[len(before) :]

    def _release(self, text: str, num_tokens: int) -> str:
        if text:
            self._context = self._pending[:num_tokens]
        else:
            self._context += self._pending[:num_tokens]
        del self._pending[:num_tokens]
        return text


def _with_control_tokens(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (BEGIN_OF_DOCUMENT, END_OF_DOCUMENT, PADDING)
        ]
    )
    # So that transformers' tokenizer("a prompt") begins a document as training did.
    backend.post_processor = TemplateProcessing(
        single=f"{BEGIN_OF_DOCUMENT} $A",
        special_tokens=[(BEGIN_OF_DOCUMENT, backend.token_to_id(BEGIN_OF_DOCUMENT))],
    )
    return backend


def _find_class(name: str, place: Path | None) -> type[DocumentTokenizer]:
    """The class that --tokenizer_cls_name names, or the file at `place`."""
    known = {
        cls.__name__: cls
        for cls in _subclasses(DocumentTokenizer)
        if class_name(cls) == cls.__name__
    }
    found: Any = known.get(name)
    if "." in name and place is None:
        found = class_of_option(name, "tokenizer_cls_name", "a tokenizer")
    elif "." in name and place is not None:
        found = class_of_file(name, place, "a tokenizer")
    if isinstance(found, type) and issubclass(found, DocumentTokenizer):
        return found
    raise UsageError(
        f"{place or '--tokenizer_cls_name'} must name a class of {__name__} "
        f"({', '.join(sorted(known))}) or my_module.MyClass that derives from DocumentTokenizer; "
        f"found {name!r}"
    )


def _subclasses(cls: type[DocumentTokenizer]) -> Iterator[type[DocumentTokenizer]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _subclasses(subclass)


def _local_directory(path: str | None, hub_name: str | None) -> Path:
    if path is not None and Path(path).is_dir():
        return Path(path)
    name = path or hub_name
    if name is None:
        raise UsageError("this tokenizer class needs --tokenizer_path")
    if path is not None and Path(path).is_file():
        raise TokenizerError(
            f"--tokenizer_path should name a directory with {_TOKENIZER_FILE_NAME}, found the file {path}; "
            f"{_elsewhere(Path(path).parent)}"
        )
    if path is not None and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise TokenizerError(f"--tokenizer_path {path}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (
        Exception
    ) as error:  # the hub's client has a dozen exceptions for offline, absent and gated
        raise TokenizerError(
            f"no tokenizer at {name!r}: it is not a directory, and cannot be fetched from the hub "
            f"({type(error).__name__}); pass --tokenizer_path DIRECTORY with tokenizer.json, or with "
            "vocab.json and merges.txt"
        ) from error


def _read_backend(directory: Path) -> Tokenizer:
    tokenizer_file = directory / _TOKENIZER_FILE_NAME
    vocabulary_file, merges_file = directory / "vocab.json", directory / "merges.txt"
    for file in (tokenizer_file, vocabulary_file, merges_file):
        check_pointer(file, TokenizerError)
    try:
        if tokenizer_file.is_file():
            # Not by name: tokenizers takes only names in UTF-8.
            return Tokenizer.from_buffer(tokenizer_file.read_bytes())
        if vocabulary_file.is_file() and merges_file.is_file():
            backend = Tokenizer(models.BPE.from_file(str(vocabulary_file), str(merges_file)))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            backend.decoder = decoders.ByteLevel()
            return backend
    except Exception as error:  # tokenizers raises bare Exception on a malformed file
        raise TokenizerError(
            f"the tokenizer files in {directory} cannot be read: {error}"
        ) from error
    raise TokenizerError(
        f"{directory} should have {_TOKENIZER_FILE_NAME}, or vocab.json and merges.txt; it has neither; "
        f"{_elsewhere(directory)}"
    )


def _elsewhere(directory: Path) -> str:
    """Where the tokenizer of a directory without tokenizer.json is, or how it is had."""
    for inner in ("tokenizer", "model"):
        if (directory / inner / _TOKENIZER_FILE_NAME).is_file():
            return f"pass --tokenizer_path {directory / inner}"
    numbered = [
        one for one in versions(directory.parent, directory.name) if (one / "tokenizer").is_dir()
    ]
    if numbered:
        return f"pass --tokenizer_path {numbered[-1] / 'tokenizer'}"
    if (directory / _TOKENIZER_FILE_NAME).is_file():
        return f"name its directory: {directory}"
    for file in sorted(directory.glob("*")):
        if file.suffix == ".gguf":
            return (
                f"make a model directory of {file.name}: fst import_model {file}, then pass --tokenizer_path "
                f"data/models/{file.stem}"
            )
        if file.name in _OTHER_FORMS:
            return (
                f'convert {file.name} (pip install sentencepiece protobuf): python -c "from transformers '
                f"import AutoTokenizer as T; T.from_pretrained('{directory}')"
                f".save_pretrained('{directory}')\""
            )
    return (
        f"copy it from the model that it belongs to, or: hf download NAME --local-dir {directory}"
    )


def _read_config(directory: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", _CONFIG_FILE_NAME):
        file = directory / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenizerError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise TokenizerError(f"{file} should be a JSON object, found {type(content).__name__}")
        merged.update({key: value for key, value in content.items() if value is not None})
    return merged


def _first_named(config: dict[str, Any], keys: Sequence[str]) -> str | None:
    for key in keys:
        token = config.get(key)
        if isinstance(token, dict):  # an AddedToken, written out
            token = token.get("content")
        if token:
            return str(token)
    return None
