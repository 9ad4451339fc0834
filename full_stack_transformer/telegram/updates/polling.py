"""Updates from Telegram by polling: recorded first, confirmed by the poll that follows.

An own loop instead of aiogram's: that one confirms before handlers have ended, repeats a batch for
ever when one update of it cannot be understood, and retries 401 and 409 for ever.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from typing import Any

from aiogram import Bot
from aiogram.exceptions import (
    TelegramAPIError,
    TelegramConflictError,
    TelegramNotFound,
    TelegramRetryAfter,
    TelegramUnauthorizedError,
)
from aiogram.methods import TelegramMethod

from full_stack_transformer.errors import InputError, MachineError
from full_stack_transformer.telegram.monitoring import Metrics
from full_stack_transformer.telegram.updates.intake import ALLOWED_UPDATES

logger = logging.getLogger(__name__)

_POLL_SECONDS = 30
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 10.0
# A poll of a process that was killed a moment ago may still hang at Telegram's end.
_MAX_CONFLICTS = 4
_CONFLICT_PAUSE_SECONDS = 1.0

REFUSED_BY_TELEGRAM = (
    "Telegram does not accept the bot's token any more; copy it again from @BotFather. "
    "What is owed stays in the database"
)


class GetRawUpdates(TelegramMethod[list[Any]]):
    """`getUpdates` without an opinion on what an update is: one strange one must not cost the others."""

    __returning__ = list[Any]
    __api_method__ = "getUpdates"

    offset: int | None = None
    timeout: int | None = None
    allowed_updates: list[str] | None = None


async def poll(bot: Bot, take: Callable[[list[Any]], None], metrics: Metrics) -> None:
    """Poll until cancelled; `take` records a batch, or raises where it cannot.

    Raises:
        InputError: Telegram refuses the token.
        MachineError: another process polls with the same token.
    """
    request = GetRawUpdates(timeout=_POLL_SECONDS, allowed_updates=list(ALLOWED_UPDATES))
    pause_seconds, num_conflicts = _FIRST_PAUSE_SECONDS, 0
    while True:
        try:
            updates = await bot(request, request_timeout=_POLL_SECONDS + 10)
        except (TelegramUnauthorizedError, TelegramNotFound):
            raise InputError(REFUSED_BY_TELEGRAM) from None
        except TelegramConflictError:
            num_conflicts += 1
            if num_conflicts == _MAX_CONFLICTS:
                raise MachineError(
                    "another process polls Telegram with the same token, or a webhook was set; stop "
                    "it. What is owed stays in the database"
                ) from None
            wait_seconds = _CONFLICT_PAUSE_SECONDS
            reason = "TelegramConflictError"
        except TelegramAPIError as error:
            given = error.retry_after if isinstance(error, TelegramRetryAfter) else 0
            wait_seconds = max(pause_seconds, float(given))
            pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)
            reason = type(error).__name__
        else:
            metrics.contact()
            pause_seconds, num_conflicts = _FIRST_PAUSE_SECONDS, 0
            if updates:
                _record(take, updates)
                offset = _next_offset(updates, request.offset)
                if offset == request.offset:
                    # Nothing that could be confirmed: no hurry to see it again.
                    await asyncio.sleep(_MAX_PAUSE_SECONDS)
                request = request.model_copy(update={"offset": offset})
            continue
        logger.warning("no updates (%s); again in %.1f s", reason, wait_seconds)
        await asyncio.sleep(wait_seconds)


def _record(take: Callable[[list[Any]], None], updates: list[Any]) -> None:
    try:
        take(updates)
    except sqlite3.Error as error:
        raise MachineError(
            f"the database cannot be written ({error}); nothing of it was confirmed, so make room and "
            "start again"
        ) from None


def _next_offset(updates: list[Any], offset: int | None) -> int | None:
    numbers = [update.get("update_id") for update in updates if isinstance(update, dict)]
    known = [number for number in numbers if type(number) is int]
    return max(known) + 1 if known else offset
