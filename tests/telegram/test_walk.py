"""The document's transcript is what the bot says today."""

from tests.telegram.walk import DOCUMENT, transcript, with_transcript


def test_the_transcript_of_the_document_is_what_happens() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert with_transcript(document, transcript()) == document, (
        "run: python -m tests.telegram.walk --write"
    )
