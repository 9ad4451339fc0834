"""The document's transcript is what the bot says today."""

from tests.telegram.bot_forks import BotForks
from tests.telegram.walk import DOCUMENT, transcript, with_transcript


def test_the_transcript_of_the_document_is_what_happens(forks: BotForks) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert with_transcript(document, transcript(forks)) == document, (
        "run: python -m tests.telegram.walk --write"
    )
