"""The files of conversations and preferences, read twice, and which of them are for validation."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.conversations.files import (
    RefusedRows,
    find_files,
    read_conversations,
    read_preferences,
)
from full_stack_transformer.conversations.messages import Conversation
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.preparation.encoding import DIGEST_BYTES
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    TrainedTokenizer,
)

logger = logging.getLogger(__name__)

# Conversations that belong together: one, or the two of a preference.
Group = tuple[Conversation, ...]


@dataclass
class ConversationInputs:
    """The files, and what is known of them after the first reading."""

    arguments: PrepareDatasetArguments
    files: dict[str, list[Path]]
    largest_digest_of_valid: bytes = b""
    """Training conversations up to this digest are for validation."""
    refused: RefusedRows = field(default_factory=RefusedRows)
    num_duplicates: dict[str, int] = field(default_factory=lambda: {"train": 0, "valid": 0})
    """Of the last reading."""

    def groups(self, refused: RefusedRows) -> Iterator[tuple[str, Group]]:
        """The conversations, each with the split that it is for."""
        seen: set[bytes] = set()
        self.num_duplicates = {"train": 0, "valid": 0}
        for split, path in ((split, path) for split, files in self.files.items() for path in files):
            for group in self._read(path, refused):
                digest = _digest([(one.messages, list(one.tools)) for one in group])
                if self.arguments.deduplicate == "exact":
                    if digest in seen:
                        self.num_duplicates[split] += 1
                        continue
                    seen.add(digest)
                yield split, group

    def _read(self, path: Path, refused: RefusedRows) -> Iterator[Group]:
        if self.arguments.conversations:
            for one in read_conversations(path, refused, answers_of=self.arguments.answers_of):
                yield (one,)
        else:
            for pair in read_preferences(path, refused):
                yield pair.chosen, pair.rejected

    def split_of(self, split: str, group: Group) -> str:
        """The split that a conversation is for: by a hash of what it begins with."""
        if split == "train" and self.arguments.validation_fraction:
            return "valid" if _digest_of_beginning(group) <= self.largest_digest_of_valid else split
        return split


def find_inputs(arguments: PrepareDatasetArguments) -> ConversationInputs:
    """The files that the options name.

    Raises:
        DocumentsError: a path does not exist, or holds no such files.
    """
    flag = "--conversations" if arguments.conversations else "--preferences"
    files = {"train": find_files(arguments.conversations or arguments.preferences, flag)}
    if arguments.documents_valid_file:
        files["valid"] = find_files(arguments.documents_valid_file, "--documents_valid_file")
    return ConversationInputs(arguments, files, refused=RefusedRows(arguments.on_bad_row))


def first_reading(
    inputs: ConversationInputs, tokenizer: DocumentTokenizer | None
) -> DocumentTokenizer:
    """Check every row, choose what is for validation, and train a tokenizer if none is given.

    Raises:
        DatasetError: there are too few conversations.
    """
    smallest, largest = b"\xff" * DIGEST_BYTES, b""
    counts = {"train": 0, "valid": 0}

    def texts() -> Iterator[str]:
        nonlocal smallest, largest
        for split, group in inputs.groups(inputs.refused):
            counts[split] += 1
            if split == "train":
                digest = _digest_of_beginning(group)
                smallest, largest = min(smallest, digest), max(largest, digest)
                yield from itertools.chain(*(one.texts for one in group))

    if tokenizer is None:
        vocab_size = inputs.arguments.vocab_size
        logger.info(
            "training a byte-level BPE of %s tokens on the conversations", f"{vocab_size:,}"
        )
        tokenizer = TrainedTokenizer.train(texts(), vocab_size=vocab_size)
    else:
        for _ in texts():
            pass
    if not counts["train"] or (inputs.arguments.documents_valid_file and not counts["valid"]):
        raise DatasetError(
            f"there is no conversation to learn from in {inputs.files['train'][0]}"
            if not counts["train"]
            else "the files of --documents_valid_file hold no conversation"
        )
    fraction = inputs.arguments.validation_fraction
    if fraction:
        if smallest == largest:
            raise DatasetError(
                "there is only one conversation; add others, or name one for validation with "
                "--documents_valid_file"
            )
        most = int(fraction * (1 << 8 * DIGEST_BYTES)).to_bytes(DIGEST_BYTES, "big")
        # At least one for validation, and at least one to learn.
        inputs.largest_digest_of_valid = max(smallest, most) if most < largest else smallest
    return tokenizer


def _digest(content: object) -> bytes:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=DIGEST_BYTES).digest()


def _digest_of_beginning(group: Group) -> bytes:
    """Of a preference, what both answers follow, so that one question is in one split."""
    messages = group[0].messages
    return _digest(messages[:-1] if len(group) > 1 else messages)
