"""The life of the bot's process: introduce it, poll, finish what is owed, leave.

Knows Telegram's server and the service as places to reach; not what is answered.
"""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiogram import BaseMiddleware, Bot, Dispatcher
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import (
    TelegramAPIError,
    TelegramNetworkError,
    TelegramNotFound,
    TelegramUnauthorizedError,
)
from aiogram.types import BotCommand, TelegramObject, Update

from full_stack_transformer.errors import InputError, MachineError, ServiceError
from full_stack_transformer.serving.client import ServiceClient
from full_stack_transformer.serving.schemas import GeneratedTextsRequest
from full_stack_transformer.telegram import texts
from full_stack_transformer.telegram.bot import ContinuationBot
from full_stack_transformer.telegram.chats import Chats
from full_stack_transformer.telegram.delivery import DiscreetSession

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_SECONDS = 20.0
_POLLING_TIMEOUT_SECONDS = 30
_SERVICE_CHECK_SECONDS = 10.0
_CONFIRMATION_SECONDS = 3
# Docker grants 10 s after SIGTERM, Kubernetes 30; who grants more has longer answers delivered.
_MAX_FINISH_SECONDS = 60.0


async def answer_messages(
    token: str, telegram_api_base: str, service_url: str, settings: GeneratedTextsRequest
) -> None:
    """Answer messages until SIGTERM or SIGINT, then deliver the answers that are owed.

    Raises:
        InputError: Telegram does not accept the token.
        MachineError: Telegram cannot be reached.
    """
    session = DiscreetSession(
        api=TelegramAPIServer.from_base(telegram_api_base), timeout=_CALL_TIMEOUT_SECONDS
    )
    async with Bot(token, session=session) as bot, ServiceClient(service_url) as service:
        await _introduce_bot(bot, telegram_api_base)
        await _greet_service(service, service_url)
        chats = Chats()
        confirmation = _Confirmation()
        dispatcher = Dispatcher(disable_fsm=True)
        dispatcher.update.outer_middleware(confirmation)
        dispatcher.include_router(ContinuationBot(bot, service, settings, chats).router())

        async def finish() -> None:
            await confirmation.send(bot)
            await _finish(chats)

        # aiogram ends polling on SIGTERM and SIGINT and runs this before it returns.
        dispatcher.shutdown.register(finish)
        await dispatcher.start_polling(
            bot,
            polling_timeout=_POLLING_TIMEOUT_SECONDS,
            # One update after the other: as tasks they overtake each other, because aiogram
            # evaluates filters such as F.text in threads. Handlers only line up answers.
            handle_as_tasks=False,
            close_bot_session=False,
        )


async def _introduce_bot(bot: Bot, telegram_api_base: str) -> None:
    host = urlsplit(telegram_api_base).netloc.rpartition("@")[2]
    try:
        await bot.me()
        # A webhook that an earlier program left behind would make every poll end with 409.
        await bot.delete_webhook()
    except (TelegramUnauthorizedError, TelegramNotFound):
        raise InputError(
            f"{host} does not know the bot's token; copy it again from @BotFather, "
            "and check --telegram_api_base"
        ) from None
    except TelegramNetworkError as error:
        raise MachineError(
            f"Telegram cannot be reached at {host} ({error.message}); "
            "check the network and --telegram_api_base"
        ) from None
    except TelegramAPIError as error:
        raise MachineError(
            f"{host} does not answer as Telegram does ({error.message}); "
            "try again later, and check --telegram_api_base"
        ) from None
    try:
        await bot.set_my_commands(
            [
                BotCommand(command="start", description=texts.START_COMMAND),
                BotCommand(command="help", description=texts.HELP_COMMAND),
            ]
        )
    except TelegramAPIError as error:  # only the menu lacks them; they work all the same
        logger.warning("the menu of commands was not set: %s", type(error).__name__)


async def _greet_service(service: ServiceClient, service_url: str) -> None:
    try:
        async with asyncio.timeout(_SERVICE_CHECK_SECONDS):
            version = await service.version()
    except (ServiceError, TimeoutError) as error:
        logger.warning(
            "the service at %s does not answer (%s); until `fst serve` runs there, "
            "messages are answered with an apology",
            service_url,
            type(error).__name__,
        )
    else:
        logger.info(
            "the service at %s serves %s with full_stack_transformer %s",
            service_url,
            version.model,
            version.package_version,
        )


class _Confirmation(BaseMiddleware):
    """Confirms the last updates when polling ends.

    Telegram learns that updates arrived with the next poll. Where that one failed or was cut short,
    the next process would get and answer them a second time.
    """

    def __init__(self) -> None:
        self._newest_update_id = 0

    async def __call__(
        self,
        handler: Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]],
        event: TelegramObject,
        data: dict[str, Any],
    ) -> Any:
        result = await handler(event, data)
        if isinstance(event, Update):  # only now: an answer is owed for it
            self._newest_update_id = max(self._newest_update_id, event.update_id)
        return result

    async def send(self, bot: Bot) -> None:
        """Confirm; best effort, because the way out should not be blocked."""
        if not self._newest_update_id:
            return
        try:
            await bot.get_updates(
                offset=self._newest_update_id + 1,
                limit=1,
                timeout=0,
                request_timeout=_CONFIRMATION_SECONDS,
            )
        except TelegramAPIError as error:
            logger.warning("the last updates were not confirmed: %s", type(error).__name__)


async def _finish(chats: Chats) -> None:
    if not chats.num_owed():
        return
    logger.info(
        "%d answers are owed and will be delivered; a second signal leaves at once",
        chats.num_owed(),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, chats.abandon)
    await chats.finish(_MAX_FINISH_SECONDS)
