"""What the installed Python packages say of themselves: prose of many authors, without a network.

    descriptions (the READMEs of the package index) ──paragraphs of prose──> documents, sorted by package

Packages are pinned, so that machines with the same installation have the same documents. They are another
text than the interpreter's documentation: what a model that learned that one has forgotten, shows here.
"""

from collections.abc import Iterator
from importlib.metadata import Distribution, distributions

from full_stack_transformer import __name__ as own_name
from full_stack_transformer.document_sources.documents import (
    Document,
    falls_to_validation,
    is_prose,
    tidy,
    without_legal_paragraphs,
)
from full_stack_transformer.errors import MachineError

# Long ones are lists of changes.
_MAX_CHARACTERS = 3_000
_MIN_CHARACTERS = 300
_VALIDATION_PERMILLE = 120


def package_descriptions() -> Iterator[Document]:
    """A document for each package with some prose.

    Raises:
        MachineError: no installed package has a description.
    """
    texts = {_name(one): _prose(one) for one in distributions()}
    found = {name: text for name, text in texts.items() if len(text) >= _MIN_CHARACTERS}
    if not found:
        raise MachineError("no installed package has a description")
    for name, text in sorted(found.items()):
        if name != own_name:
            yield Document(text, f"package {name}", falls_to_validation(name, _VALIDATION_PERMILLE))


def _name(distribution: Distribution) -> str:
    return distribution.metadata["Name"].lower().replace("-", "_")


def _prose(distribution: Distribution) -> str:
    """The first paragraphs that are prose."""
    metadata = distribution.metadata
    text = metadata.get("Description") or metadata.get_payload()  # type: ignore[attr-defined]
    kept: list[str] = []
    for paragraph in without_legal_paragraphs(tidy(str(text))).split("\n\n"):
        is_full = sum(map(len, kept)) + len(paragraph) > _MAX_CHARACTERS
        if is_full:
            break
        if is_prose(paragraph) and "](" not in paragraph and "`_" not in paragraph:
            kept.append(paragraph)
    return "\n\n".join(kept)
