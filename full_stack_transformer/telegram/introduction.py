"""What a bot asks Telegram before it begins, and what it tells Telegram of itself.

Knows the bot's texts; no chats, no updates.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from aiogram import Bot
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
    BotCommandScopeUnion,
    User,
)

from full_stack_transformer.arguments.serving import TelegramBotArguments
from full_stack_transformer.errors import InputError, MachineError
from full_stack_transformer.telegram.texts import LANGUAGES

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_INTRODUCTION_PAUSES_SECONDS = (0.3, 0.6, 1.2)
# Commands that make no sense in a group's menu; they work there all the same.
_PRIVATE_COMMANDS = ("start", "export")


async def introduce(bot: Bot, arguments: TelegramBotArguments) -> User:
    """The bot's own user; what an earlier program set is taken back where the bot polls."""
    me = await known_user(bot, arguments)
    if arguments.webhook_url is None:
        # With a webhook every poll would fail with 409.
        await _asked(bot.delete_webhook, arguments)
    return me


async def known_user(bot: Bot, arguments: TelegramBotArguments) -> User:
    """The bot's own user, as Telegram knows it; asked once."""
    return await _asked(bot.me, arguments)


async def _asked(ask: Callable[[], Awaitable[_Answer]], arguments: TelegramBotArguments) -> _Answer:
    """The answer of Telegram to the first questions of a process.

    Raises:
        InputError: Telegram rejects the token.
        MachineError: it is unreachable.
    """
    host = urlsplit(arguments.telegram_api_base).netloc.rpartition("@")[2]
    for pause_seconds in (*_INTRODUCTION_PAUSES_SECONDS, None):
        try:
            return await ask()
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
    raise AssertionError("the last attempt returns or raises")


async def present(bot: Bot, admin_ids: Iterable[int]) -> None:
    """Set what Telegram shows of the bot: its description and its menus of commands."""
    for language, words in LANGUAGES.items():
        code = None if language == "en" else language
        try:
            await bot.set_my_description(words.description, language_code=code)
            await bot.set_my_short_description(words.short_description, language_code=code)
        except TelegramAPIError as error:
            logger.warning("the bot's description was not set: %s", type(error).__name__)
    await _set_menus(bot, admin_ids)


async def _set_menus(bot: Bot, admin_ids: Iterable[int]) -> None:
    """Set the menu of commands in every scope and language; commands work without it, too."""
    for language, words in LANGUAGES.items():
        # Users of all other languages see English.
        code = None if language == "en" else language
        private = _menu(words.commands)
        group = [command for command in private if command.command not in _PRIVATE_COMMANDS]
        scopes: list[tuple[BotCommandScopeUnion, list[BotCommand]]] = [
            (BotCommandScopeDefault(), private),
            (BotCommandScopeAllPrivateChats(), private),
            (BotCommandScopeAllGroupChats(), group),
        ]
        scopes += [
            (BotCommandScopeChat(chat_id=admin_id), private + _menu(words.admin_commands))
            for admin_id in sorted(admin_ids)
        ]
        for scope, commands in scopes:
            try:
                await bot.set_my_commands(commands, scope=scope, language_code=code)
            except TelegramAPIError as error:  # such as an admin who never wrote to the bot
                logger.warning("a menu of commands was not set: %s", type(error).__name__)


def _menu(commands: Mapping[str, str]) -> list[BotCommand]:
    return [BotCommand(command=name, description=text) for name, text in commands.items()]
