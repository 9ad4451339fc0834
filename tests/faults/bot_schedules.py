"""One random schedule for the bot: users, faults, kills; and the guarantees that must hold afterwards.

Knows the fake server's user side, the bot's process and its database; not how the bot works.
"""

import contextlib
import json
import random
import signal
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from full_stack_transformer.telegram.sending.formatting import split_text
from full_stack_transformer.telegram.texts import ENGLISH
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_forks import BotForks, ForkedBot
from tests.telegram.bot_process import bot_command
from tests.telegram.stand_in_service import Request, StandInService, prompt_of, request_of

Json = dict[str, Any]

_QUIET_SECONDS = 240.0
_FAULTY_METHODS = (
    "sendMessage",
    "sendMessage",
    "editMessageText",
    "sendMessageDraft",
    "getUpdates",
    "answerCallbackQuery",
    "deleteMessage",
    "getMe",
)
_NOTICES = (ENGLISH.service_away, ENGLISH.queued.partition("{")[0])


class Service(Protocol):
    """The service that writes the texts, and says afterwards what it would write."""

    @property
    def url(self) -> str:
        """Where it listens."""

    def text_for(self, request: Json) -> str:
        """The text of a request's body."""

    def fail_next(self, chance: random.Random) -> None:
        """Let it fail, if that is possible."""


@dataclass(frozen=True)
class RealService:
    """`fst serve`."""

    url: str

    def text_for(self, request: Json) -> str:
        """Asked again, without streaming."""
        answer = httpx.post(f"{self.url}/v1/completions", json=request, timeout=60)
        return str(answer.json()["choices"][0]["text"])

    def fail_next(self, chance: random.Random) -> None:
        """It never fails."""


@dataclass
class SlowService:
    """The stand-in: slow enough for stops and kills in the middle of a text; fails now and then."""

    stand_in: StandInService

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.stand_in.url

    def text_for(self, request: Json) -> str:
        """A function of prompt and seed."""
        return self.stand_in.text_for(request_of(request))

    def fail_next(self, chance: random.Random) -> None:
        """The next requests fail."""
        kinds = ("unavailable", "broken", "error", "foreign")
        self.stand_in.failures += [chance.choice(kinds) for _ in range(chance.randint(1, 2))]


class LongTexts(StandInService):
    """A stand-in whose texts take a second."""

    def text_for(self, request: Request) -> str:
        """Words that tell prompt and seed apart."""
        words = f" seed{request.seed} of {len(prompt_of(request))}"
        return words * 12


class BrokenGuaranteeError(AssertionError):
    """A guarantee was broken."""


class Schedule:
    """One schedule, determined by its seed."""

    def __init__(
        self,
        seed: int,
        telegram: FakeBotApi,
        forks: BotForks,
        service: "Service",
        directory: Path,
        *,
        with_stand_by: bool = False,
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.telegram = telegram
        self.service = service
        self.database = directory / f"schedule-{seed}.sqlite3"
        base = 1_000_000 + seed * 10
        self.chats = [base, base + 1, -(base + 2)]
        command = bot_command(service.url, telegram.url, "--database", str(self.database))
        command += ["--max_new_tokens", "40"]
        self.bot: ForkedBot = forks.bot(command, telegram.token)
        self.stand_by = forks.bot(command, telegram.token) if with_stand_by else None
        self.prompts: list[tuple[int, int, str]] = []
        """(chat, message, text) of every prompt."""
        self.num_repeats: Counter[tuple[int, int]] = Counter()
        self.counts: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        """Run it, then check every guarantee.

        Raises:
            BrokenGuaranteeError: one is broken.
        """
        try:
            self._start()
            self._start_stand_by()
            for _ in range(self.random.randint(6, 12)):
                self._act()
                time.sleep(self.random.choice((0.0, 0.02, 0.1, 0.3)))
            self.telegram.clear_faults()
            if not self.bot.is_running:
                self._go_on()
            self._wait_until_quiet()
            self._check()
            if self.stand_by is not None and self.stand_by.stop() != 0:
                self._fail("SIGTERM did not end the bot that stood by with 0")
            if self.bot.stop() != 0:
                self._fail("SIGTERM did not end the bot with 0")
            self._check_secrets()
        finally:
            for bot in filter(None, (self.bot, self.stand_by)):
                bot.kill()
            self.telegram.clear_faults()
        return self.counts

    def _start(self) -> None:
        """Start, as a supervisor does: again, when Telegram was away at the start."""
        for _ in range(20):
            self.bot.begin()
            try:
                self.bot.wait_for_log("answering as @")
                return
            except AssertionError:
                if self.bot.is_running:
                    raise
                self.bot.wait()
                self.counts["started again"] += 1
        self._fail("the bot does not start")

    def _start_stand_by(self) -> None:
        """Start the second bot, again if Telegram is away."""
        if self.stand_by is None:
            return
        for _ in range(20):
            self.stand_by.begin()
            try:
                self.stand_by.wait_for_log("standing by")
                return
            except AssertionError:
                if self.stand_by.is_running:
                    raise
                self.stand_by.wait()
        self._fail("the second bot does not stand by")

    def _go_on(self) -> None:
        """Start the bot that has ended, or let the other one take over."""
        if self.stand_by is None:
            self._start()
            return
        self.bot, self.stand_by = self.stand_by, self.bot
        try:
            self.bot.wait_for_log("answering as @")
            self.counts["taken over"] += 1
        except AssertionError:  # Telegram was away at the take-over
            if self.bot.is_running:
                raise
            self.bot.wait()
            self._start()
        self._start_stand_by()

    def _act(self) -> None:
        acts = {
            self._write: 40,
            self._press_repeat: 12,
            self._stop: 8,
            self._change_settings: 6,
            self._fault: 20,
            self._fail_service: 6,
            self._kill: 14,
            self._terminate: 6,
        }
        act = self.random.choices(list(acts), list(acts.values()))[0]
        self.counts[f"user: {act.__name__.strip('_')}"] += 1
        act()

    def _write(self) -> None:
        chat_id = self.random.choice(self.chats)
        number = len(self.prompts)
        text = f"The reader s{self.seed}c{abs(chat_id)}p{number} looks for"
        mention = "@fake_bot " if chat_id < 0 else ""
        message = self.telegram.write(chat_id, mention + text, user_id=abs(chat_id))
        self.prompts.append((chat_id, message["message_id"], text))

    def _press_repeat(self) -> None:
        answers = [
            (chat_id, message)
            for chat_id in self.chats
            for message in self.telegram.bot_messages(chat_id)
            if _is_final(message) and "reply_to_message" in message
        ]
        if answers:
            chat_id, message = self.random.choice(answers)
            self.telegram.press(
                chat_id, message["message_id"], button="Repeat", user_id=abs(chat_id)
            )
            self.num_repeats[chat_id, message["reply_to_message"]["message_id"]] += 1

    def _stop(self) -> None:
        streaming = [chat_id for chat_id in self.chats if self.telegram.has_draft(chat_id)]
        if streaming:
            with contextlib.suppress(httpx.HTTPStatusError):  # it ended in this moment
                self.telegram.stop(self.random.choice(streaming))
        else:
            chat_id = self.random.choice(self.chats)
            self.telegram.write(chat_id, "/stop", user_id=abs(chat_id))

    def _change_settings(self) -> None:
        chat_id = self.random.choice(self.chats)
        words = self.random.choice(("variants 2", "variants 1", "length 80", "seed 7", "creative"))
        self.telegram.write(chat_id, f"/settings {words}", user_id=abs(chat_id))

    def _fault(self) -> None:
        kind = self.random.choice(("retry_after", "bad_gateway", "reset", "error"))
        self.telegram.fail(
            self.random.choice(_FAULTY_METHODS),
            kind,
            times=self.random.randint(1, 3),
            after=kind in ("bad_gateway", "reset") and self.random.random() < 0.6,
            **({"status": 500, "description": "Internal Server Error"} if kind == "error" else {}),
        )

    def _fail_service(self) -> None:
        self.service.fail_next(self.random)

    def _kill(self) -> None:
        self.bot.kill()
        if self.random.random() >= 0.7:  # people write meanwhile
            self._write()
        self._go_on()

    def _terminate(self) -> None:
        self.bot.send_signal(signal.SIGTERM)
        if self.bot.wait() != 0:
            self._fail("SIGTERM did not end the bot with 0")
        self._go_on()

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    def _wait_until_quiet(self) -> None:
        until = time.monotonic() + _QUIET_SECONDS
        self.telegram.state(idle=1)
        while self._rows("SELECT count(*) FROM jobs")[0][0]:
            if time.monotonic() > until:
                self._fail(f"still pending: {self._rows('SELECT kind, content FROM jobs')}")
            time.sleep(0.05)

    def _check(self) -> None:
        replies = [
            (reply_id, chat_id, json.loads(content))
            for reply_id, chat_id, content in self._rows("SELECT id, chat_id, content FROM replies")
        ]
        expected = Counter({(chat_id, message_id): 1 for chat_id, message_id, _ in self.prompts})
        expected.update(self.num_repeats)
        given = Counter((chat_id, content["prompt_message_id"]) for _, chat_id, content in replies)
        if expected != given:
            self._fail(f"missing {expected - given}, too many {given - expected}")
        shown = {
            chat_id: {
                message["message_id"]: message for message in self.telegram.bot_messages(chat_id)
            }
            for chat_id in self.chats
        }
        for reply_id, chat_id, content in replies:
            self._check_reply(reply_id, content, shown[chat_id])
        for chat_id, messages in shown.items():
            self._check_chat(chat_id, messages)
        self.counts["texts"] += len(replies)

    def _check_reply(self, reply_id: int, content: Json, shown: dict[int, Json]) -> None:
        ids = [
            row[0]
            for row in self._rows(
                f"SELECT message_id FROM messages WHERE reply_id = {reply_id} ORDER BY position"
            )
        ]
        if content["finish"] == "stopped" and not content["texts"][0].strip():
            expected = [ENGLISH.stopped]
        else:
            whole = content["prompt"] + content["texts"][content["shown"]]
            expected = [piece.strip() for piece in split_text(whole) if piece.strip()]
        found = [shown[message_id]["text"] if message_id in shown else None for message_id in ids]
        if found != expected:
            self._fail(f"reply {reply_id} should be {expected}, is {found}")
        for text, request in zip(content["texts"], content["requests"], strict=False):
            made = self.service.text_for(request)
            is_stopped = content["finish"] == "stopped"
            if text != made and not (is_stopped and made.startswith(text)):
                self._fail(f"reply {reply_id} has {text!r}, the service says {made!r}")
        self.counts[f"text ended by: {content['finish']}"] += 1

    def _check_chat(self, chat_id: int, messages: dict[int, Json]) -> None:
        finals = Counter(
            message["reply_to_message"]["message_id"]
            for message in messages.values()
            if _is_final(message) or message["text"] == ENGLISH.stopped
        )
        expected = Counter(
            {message_id: 1 for chat, message_id, _ in self.prompts if chat == chat_id}
        )
        expected.update({key[1]: n for key, n in self.num_repeats.items() if key[0] == chat_id})
        if finals != expected:
            self._fail(f"chat {chat_id}: expected {expected}, final answers {finals}")
        foreign = [f"c{abs(other)}p" for other in self.chats if other != chat_id]
        for message in messages.values():
            if any(tag in message["text"] for tag in foreign):
                self._fail(f"chat {chat_id} sees another's text: {message['text']!r}")
            if message["text"].startswith(_NOTICES):
                self._fail(f"chat {chat_id} keeps a notice: {message['text']!r}")
        if self.telegram.has_draft(chat_id):
            self._fail(f"chat {chat_id} keeps a draft")

    def _check_secrets(self) -> None:
        token = self.telegram.token.encode()
        log = self.bot.log + (self.stand_by.log if self.stand_by else "")
        files = [*self.database.parent.glob(self.database.name + "*")]
        if token in log.encode() or any(token in path.read_bytes() for path in files):
            self._fail("the token was written down")
        for words in ("Traceback", "failed:", "looks for"):
            if words in log:
                self._fail(f"the log holds {words!r}:\n{log}")

    def _fail(self, words: str) -> None:
        raise BrokenGuaranteeError(f"schedule {self.seed}: {words}\nlog:\n{self.bot.log[-6000:]}")


def _is_final(message: Json) -> bool:
    rows = message.get("reply_markup", {}).get("inline_keyboard", [])
    return any(button["text"] == ENGLISH.repeat_button for row in rows for button in row)
