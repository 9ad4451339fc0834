"""`fst prepare_dataset --conversations` and `--preferences`: conversations -> dataset directory.

    files --read twice--> checked conversations --chat template--> token ids, learned or not --> corpus files

The first reading checks every row and trains the tokenizer, if none is given, before anything takes long. A
conversation is one sample, however long; `datasets.cuts` says what a context leaves out of it.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.conversations.files import RefusedRows
from full_stack_transformer.conversations.messages import Conversation
from full_stack_transformer.datasets.corpus import Corpus, open_split
from full_stack_transformer.datasets.cuts import LeftOut, cut_after_answers
from full_stack_transformer.datasets.shard_writer import corpus_writer, read_shards
from full_stack_transformer.errors import DatasetError, RequestError, RowError
from full_stack_transformer.own_classes import trust_options
from full_stack_transformer.preparation.conversation_inputs import (
    ConversationInputs,
    Group,
    find_inputs,
    first_reading,
)
from full_stack_transformer.preparation.journal import SplitState
from full_stack_transformer.preparation.places import open_version
from full_stack_transformer.preparation.report import ProgressDisplay, describe, log_lengths
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    write_json,
    write_text,
)
from full_stack_transformer.tokenization.answers import (
    DOCUMENTED_TEMPLATE,
    DOCUMENTED_TEMPLATE_NAME,
    RenderedConversation,
    render_conversation,
)
from full_stack_transformer.tokenization.chat import (
    TEMPLATE_FILE_NAME,
    ChatTemplate,
    keep_chat_template,
    load_chat_template,
)
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    load_tokenizer,
    local_tokenizer,
)
from full_stack_transformer.tokenization.template_process import time_limit

logger = logging.getLogger(__name__)

TOKENIZER_DIRECTORY_NAME = "tokenizer"
# Of processor time: a template is a foreign program. One like Qwen 3's takes 7 for 400 answers.
_SECONDS_FOR_TEMPLATE = 20
_BATCH_TOKENS = 1 << 20


@dataclass
class _Split:
    """What became one split."""

    state: SplitState = field(default_factory=SplitState)
    num_answers: int = 0
    num_learned_tokens: int = 0
    num_answers_without_end: int = 0
    longest: int = 0
    """Tokens of its longest conversation."""
    left_out: LeftOut = field(default_factory=LeftOut)


def prepare_conversations(arguments: PrepareDatasetArguments) -> Path:
    """Write a new version of the dataset and return its directory.

    Raises:
        DocumentsError: a file cannot be read.
        RowError: a row holds no conversation, or the chat template refuses it.
        TokenizerError: the tokenizer cannot be opened.
        DatasetError: nothing is left to learn.
    """
    started = time.perf_counter()
    trust_options(arguments)
    given = arguments.tokenizer_cls_name is not None or arguments.tokenizer_path is not None
    with ProgressDisplay() as display:
        inputs = find_inputs(arguments)
        tokenizer = (
            load_tokenizer(arguments.tokenizer_cls_name, arguments.tokenizer_path)
            if given
            else None
        )
        with display.phase("checking", [path for files in inputs.files.values() for path in files]):
            tokenizer = first_reading(inputs, tokenizer)
        with open_version(arguments) as dataset:
            template, template_name = _save_tokenizer(tokenizer, dataset.directory, arguments)
            with display.phase("rendering"):
                splits = _write(inputs, tokenizer, template, dataset.directory)
            description = _describe(
                inputs, tokenizer, splits, dataset.directory, started, display, template_name
            )
            write_json(dataset.directory / DESCRIPTION_FILE_NAME, description)
    _log_report(inputs, splits, description, time.perf_counter() - started)
    return dataset.directory


def _save_tokenizer(
    tokenizer: DocumentTokenizer, directory: Path, arguments: PrepareDatasetArguments
) -> tuple[ChatTemplate, str]:
    """Save the tokenizer with its chat template, or with the documented one; the template and its name."""
    target = directory / TOKENIZER_DIRECTORY_NAME
    tokenizer.save(target, model_max_length=arguments.max_sample_length)
    if arguments.tokenizer_path is not None:
        keep_chat_template(local_tokenizer(arguments.tokenizer_path), target)
    template = load_chat_template(target)
    if not template.is_plain:
        return template, "own"
    write_text(target / TEMPLATE_FILE_NAME, DOCUMENTED_TEMPLATE)
    logger.info(
        "the tokenizer has no chat template: conversations are written as User: … Assistant: …, and the "
        "template is saved with the tokenizer"
    )
    return load_chat_template(target), DOCUMENTED_TEMPLATE_NAME


def _write(
    inputs: ConversationInputs,
    tokenizer: DocumentTokenizer,
    template: ChatTemplate,
    directory: Path,
) -> dict[str, _Split]:
    splits = {split: _Split() for split in ("train", "valid")}
    # Bad rows were reported in the first reading.
    quiet = RefusedRows(inputs.refused.on_bad_row, num=1 << 40)
    only_last = bool(inputs.arguments.preferences)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                _Writer(directory / name, tokenizer.vocab_size, split, inputs.arguments)
            )
            for name, split in splits.items()
        }
        for given_split, group in inputs.groups(quiet):
            try:
                rendered = [_rendered(one, template, tokenizer, only_last) for one in group]
            except RowError as error:
                inputs.refused.add(error)
                continue
            writers[inputs.split_of(given_split, group)].add(group, rendered)
    for name, split in splits.items():
        if not split.state.samples.num_samples:
            raise DatasetError(
                f"no {name} conversation is left; supply more conversations, or name some for validation "
                "with --documents_valid_file"
            )
        split.state.documents.num_duplicate_documents = inputs.num_duplicates[name]
        corpus = _opened(directory, name, split, tokenizer.vocab_size)
        split.longest = int(corpus.lengths().max())
        split.left_out = _left_out(corpus, inputs.arguments, is_pairs=only_last)
    return splits


class _Writer:
    """Appends conversations to a corpus, many at a time."""

    def __init__(
        self,
        directory: Path,
        vocab_size: int,
        split: _Split,
        arguments: PrepareDatasetArguments,
    ) -> None:
        self._corpus = corpus_writer(
            directory,
            vocab_size,
            max_shard_bytes=arguments.shard_bytes,
            has_answers=True,
            samples_together=2 if arguments.preferences else 1,
        )
        self._split = split
        self._held: list[RenderedConversation] = []
        self._num_held = 0

    def add(self, group: Group, rendered: Sequence[RenderedConversation]) -> None:
        """Append conversations that belong together."""
        split, documents = self._split, self._split.state.documents
        documents.num_documents += 1
        for conversation, one in zip(group, rendered, strict=True):
            split.num_answers += one.num_answers
            split.num_answers_without_end += one.num_without_end
            split.num_learned_tokens += int(one.learned.sum())
            num_bytes = sum(len(text.encode()) for text in conversation.texts)
            documents.num_bytes += num_bytes
            split.state.samples.num_text_bytes += num_bytes
            split.state.samples.num_samples += 1
            split.state.samples.num_tokens += len(one.token_ids)
            self._held.append(one)
            self._num_held += len(one.token_ids)
        if self._num_held >= _BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._corpus.append(
                np.concatenate([one.token_ids for one in self._held]),
                np.array([len(one.token_ids) for one in self._held], dtype=np.int64),
                np.concatenate([one.learned for one in self._held]),
            )
        self._held, self._num_held = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exception_type is None:
            self._flush()
        self._corpus.__exit__(exception_type, exception, traceback)


def _rendered(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: DocumentTokenizer,
    only_last: bool,
) -> RenderedConversation:
    """The conversation as tokens.

    Raises:
        RowError: the template refuses it, or writes none of its answers.
    """
    try:
        with time_limit(_SECONDS_FOR_TEMPLATE):
            rendered = render_conversation(
                template,
                conversation.messages,
                tokenizer,
                tools=conversation.tools,
                only_last=only_last,
                ignored=conversation.ignored,
            )
    except RequestError as error:
        raise RowError(f"{conversation.place}: {error}") from error
    if not rendered.learned[1:].any():
        raise RowError(
            f"{conversation.place}: nothing of it is learned: the chat template writes none of its answers"
        )
    return rendered


def _opened(directory: Path, name: str, split: _Split, vocab_size: int) -> Corpus:
    """A split that was just written."""
    shards = read_shards(directory / name)
    description = {
        "kind": "conversations",
        "vocab_size": vocab_size,
        f"number_of_{name}_samples": split.state.samples.num_samples,
        f"number_of_{name}_tokens": split.state.samples.num_tokens,
        **({"shards": {name: list(map(dataclasses.asdict, shards))}} if shards else {}),
    }
    return open_split(directory, description, name)


def _left_out(corpus: Corpus, arguments: PrepareDatasetArguments, *, is_pairs: bool) -> LeftOut:
    """What training leaves out with a context of --max_sample_length.

    Raises:
        DatasetError: everything.
    """
    most = arguments.max_sample_length
    if is_pairs:
        num_long = int(np.count_nonzero(corpus.lengths().reshape(-1, 2).max(axis=1) > most))
        left_out = LeftOut(num_samples=num_long, num_answers=2 * num_long)
        is_all = 2 * num_long == len(corpus)
    else:
        _, num_targets, left_out = cut_after_answers(corpus, most)
        is_all = not num_targets.any()
    if is_all:
        raise DatasetError(
            f"no {corpus.directory.name} conversation has an answer that ends within --max_sample_length "
            f"{most:,} tokens; the shortest has {int(corpus.lengths().min()):,}; raise it"
        )
    return left_out


def _describe(
    inputs: ConversationInputs,
    tokenizer: DocumentTokenizer,
    splits: dict[str, _Split],
    directory: Path,
    started: float,
    display: ProgressDisplay,
    template_name: str,
) -> dict[str, Any]:
    """The content of description.json: that of documents, and what is learned."""
    arguments = inputs.arguments
    longest = max(part.longest for part in splits.values())
    description = describe(
        dataclasses.replace(arguments, min_sample_length=2, max_sample_length=max(2, longest)),
        tokenizer,
        "tokenizers",
        {split: part.state for split, part in splits.items()},
        inputs.files,
        directory,
        started,
        display,
    )
    for split, part in splits.items():
        description["counts"][split] |= {
            "num_answers": part.num_answers,
            "num_learned_tokens": part.num_learned_tokens,
            "num_answers_without_end": part.num_answers_without_end,
            "num_cut_answers": part.left_out.num_answers,
        }
    return description | {
        "kind": "preferences" if arguments.preferences else "conversations",
        "chat_template": template_name,
        # Rows of batches need not be longer than the longest conversation.
        "max_sample_length": max(2, min(arguments.max_sample_length, longest)),
        "longest_conversation": longest,
        "num_learned_tokens": sum(part.num_learned_tokens for part in splits.values()),
        "num_cut_answers": sum(part.left_out.num_answers for part in splits.values()),
        "num_refused_rows": inputs.refused.num,
    }


def _log_report(
    inputs: ConversationInputs,
    splits: dict[str, _Split],
    description: dict[str, Any],
    seconds: float,
) -> None:
    what = "preferences" if inputs.arguments.preferences else "conversations"
    for name, split in splits.items():
        samples, documents = split.state.samples, split.state.documents
        notes = [
            f"{count:,} {note}"
            for count, note in (
                (documents.num_duplicate_documents, "duplicates dropped"),
                (split.num_answers_without_end, "answers have no token that ends them"),
            )
            if count
        ]
        logger.info(
            "%s: %s %s, %s answers, %s tokens, of which %s are learned%s",
            name,
            f"{documents.num_documents:,}",
            what,
            f"{split.num_answers:,}",
            f"{samples.num_tokens:,}",
            f"{split.num_learned_tokens:,}",
            "".join(f"; {note}" for note in notes),
        )
        if split.left_out.num_answers:
            logger.warning(
                "%s: with --max_sample_length %s, %s in training",
                name,
                f"{inputs.arguments.max_sample_length:,}",
                split.left_out,
            )
    if inputs.refused.num:
        logger.warning("left out %s rows that cannot be used", f"{inputs.refused.num:,}")
    log_lengths(description["sample_lengths"]["train"])
    num_tokens = sum(split.state.samples.num_tokens for split in splits.values())
    logger.info(
        "prepared %s tokens in %.1f s, %s tokens/s, with %s chat template",
        f"{num_tokens:,}",
        seconds,
        f"{num_tokens / seconds:,.0f}",
        "the tokenizer's own" if description["chat_template"] == "own" else "the plain",
    )
