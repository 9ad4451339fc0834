"""`python -m tests.telegram.walk`: a new user tries every command and button; prints the transcript.

The real bot against the fake Bot API, and a stand-in service with texts that read well. Written into
docs/telegram_bot.md with `--write`; a test compares.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

from tests.fake_bot_api.process import FakeBotApi, running_fake_bot_api
from tests.telegram.bot_forks import QUICK, BotForks, bot_forks
from tests.telegram.bot_process import bot_command
from tests.telegram.stand_in_service import Request, StandInService, prompt_of, serving

Json = dict[str, Any]

DOCUMENT = Path(__file__).parents[2] / "docs" / "telegram_bot.md"
BEGIN, END = (
    "<!-- transcript: python -m tests.telegram.walk --write -->",
    "<!-- end of transcript -->",
)
_ADMIN, _USER, _GROUP = 99, 7, -7
_WIDTH = 96

_CONTINUATIONS = (
    " there was a function that returned its own name, and nobody called it.",
    " the parser read the whole night and found no error in the stars.",
    " It waited in the queue, first come, first served, and was not afraid.",
    " a loop met its condition and came to a peaceful end.",
    " three small integers went out into the wide world without a sign.",
    " the cache remembered everything but the way home.",
)


class StoryTeller(StandInService):
    """Tells one sentence after the other, and a long text if it is asked for a long story."""

    def text_for(self, request: Request) -> str:
        """The next sentence; always the same one for a seed that was typed."""
        seed, number = request.seed or 0, len(self.requests) - 1
        chosen = seed + len(prompt_of(request)) if seed < 100 else number
        sentence = _CONTINUATIONS[chosen % len(_CONTINUATIONS)]
        if "long" in prompt_of(request):
            return sentence + " And so on, and so on." * 400
        return sentence if hasattr(request, "prompt") else sentence.strip().capitalize()


class Walk:
    """The transcript, line by line."""

    def __init__(self, telegram: FakeBotApi, service: StandInService) -> None:
        self.telegram = telegram
        self.service = service
        self.lines: list[str] = []
        self._seen: dict[int, dict[int, Json]] = {_USER: {}, _GROUP: {}, _ADMIN: {}}

    def title(self, words: str) -> None:
        """A heading; what follows is a block."""
        if self.lines:
            self.lines.append("```")
        self.lines += ["", f"#### {words}", "", "```text"]

    def says(self, text: str, num_new: int = 1, chat: int = _USER, **more: Any) -> Json:
        """The user writes, and the bot's next messages are shown; the last one is returned."""
        self._line("you", text)
        self.telegram.write(chat, text, user_id=abs(chat), **more)
        return self.sees(num_new, chat)

    def presses(
        self, message: Json, button: str, num_new: int = 0, chat: int = _USER, **more: Any
    ) -> Json:
        """The user presses a button; new messages are shown, or else the message as it is then."""
        self._line("you", f"press [{button}]")
        more = {"user_id": abs(chat), **more}
        query_id = self.telegram.press(chat, message["message_id"], button=button, **more)
        alert = self.telegram.query_answer(query_id)
        if alert["text"]:
            self._line("bot", f"(alert) {alert['text']}")
            return message
        return self.sees(num_new, chat) if num_new else self.sees_change(chat, message)

    def sees(self, num_new: int, chat: int = _USER) -> Json:
        """The next messages of the bot, once they are finished and there are no notices."""
        known = self._seen[chat]
        self._wait(
            lambda: (
                len([m for m in self._finished(chat) if m["message_id"] not in known]) >= num_new
            )
        )
        new = [m for m in self._finished(chat) if m["message_id"] not in known]
        for message in new:
            self._show(message)
        known.update({message["message_id"]: message for message in new})
        return new[-1]

    def sees_change(self, chat: int, before: Json) -> Json:
        """A message after an edit."""

        def now() -> Json:
            found = [
                m
                for m in self.telegram.bot_messages(chat)
                if m["message_id"] == before["message_id"]
            ]
            return found[0]

        self._wait(lambda: now() != before and "Stop" not in str(now().get("reply_markup")))
        self._show(now(), "edit")
        self._seen[chat][before["message_id"]] = now()
        return now()

    def _finished(self, chat: int) -> list[Json]:
        return [m for m in self.telegram.bot_messages(chat) if "[Stop]" not in "".join(_rows(m))]

    def _wait(self, condition: Any) -> None:
        until = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < until, "\n".join(self.lines)
            time.sleep(0.02)

    def _show(self, message: Json, who: str = "bot") -> None:
        text = _with_bold(message) if "text" in message else f"📎 {_document(message)}"
        for number, line in enumerate(text.splitlines() or [""]):
            self._line(who if number == 0 else "", line)
        for row in _rows(message):
            self._line("", row)

    def draft(self, words: str) -> None:
        """Show the draft that streams now."""
        draft = self.telegram.draft(_USER, words)
        assert draft["can_stop"]
        self._line("bot", "(streams, with a Stop of Telegram's own) long story …")

    def stop(self) -> Json:
        """The native Stop; the text that is left depends on the moment, so only its beginning is shown."""
        self._line("you", "press Telegram's Stop")
        self.telegram.stop(_USER)
        known = self._seen[_USER]
        self._wait(lambda: any(m["message_id"] not in known for m in self._finished(_USER)))
        for message in self._finished(_USER):
            if message["message_id"] not in known:
                known[message["message_id"]] = message
                self._line("bot", "**A long story** … (the text so far)")
                for row in _rows(message):
                    self._line("", row)
        return message

    def _line(self, who: str, text: str) -> None:
        while len(text) > _WIDTH and " " in text[:_WIDTH]:
            head, _, _ = text[:_WIDTH].rpartition(" ")
            self.lines.append(f"{who:<5} {head}")
            who, text = "", text[len(head) + 1 :]
        self.lines.append(f"{who:<5} {text}".rstrip())


def _rows(message: Json) -> list[str]:
    rows = message.get("reply_markup", {}).get("inline_keyboard", [])
    return [" ".join(f"[{button['text']}]" for button in row) for row in rows]


def _with_bold(message: Json) -> str:
    text = str(message["text"])
    for entity in message.get("entities", []):
        if entity["type"] == "bold":
            units = text.encode("utf-16-le")
            end = 2 * (entity["offset"] + entity["length"])
            bold = units[2 * entity["offset"] : end].decode("utf-16-le")
            text = f"**{bold}**" + units[end:].decode("utf-16-le")
    return text


def _document(message: Json) -> str:
    return f"{message['document']['file_name']}: {message['caption']}"


def walk(telegram: FakeBotApi, service: StandInService) -> str:
    """Do everything once; returns the transcript as Markdown."""
    tour = Walk(telegram, service)
    first = _walk_through_texts(tour)
    _walk_through_streams(tour)
    _walk_through_words(tour, first)
    _walk_through_a_group(tour)
    _walk_through_the_rest(tour)
    tour.lines.append("```")
    text = "\n".join(tour.lines).strip("\n") + "\n"
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:9228", text)
    return re.sub(r"today: [1-9]\d*", "today: 123", text)  # depends on the moment of Stop


def _walk_through_texts(tour: Walk) -> Json:
    """Texts, settings, variants; returns the first answer."""
    tour.title("Hello")
    tour.says("/start")
    tour.says("/help")
    tour.title("A text, Repeat, Continue, and a reply that branches off")
    first = tour.says("Once upon a time")
    tour.presses(first, "Repeat", num_new=1)
    tour.presses(first, "Continue", num_new=1)
    tour.says("but then", reply_to_message_id=first["message_id"])
    tour.title("Settings, by buttons and typed")
    panel = tour.says("/settings")
    panel = tour.presses(panel, "Creative")
    tour.says("/settings temperature 0.5")
    tour.says("/settings temperature 9")
    tour.says("/settings seed 11")
    tour.says("/settings variants 3")
    tour.presses(first, "Settings", num_new=1)
    tour.title("Variants are shown in place")
    answer = tour.says("In the morning")
    answer = tour.presses(answer, "▶")
    tour.presses(answer, "◀")
    tour.title("How a text was generated")
    tour.says("/why", num_new=3, reply_to_message_id=answer["message_id"])
    return first


def _walk_through_streams(tour: Walk) -> None:
    tour.title("Streaming, and Stop")
    tour.says("/settings variants 1")
    with tour.service.holding("A long story", after_pieces=20):
        tour._line("you", "A long story")
        tour.telegram.write(_USER, "A long story")
        tour.draft("A long story")
        tour.stop()
    tour.says("/stop")
    tour.title("Conversation, with a model that is made for it")
    tour.says("/settings mode chat")
    tour.says("Who are you?")
    tour.says("And yesterday?")
    tour.says("/reset")


def _walk_through_words(tour: Walk, first: Json) -> None:
    tour.title("Status, privacy, export, forget")
    tour.says("/status")
    tour.says("/privacy")
    tour.says("/export")
    question = tour.says("/forget")
    tour.presses(question, "Yes, delete everything", num_new=1)
    tour.presses(first, "Repeat")


def _walk_through_a_group(tour: Walk) -> None:
    tour.title("In a group: edits instead of drafts, and buttons for the user who asked")
    with tour.service.holding("A long evening", after_pieces=20):
        tour._line("you", "@fake_bot A long evening")
        tour.telegram.write(_GROUP, "@fake_bot A long evening", user_id=7)
        (growing,) = tour.telegram.bot_messages(_GROUP, at_least=1)
        tour._line("bot", "**A long evening** … (grows in place)")
        tour._line("", _rows(growing)[0])
        tour._line("else", "press [Stop]")
        query_id = tour.telegram.press(_GROUP, growing["message_id"], user_id=8)
        tour._line("bot", f"(alert) {tour.telegram.query_answer(query_id)['text']}")
        tour._line("you", "press [Stop]")
        tour.telegram.press(_GROUP, growing["message_id"], user_id=7)
        tour._wait(lambda: bool(tour._finished(_GROUP)))
    tour._line("edit", "**A long evening** … (the text so far)")
    tour._line("", _rows(tour._finished(_GROUP)[0])[0])


def _walk_through_the_rest(tour: Walk) -> None:
    tour.title("Unknown commands and other content")
    tour.says("/sttaus")
    tour._line("you", "(a sticker)")
    tour.telegram.write(_USER, content={"dice": {"emoji": "🎲", "value": 3}})
    tour.sees(1)
    tour.title("In Russian, for users with Telegram in Russian")
    tour.says("/start", language_code="ru")
    tour.says("/settings", language_code="ru")
    tour.title("For admins")
    tour.says("/allow 12345", chat=_ADMIN)
    tour.says("/deny 12345", chat=_ADMIN)
    tour.says("/status", chat=_ADMIN)


def transcript(forks: BotForks) -> str:
    """Start everything and walk."""
    with (
        running_fake_bot_api(with_limits=False) as telegram,
        serving(StoryTeller()) as service,
    ):
        command = bot_command(service.url, telegram.url, "--admin_ids", str(_ADMIN))
        bot = forks.bot(command, telegram.token, QUICK)
        try:
            bot.start()
            return walk(telegram, service)
        finally:
            bot.kill()


def with_transcript(document: str, text: str) -> str:
    """The document with the transcript in its place."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def main() -> int:
    """Print the transcript, or write it into the document."""
    parser = argparse.ArgumentParser(description="Walk through the bot")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    options = parser.parse_args()
    with bot_forks() as forks:
        text = transcript(forks)
    if options.write:
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(with_transcript(document, text), encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
