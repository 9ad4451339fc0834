"""The life of the bot's process: open the database, introduce itself, take updates, end well.

    Telegram ──poll / webhook──> intake ──> database ──> chats ──> service, Telegram

Knows who is wired to whom; not what is answered.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiogram import Bot
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import (
    TelegramAPIError,
    TelegramNetworkError,
    TelegramNotFound,
    TelegramServerError,
    TelegramUnauthorizedError,
)
from aiogram.types import (
    BotCommand,
    BotCommandScopeAllGroupChats,
    BotCommandScopeAllPrivateChats,
    BotCommandScopeChat,
    BotCommandScopeDefault,
    User,
)

from full_stack_transformer.errors import InputError, MachineError, ServiceError
from full_stack_transformer.serving.client import ServiceClient
from full_stack_transformer.telegram.conversation.lanes import Chats
from full_stack_transformer.telegram.conversation.voice import Voice
from full_stack_transformer.telegram.conversation.writing import Writer
from full_stack_transformer.telegram.monitoring import Metrics, serve_monitoring
from full_stack_transformer.telegram.own_service import own_service
from full_stack_transformer.telegram.sending.delivery import Courier, DiscreetSession
from full_stack_transformer.telegram.sending.pace import Pace
from full_stack_transformer.telegram.state.policy import Policy
from full_stack_transformer.telegram.state.settings import Settings
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import LANGUAGES, Words
from full_stack_transformer.telegram.updates.asks import Asks
from full_stack_transformer.telegram.updates.intake import ALLOWED_UPDATES, Effects, Intake
from full_stack_transformer.telegram.updates.polling import REFUSED_BY_TELEGRAM, poll
from full_stack_transformer.telegram.updates.webhook import serve_webhook

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_SECONDS = 20.0
_INTRODUCTION_PAUSES_SECONDS = (0.3, 0.6, 1.2)
_SERVICE_CHECK_SECONDS = 10.0
_SERVICE_CHECK_INTERVAL_SECONDS = 30.0
# Docker grants 10 s after SIGTERM, Kubernetes 30; who grants more has longer answers delivered, and
# what is cut short goes on at the next start.
_MAX_FINISH_SECONDS = 60.0
# Commands that make no sense in a group's menu; they answer there all the same.
_PRIVATE_COMMANDS = ("start", "export")


@dataclass(frozen=True)
class BotOptions:
    """What the process needs to know, checked; the secrets never leave it."""

    token: str = field(repr=False)
    telegram_api_base: str
    database: Path
    default_settings: Settings
    service_url: str
    service_api_key: str | None = field(default=None, repr=False)
    checkpoint: Path | None = None
    device: str = "auto"
    allowed_ids: frozenset[int] = frozenset()
    admin_ids: frozenset[int] = frozenset()
    max_tokens_per_day: int = 0
    webhook_url: str | None = None
    webhook_secret: str = field(default="", repr=False)
    webhook_host: str = "127.0.0.1"
    webhook_port: int = 8443
    monitoring_port: int | None = None
    log_texts: bool = False


async def run(options: BotOptions) -> None:
    """Answer until SIGTERM or SIGINT, then finish what is being written.

    Raises:
        InputError: Telegram does not accept the token.
        MachineError: Telegram cannot be reached, somebody else polls, or a file or port is taken.
    """
    ended = _Signals()
    async with contextlib.AsyncExitStack() as stack:
        store = Store(options.database, int(options.token.partition(":")[0]))
        stack.callback(store.close)
        bot = await stack.enter_async_context(_bot(options))
        service_url = options.service_url
        if options.checkpoint is not None:
            service_url = await stack.enter_async_context(
                own_service(options.checkpoint, options.device)
            )
        client = ServiceClient(service_url, api_key=options.service_api_key)
        await stack.enter_async_context(client)
        await _Process(options, store, bot, client, service_url, ended, stack).run()


@contextlib.asynccontextmanager
async def _bot(options: BotOptions) -> AsyncIterator[Bot]:
    session = DiscreetSession(
        api=TelegramAPIServer.from_base(options.telegram_api_base), timeout=_CALL_TIMEOUT_SECONDS
    )
    async with Bot(options.token, session=session) as bot:
        yield bot


class _Signals:
    """The first SIGTERM or SIGINT asks to end, the second to leave at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received)

    def _received(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


class _Process:
    """Everything of one run, wired together."""

    def __init__(
        self,
        options: BotOptions,
        store: Store,
        bot: Bot,
        client: ServiceClient,
        service_url: str,
        ended: _Signals,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._options = options
        self._store = store
        self._bot = bot
        self._service_url = service_url
        self._ended = ended
        self._stack = stack
        self._metrics = Metrics()
        self._asides: set[asyncio.Task[bool]] = set()
        path = None if options.checkpoint is None else str(options.checkpoint)
        self._writer = Writer(client, path)
        self._courier = Courier(bot, store, Pace())
        self._policy = Policy(
            store, options.allowed_ids, options.admin_ids, options.max_tokens_per_day
        )
        self._chats = Chats(
            store, self._courier, self._writer, self._metrics, log_texts=options.log_texts
        )
        default = options.default_settings
        voice = Voice(store, self._courier, self._chats, self._writer, self._policy, default)
        self._chats.say = voice.say
        self._asks = Asks(
            store,
            self._chats,
            self._writer,
            self._policy,
            default,
            service_url=service_url,
            log_texts=options.log_texts,
        )
        self._intake: Intake | None = None

    async def run(self) -> None:
        """From the introduction to the end."""
        me = await self._introduce()
        await self._greet_service()
        self._intake = Intake(self._store, self._chats, self._policy, self._metrics, self._asks, me)
        updates = await self._listen()
        watch = asyncio.create_task(self._watch_service())
        num_owed = self._store.num_jobs() + self._store.num_jobs(lane="words")
        if num_owed:
            logger.info("%d jobs were left by an earlier process and go on now", num_owed)
        self._chats.wake()
        logger.info("answering as @%s", me.username)
        try:
            await self._until_the_end(updates)
        finally:
            watch.cancel()
            updates.cancel()
            await asyncio.wait({watch, updates})
        await self._finish()

    async def _listen(self) -> asyncio.Task[None]:
        """Start to take updates, and to be asked for health."""
        options = self._options
        if options.monitoring_port is not None:
            runner = await serve_monitoring(
                self._metrics,
                lambda: {
                    "answers": self._store.num_jobs(),
                    "words": self._store.num_jobs(lane="words"),
                },
                options.monitoring_port,
                always_healthy=options.webhook_url is not None,
            )
            self._stack.push_async_callback(runner.cleanup)
            logger.info("monitoring at http://127.0.0.1:%d", runner.addresses[0][1])
        if options.webhook_url is None:
            return asyncio.create_task(poll(self._bot, self._take, self._metrics))
        runner = await serve_webhook(
            self._take,
            self._metrics,
            options.webhook_secret,
            options.webhook_url,
            options.webhook_host,
            options.webhook_port,
        )
        self._stack.push_async_callback(runner.cleanup)
        logger.info("webhook at http://%s:%d", options.webhook_host, runner.addresses[0][1])
        try:
            await self._bot.set_webhook(
                options.webhook_url,
                secret_token=options.webhook_secret,
                allowed_updates=list(ALLOWED_UPDATES),
            )
        except TelegramAPIError as error:
            raise MachineError(
                f"Telegram does not take --webhook_url ({error.message}); check it, and try again"
            ) from None
        return asyncio.create_task(_for_ever())

    def _take(self, raw_updates: list[Any]) -> None:
        assert self._intake is not None
        effects: Effects = self._intake.take(raw_updates)
        for answer in effects.answers:
            task = asyncio.create_task(self._courier.attempt_now(answer))
            # The loop refers to tasks weakly: without the set one could vanish in mid-run.
            self._asides.add(task)
            task.add_done_callback(self._asides.discard)

    async def _until_the_end(self, updates: asyncio.Task[None]) -> None:
        """Wait for a signal, or for an error that ends the process."""
        first = asyncio.create_task(self._ended.first.wait())
        refused = asyncio.create_task(self._courier.unauthorized.wait())
        try:
            await asyncio.wait({first, refused, updates}, return_when=asyncio.FIRST_COMPLETED)
            if refused.done() or updates.done():
                await self._chats.abandon()
            if updates.done():
                updates.result()
            if refused.done():
                raise InputError(REFUSED_BY_TELEGRAM)
        finally:
            first.cancel()
            refused.cancel()

    async def _finish(self) -> None:
        finishing = asyncio.create_task(self._chats.finish(_MAX_FINISH_SECONDS))
        second = asyncio.create_task(self._ended.second.wait())
        await asyncio.wait({finishing, second}, return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if not finishing.done():
            await self._chats.abandon()
        await finishing
        if self._asides:
            await asyncio.wait(self._asides, timeout=2.0)

    async def _introduce(self) -> User:
        host = urlsplit(self._options.telegram_api_base).netloc.rpartition("@")[2]
        for pause_seconds in (*_INTRODUCTION_PAUSES_SECONDS, None):
            try:
                me = await self._bot.me()
                if self._options.webhook_url is None:
                    # A webhook that an earlier program left behind would make every poll end with 409.
                    await self._bot.delete_webhook()
                break
            except (TelegramUnauthorizedError, TelegramNotFound):
                raise InputError(
                    f"{host} does not know the bot's token; copy it again from @BotFather, "
                    "and check --telegram_api_base"
                ) from None
            except (TelegramNetworkError, TelegramServerError) as error:
                if pause_seconds is None:
                    raise MachineError(
                        f"Telegram cannot be reached at {host} ({error.message}); "
                        "check the network and --telegram_api_base"
                    ) from None
                await asyncio.sleep(pause_seconds)
            except TelegramAPIError as error:
                raise MachineError(
                    f"{host} does not answer as Telegram does ({error.message}); "
                    "try again later, and check --telegram_api_base"
                ) from None
        menus = asyncio.create_task(self._set_menus())
        self._asides.add(menus)
        menus.add_done_callback(self._asides.discard)
        return me

    async def _set_menus(self) -> bool:
        """The menu of commands in every scope and language; without it commands work all the same."""
        for language, words in LANGUAGES.items():
            # English is also what people of every other language see.
            code = None if language == "en" else language
            private = _menu(words)
            group = [command for command in private if command.command not in _PRIVATE_COMMANDS]
            scopes: list[tuple[Any, list[BotCommand]]] = [
                (BotCommandScopeDefault(), private),
                (BotCommandScopeAllPrivateChats(), private),
                (BotCommandScopeAllGroupChats(), group),
            ]
            scopes += [
                (BotCommandScopeChat(chat_id=admin_id), private + _menu(words, for_admins=True))
                for admin_id in sorted(self._options.admin_ids)
            ]
            for scope, commands in scopes:
                try:
                    await self._bot.set_my_commands(commands, scope=scope, language_code=code)
                except TelegramAPIError as error:  # such as an admin who never wrote to the bot
                    logger.warning("a menu of commands was not set: %s", type(error).__name__)
        return True

    async def _greet_service(self) -> None:
        try:
            async with asyncio.timeout(_SERVICE_CHECK_SECONDS):
                described = await self._writer.describe()
        except (ServiceError, TimeoutError) as error:
            logger.warning(
                "the service at %s does not answer (%s); until it does, texts wait",
                self._service_url,
                type(error).__name__,
            )
        else:
            logger.info("the service at %s serves %s", self._service_url, described.model)

    async def _watch_service(self) -> None:
        """Notice another model behind the same address, which may want another mode."""
        while True:
            await asyncio.sleep(_SERVICE_CHECK_INTERVAL_SECONDS)
            with contextlib.suppress(ServiceError, TimeoutError):
                async with asyncio.timeout(_SERVICE_CHECK_SECONDS):
                    await self._writer.describe(anew=True)


def _menu(words: Words, *, for_admins: bool = False) -> list[BotCommand]:
    commands = words.admin_commands if for_admins else words.commands
    return [BotCommand(command=name, description=text) for name, text in commands.items()]


async def _for_ever() -> None:
    await asyncio.Event().wait()
