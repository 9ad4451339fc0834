"""Bytes of a block -> text, with the place of what is not UTF-8."""

from full_stack_transformer.documents.blocks import Block, DocumentCounts, EncodingErrors
from full_stack_transformer.errors import DocumentsError

_REPLACEMENT = "\ufffd"


def decode(block: Block, errors: EncodingErrors, counts: DocumentCounts) -> str:
    """The text of a block; replaced characters are counted.

    Raises:
        DocumentsError: the block is not UTF-8 and nothing may be replaced.
    """
    assert isinstance(block.content, bytes)
    try:
        return block.content.decode("utf-8")
    except UnicodeDecodeError as error:
        if errors == "error":
            byte = block.content[error.start]
            raise DocumentsError(
                f"{block.path} is not UTF-8: byte {byte:#04x} at offset {block.start + error.start}; convert "
                "it, for instance with iconv, or pass --encoding_errors replace"
            ) from error
    text = block.content.decode("utf-8", "replace")
    counts.num_replaced_characters += text.count(_REPLACEMENT)
    counts.num_replaced_characters -= block.content.count(_REPLACEMENT.encode())
    return text
