"""The life of the bot's process: open the database, introduce itself, take updates, end.

    Telegram ──poll / webhook──> intake ──> database ──> lanes ──> service, Telegram

Knows how the parts are wired together; not what is answered.
"""

import asyncio
import contextlib
import logging
import signal
import sqlite3
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from aiogram import Bot
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import TelegramAPIError
from aiogram.types import User

from full_stack_transformer import interruption
from full_stack_transformer.arguments.serving import TelegramBotArguments
from full_stack_transformer.errors import InputError, MachineError, ServiceError
from full_stack_transformer.serving.client import ServiceClient
from full_stack_transformer.telegram.conversation.answers import Answers
from full_stack_transformer.telegram.conversation.commands import Commands, OwnMessages
from full_stack_transformer.telegram.conversation.lanes import Handler, Lanes
from full_stack_transformer.telegram.conversation.requests import Policy, Requests
from full_stack_transformer.telegram.conversation.writing import Writer
from full_stack_transformer.telegram.introduction import introduce, known_user, present
from full_stack_transformer.telegram.monitoring import Metrics, serve_monitoring
from full_stack_transformer.telegram.sending.delivery import Courier, RateLimiter, SafeSession
from full_stack_transformer.telegram.sending.display import Display
from full_stack_transformer.telegram.state.database import DatabaseLostError
from full_stack_transformer.telegram.state.leading import open_when_free
from full_stack_transformer.telegram.state.settings import Settings
from full_stack_transformer.telegram.state.store import LANES, Lane, Store
from full_stack_transformer.telegram.updates.intake import Intake
from full_stack_transformer.telegram.updates.receiving import (
    ALLOWED_UPDATES,
    UNAUTHORIZED,
    Webhook,
    poll,
)

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_SECONDS = 20.0
_SERVICE_CHECK_SECONDS = 10.0
_SERVICE_CHECK_INTERVAL_SECONDS = 30.0
_DATABASE_CHECK_INTERVAL_SECONDS = 1.0
# Docker allows 10 s after SIGTERM, Kubernetes 30; with more, longer texts are finished. The next start
# continues what was cut short.
_MAX_FINISH_SECONDS = 60.0
_MAX_BACKGROUND_SECONDS = 2.0


async def run(
    arguments: TelegramBotArguments,
    default_settings: Settings,
    service: AbstractAsyncContextManager[str],
    *,
    token: str,
    webhook_secret: str,
    service_api_key: str | None,
) -> int:
    """Answer until SIGTERM or SIGINT, then finish the texts that are being written; returns the signal.

    Where another process of the bot uses the database, stand by first, until it ends.

    Args:
        arguments: the options, checked.
        default_settings: of a chat that never changed them.
        service: gives the URL of the service, for as long as the bot runs.
        token: of the bot.
        webhook_secret: empty for polling.
        service_api_key: of a service that needs one.

    Raises:
        InputError: Telegram rejects the token.
        MachineError: Telegram is unreachable, another process polls, or a file or port is in use.
    """
    signals = _Signals()
    try:
        async with AsyncExitStack() as stack:
            metrics = Metrics()
            webhook = await _listen(arguments, metrics, webhook_secret, stack)
            api = TelegramAPIServer.from_base(arguments.telegram_api_base)
            session = SafeSession(api=api, timeout=_CALL_TIMEOUT_SECONDS)
            bot = await stack.enter_async_context(Bot(token, session=session))

            async def begin_standing_by() -> None:
                await known_user(bot, arguments)  # a wrong token is told now, not at the take-over
                metrics.state = "standing by"

            bot_id = int(token.partition(":")[0])
            store = await open_when_free(arguments.database, bot_id, begin_standing_by)
            metrics.state = "starting"
            stack.callback(store.close)
            stack.callback(metrics.end)
            service_url = await stack.enter_async_context(service)
            client = ServiceClient(service_url, api_key=service_api_key)
            await stack.enter_async_context(client)
            me = await introduce(bot, arguments)
            process = _Process(
                *(arguments, default_settings, store, bot, me, client, service_url, metrics)
            )
            await process.run(signals, webhook, webhook_secret, stack)
    except asyncio.CancelledError:
        if not signals.number:
            raise
    return signals.number


class _Signals:
    """The first SIGTERM or SIGINT asks the process to finish, the second to stop at once.

    While the bot is `starting`, the first one ends it: nothing is to be finished.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.number = 0
        self.starting = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, self._received, signal_number)
        interruption.release()

    def _received(self, number: int) -> None:
        self.number = self.number or number
        if self.starting is not None:
            self.starting.cancel()
        (self.second if self.first.is_set() else self.first).set()


class _Process:
    """The parts of one run, each given what it needs when it is made."""

    def __init__(
        self,
        arguments: TelegramBotArguments,
        default_settings: Settings,
        store: Store,
        bot: Bot,
        me: User,
        client: ServiceClient,
        service_url: str,
        metrics: Metrics,
    ) -> None:
        self._arguments = arguments
        self._store = store
        self._bot = bot
        self._me = me
        self._service_url = service_url
        self._metrics = metrics
        ending = asyncio.Event()
        self._courier = courier = Courier(bot, store, RateLimiter(), ending)
        display = Display(store, courier)
        path = None if arguments.checkpoint is None else str(arguments.checkpoint)
        self._writer = writer = Writer(client, path, arguments.system_prompt)
        log_texts = arguments.log_texts
        answers = Answers(store, courier, display, writer, metrics, ending, log_texts=log_texts)
        policy = Policy(
            store,
            frozenset(arguments.allowed_ids),
            frozenset(arguments.admin_ids),
            arguments.max_tokens_per_day,
        )
        requests = Requests(store, answers, writer, policy, default_settings)
        messages = OwnMessages(store, courier, display, answers, writer, policy, requests)
        handlers: dict[Lane, Handler] = {"answers": answers.answer, "words": messages.send}
        self._lanes = Lanes(store, handlers, metrics, ending)
        commands = Commands(
            *(store, answers, policy, requests, writer),
            service_url=service_url,
            log_texts=log_texts,
        )
        self._intake = Intake(
            *(store, answers, policy, requests, commands, writer),
            *(metrics, me, courier.attempt_soon),
        )

    async def run(
        self, signals: _Signals, webhook: Webhook | None, secret: str, stack: AsyncExitStack
    ) -> None:
        """Take updates until the end.

        Raises:
            InputError, MachineError: as `run` below the imports.
        """
        try:
            await self._run(signals, webhook, secret, stack)
            self._store.check()
        except DatabaseLostError:
            raise MachineError(self._store.rescue()) from None
        except sqlite3.Error as error:
            raise MachineError(
                f"--database {self._arguments.database} is damaged ({error}); put a copy of it there, or "
                "move it away, and start again: Telegram still has the updates since then"
            ) from None

    async def _run(
        self, signals: _Signals, webhook: Webhook | None, secret: str, stack: AsyncExitStack
    ) -> None:
        await self._greet_service()
        receiving = await self._receive(webhook, secret, stack)
        self._metrics.begin(lambda: {lane: self._store.num_jobs(lane=lane) for lane in LANES})
        num_pending = self._store.num_jobs() + self._store.num_jobs(lane="words")
        if num_pending:
            logger.info("continuing %d jobs of an earlier process", num_pending)
        lanes = asyncio.create_task(self._lanes.run())
        watching = asyncio.create_task(self._watch_database())
        background = {
            asyncio.create_task(self._watch_service()),
            asyncio.create_task(present(self._bot, self._arguments.admin_ids)),
        }
        logger.info("answering as @%s", self._me.username)
        try:
            await self._until_the_end(signals, receiving, lanes, watching)
            receiving.cancel()
            await self._finish(signals)
        finally:
            for task in (background := background | {receiving, lanes, watching}):
                task.cancel()
            # Gathered, so that no second error is logged as one that nobody has seen.
            await asyncio.gather(*background, return_exceptions=True)

    async def _receive(
        self, webhook: Webhook | None, secret: str, stack: AsyncExitStack
    ) -> asyncio.Task[None]:
        """Start to take updates; the task ends with an error only."""
        take, report = self._intake.take, self._store.report
        if webhook is None:
            return asyncio.create_task(poll(self._bot, take, report, self._metrics))
        webhook.begin(take, report)
        stack.callback(webhook.end)
        url = self._arguments.webhook_url
        assert url is not None
        try:
            await self._bot.set_webhook(
                url,
                secret_token=secret,
                allowed_updates=list(ALLOWED_UPDATES),
            )
        except TelegramAPIError as error:
            raise MachineError(
                f"Telegram rejects --webhook_url ({error.message}); check it, and try again"
            ) from None
        return asyncio.create_task(_wait_for_ever())

    async def _until_the_end(self, signals: _Signals, *tasks: asyncio.Task[None]) -> None:
        """Wait for a signal, or for an error that ends the process."""
        signals.starting = None
        signal_received = asyncio.create_task(signals.first.wait())
        rejected = asyncio.create_task(self._courier.unauthorized.wait())
        try:
            waiting = {signal_received, rejected, *tasks}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            failed = [task for task in tasks if task.done()]
            if failed or rejected.done():
                await self._lanes.abandon()
            for task in failed:
                task.result()
            if rejected.done():
                raise InputError(UNAUTHORIZED)
        finally:
            signal_received.cancel()
            rejected.cancel()

    async def _finish(self, signals: _Signals) -> None:
        finishing = asyncio.create_task(self._lanes.finish(_MAX_FINISH_SECONDS))
        second = asyncio.create_task(signals.second.wait())
        await asyncio.wait({finishing, second}, return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if not finishing.done():
            await self._lanes.abandon()
        await finishing
        await self._courier.finish(_MAX_BACKGROUND_SECONDS)

    async def _greet_service(self) -> None:
        try:
            async with asyncio.timeout(_SERVICE_CHECK_SECONDS):
                described = await self._writer.describe()
        except (ServiceError, TimeoutError) as error:
            logger.warning(
                "the service at %s does not answer (%s); texts wait until it does",
                self._service_url,
                type(error).__name__,
            )
        else:
            logger.info("the service at %s serves %s", self._service_url, described.model)

    async def _watch_database(self) -> None:
        """Notice a lost database also when nobody writes; ends with an error only."""
        while True:
            await asyncio.sleep(_DATABASE_CHECK_INTERVAL_SECONDS)
            self._store.check()

    async def _watch_service(self) -> None:
        """Notice when another model is served, which may have a chat template or none."""
        while True:
            await asyncio.sleep(_SERVICE_CHECK_INTERVAL_SECONDS)
            with contextlib.suppress(ServiceError, TimeoutError):
                async with asyncio.timeout(_SERVICE_CHECK_SECONDS):
                    await self._writer.describe(refresh=True)


async def _wait_for_ever() -> None:
    await asyncio.Event().wait()


async def _listen(
    arguments: TelegramBotArguments, metrics: Metrics, secret: str, stack: AsyncExitStack
) -> Webhook | None:
    """Open the ports, also of a process that stands by; the webhook, if there is one."""
    if arguments.monitoring_port is not None:
        runner = await serve_monitoring(
            metrics,
            arguments.monitoring_port,
            always_healthy=arguments.webhook_url is not None,
        )
        stack.push_async_callback(runner.cleanup)
        logger.info("monitoring at http://127.0.0.1:%d", runner.addresses[0][1])
    if arguments.webhook_url is None:
        return None
    webhook = Webhook(metrics, secret)
    host = arguments.webhook_host
    runner = await webhook.listen(arguments.webhook_url, host, arguments.webhook_port)
    stack.push_async_callback(runner.cleanup)
    logger.info("webhook at http://%s:%d", host, runner.addresses[0][1])
    return webhook
