"""The real bot process beside a model that is made for conversation: every test has its own chat."""

from collections.abc import Iterator
from typing import Any

import pytest

from full_stack_transformer.serving.client import Turn, WantedAnswer
from full_stack_transformer.telegram.texts import ENGLISH, RUSSIAN
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_forks import QUICK, BotForks, ForkedBot, running_bot
from tests.telegram.bot_process import bot_command
from tests.telegram.stand_in_service import MODEL, StandInService, serving
from tests.telegram.watching import finals, labels, words_of

WITH_LIMITS = False
OTHER = "a-model-with-a-rather-long-name/of-an-organisation/and-a-version-1.2.3"

pytestmark = pytest.mark.usefixtures("bot")


@pytest.fixture(scope="module")
def service() -> Iterator[StandInService]:
    stand_in = StandInService(chat_template=True)
    stand_in.more_models = (OTHER,)
    with serving(stand_in) as running:
        yield running


@pytest.fixture(scope="module")
def bot(telegram: FakeBotApi, service: StandInService, forks: BotForks) -> Iterator[ForkedBot]:
    command = bot_command(service.url, telegram.url, "--system_prompt", "Be kind.")
    forked = forks.bot(command, telegram.token, QUICK)
    with running_bot(forked) as running:
        yield running


def _asked(service: StandInService, content: str) -> WantedAnswer:
    """The request whose last message this is, or ends with."""
    found = [
        one
        for one in service.requests
        if isinstance(one, WantedAnswer) and one.messages[-1].content.endswith(content)
    ]
    return found[-1]


def test_a_model_of_conversations_is_talked_to(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    assert words_of(telegram, chat_id, "/start")["text"].startswith("Hello! Ask me anything")
    question = f"Who are you? {chat_id}"
    telegram.write(chat_id, question)
    finals(telegram, chat_id)
    request = _asked(service, question)
    assert request.messages == (Turn("system", "Be kind."), Turn("user", question))
    assert request.model == MODEL
    # Nothing of its own: the model's defaults let answers run to their end.
    assert (request.max_tokens, request.temperature) == (None, None)


def test_a_chat_has_a_system_prompt_of_its_own(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    assert "Be kind." in words_of(telegram, chat_id, "/system")["text"]
    assert words_of(telegram, chat_id, "/system Be brief.\nVery.")["text"] == ENGLISH.setting_set
    question = f"And now? {chat_id}"
    telegram.write(chat_id, question)
    finals(telegram, chat_id)
    assert _asked(service, question).messages[0] == Turn("system", "Be brief.\nVery.")
    words_of(telegram, chat_id, "/system -")
    assert "Be kind." in words_of(telegram, chat_id, "/system")["text"]


def test_one_of_several_models_is_chosen_by_button_or_name(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    panel = words_of(telegram, chat_id, "/model")
    assert labels(panel)[-2:] == [[f"• {MODEL}"], [OTHER[:60]]]
    telegram.press(chat_id, panel["message_id"], button=OTHER[:60])
    telegram.requests("editMessageText", chat_id, at_least=1)
    (panel,) = telegram.bot_messages(chat_id)
    assert labels(panel)[-1] == [f"• {OTHER[:60]}"]
    question = f"Which one? {chat_id}"
    telegram.write(chat_id, question)
    finals(telegram, chat_id)
    assert _asked(service, question).model == OTHER
    assert OTHER in words_of(telegram, chat_id, "/status")["text"]
    assert words_of(telegram, chat_id, f"/model {MODEL.upper()}")["text"] == ENGLISH.setting_set
    assert OTHER in words_of(telegram, chat_id, "/model none")["text"]
    telegram.write(chat_id, f"{question} again")
    finals(telegram, chat_id, at_least=2)
    assert _asked(service, "again").model == MODEL


def test_markdown_becomes_entities_also_while_it_grows(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    question = f"In Markdown {chat_id}"
    service.continuations[question] = lambda: (
        "# Title\n\nSome **bold** `code` 🙂 *text*\n\n```python\nprint(1)\n```\n"
        + "And **more** of it.\n" * 30
    )
    with service.holding(question, after_pieces=10):
        telegram.write(chat_id, question)
        draft = telegram.draft(chat_id, "Title")
        assert draft["text"].startswith("Title\n\nSome bold")
    (answer,) = finals(telegram, chat_id)
    assert answer["text"].startswith(
        "Title\n\nSome bold code 🙂 text\n\nprint(1)\n\nAnd more of it."
    )
    kinds = [(one["type"], one["offset"], one["length"]) for one in answer["entities"][:5]]
    assert kinds == [
        ("bold", 0, 5),
        ("bold", 12, 4),
        ("code", 17, 4),
        ("italic", 25, 4),
        ("pre", 31, 8),
    ]
    assert answer["entities"][4]["language"] == "python"


def test_a_text_file_and_its_caption_are_a_question(
    telegram: FakeBotApi, service: StandInService, chat_id: int
) -> None:
    file = {"name": "my notes.md", "text": "\ufeffone\r\n```two```\n"}
    content = {"caption": f"Sum this up {chat_id}"}
    telegram.write(chat_id, content=content, file=file)
    finals(telegram, chat_id)
    asked = _asked(service, "````")
    expected = f"Sum this up {chat_id}\n\n````my_notes.md\none\n```two```\n````"
    assert asked.messages[-1].content == expected
    # Without a caption; and by its type where the name says nothing.
    telegram.write(chat_id, file={"name": "LICENSE", "text": "free", "mime_type": "text/plain"})
    finals(telegram, chat_id, at_least=2)
    assert _asked(service, "free\n```").messages[-1].content == "```LICENSE\nfree\n```"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"name": "x.txt", "hex": "ff00"}, "unreadable"),
        ({"name": "x.txt", "text": " \n"}, "unreadable"),
        ({"name": "x.txt", "text": "a" * 300_000}, "unreadable"),
        ({"name": "x.zip", "hex": "504b"}, "not_a_text"),
    ],
    ids=["bytes", "empty", "large", "archive"],
)
def test_other_files_are_refused(
    telegram: FakeBotApi, chat_id: int, file: dict[str, Any], words: str
) -> None:
    telegram.write(chat_id, file=file)
    (answer,) = telegram.bot_messages(chat_id, at_least=1)
    assert answer["text"] == getattr(ENGLISH, words)


def test_every_unknown_command_is_answered(telegram: FakeBotApi, chat_id: int) -> None:
    for _ in range(3):
        assert words_of(telegram, chat_id, "/unknown")["text"] == ENGLISH.unknown_command


def test_the_bot_describes_itself_in_its_languages(telegram: FakeBotApi) -> None:
    described = {
        record["parameters"].get("language_code", ""): record["parameters"]["description"]
        for record in telegram.requests("setMyDescription", at_least=2)
    }
    assert described == {"": ENGLISH.description, "ru": RUSSIAN.description}
    short = telegram.requests("setMyShortDescription", at_least=2)
    assert [one["status"] for one in short] == [200, 200]


def test_a_russian_user_reads_russian_only(telegram: FakeBotApi, chat_id: int) -> None:
    panel = words_of(telegram, chat_id, "/settings", language_code="ru")
    assert "Температура: авто" in [label for row in labels(panel) for label in row]
    question = f"Кто ты? {chat_id}"
    telegram.write(chat_id, question, language_code="ru")
    telegram.bot_messages(chat_id, at_least=1, button=RUSSIAN.repeat_button)
    why = words_of(telegram, chat_id, "/why", language_code="ru")["text"]
    assert "Режим Беседа" in why
    assert "конец текста" in why
    assert "auto" not in why
