"""Updates from Telegram, by polling or by webhook: recorded first, confirmed afterwards.

Polling has a loop of its own instead of aiogram's, which confirms updates before their handlers have
ended, repeats a batch for ever when one update of it is invalid, and retries 401 and 409 for ever.

A webhook needs a proxy with a certificate in front of it, and a secret that Telegram sends along:
without one, anybody who knows the URL could pose as Telegram.
"""

import asyncio
import json
import logging
import secrets
import sqlite3
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from aiogram import Bot
from aiogram.exceptions import (
    TelegramAPIError,
    TelegramConflictError,
    TelegramNotFound,
    TelegramRetryAfter,
    TelegramUnauthorizedError,
)
from aiogram.methods import TelegramMethod
from aiohttp import web

from full_stack_transformer.errors import InputError, MachineError
from full_stack_transformer.telegram.monitoring import Metrics, listen, ready_route
from full_stack_transformer.telegram.state.database import DatabaseLostError

logger = logging.getLogger(__name__)

# The kinds of updates that the bot asks Telegram for.
ALLOWED_UPDATES = ("message", "callback_query", "my_chat_member", "stopped_message_generation")

UNAUTHORIZED = (
    "Telegram does not accept the bot's token any more; copy it again from @BotFather. "
    "Pending replies stay in the database"
)

_POLL_SECONDS = 30
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 10.0
# Telegram may still hold the poll of a process that was killed a moment ago.
_MAX_CONFLICTS = 4
_CONFLICT_PAUSE_SECONDS = 1.0

_MAX_BODY_BYTES = 1 << 20
_SECRET_HEADER = "X-Telegram-Bot-Api-Secret-Token"  # noqa: S105 - the name of a header

Take = Callable[[list[Any]], None]
"""Records a batch of updates; raises sqlite3.Error if it cannot."""
Report = Callable[[sqlite3.Error], None]
"""Says that the database cannot be written."""


class GetRawUpdates(TelegramMethod[list[Any]]):
    """`getUpdates` without validation: one invalid update must not cost the others of its batch."""

    __returning__ = list[Any]
    __api_method__ = "getUpdates"

    offset: int | None = None
    timeout: int | None = None
    allowed_updates: list[str] | None = None


async def poll(bot: Bot, take: Take, report: Report, metrics: Metrics) -> None:
    """Poll until cancelled.

    Raises:
        InputError: Telegram rejects the token.
        MachineError: another process polls with the same token.
        DatabaseLostError: the database is not at its path any more.
        sqlite3.Error: the database is damaged.
    """
    request = GetRawUpdates(timeout=_POLL_SECONDS, allowed_updates=list(ALLOWED_UPDATES))
    pause_seconds, num_conflicts = _FIRST_PAUSE_SECONDS, 0
    while True:
        try:
            updates = await bot(request, request_timeout=_POLL_SECONDS + 10)
        except (TelegramUnauthorizedError, TelegramNotFound):
            raise InputError(UNAUTHORIZED) from None
        except TelegramConflictError:
            num_conflicts += 1
            if num_conflicts == _MAX_CONFLICTS:
                raise MachineError(
                    "another process polls Telegram with the same token, or a webhook was set; stop "
                    "it. Pending replies stay in the database"
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
                await _record(take, report, updates)
                offset = _next_offset(updates, request.offset)
                if offset == request.offset:
                    # Updates without a valid id cannot be confirmed; do not fetch them again at once.
                    await asyncio.sleep(_MAX_PAUSE_SECONDS)
                request = request.model_copy(update={"offset": offset})
            continue
        logger.warning("no updates (%s); retrying in %.1f s", reason, wait_seconds)
        await asyncio.sleep(wait_seconds)


async def _record(take: Take, report: Report, updates: list[Any]) -> None:
    """Record updates as soon as there is room; until then Telegram keeps them and all later ones."""
    pause_seconds = _FIRST_PAUSE_SECONDS
    while True:
        try:
            return take(updates)
        except sqlite3.OperationalError as error:
            report(error)
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)


def _next_offset(updates: list[Any], offset: int | None) -> int | None:
    ids = [update.get("update_id") for update in updates if isinstance(update, dict)]
    valid = [update_id for update_id in ids if type(update_id) is int]
    return max(valid) + 1 if valid else offset


class Webhook:
    """Listens for updates; one that stands by, or only starts, answers 503, and they are sent again."""

    def __init__(self, metrics: Metrics, secret: str) -> None:
        self._metrics = metrics
        self._secret = secret
        self._take: Take | None = None
        self._report: Report = _ignore

    async def listen(self, url: str, host: str, port: int) -> web.AppRunner:
        """Listen at the path of `url`, and for `/ready`.

        Raises:
            MachineError: the port is in use.
        """
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_post(urlsplit(url).path or "/", self._receive)
        app.add_routes([ready_route(self._metrics)])
        return await listen(app, host, port, "--webhook_port")

    def begin(self, take: Take, report: Report) -> None:
        """From now on record updates."""
        self._take, self._report = take, report

    def end(self) -> None:
        """Record no more; the database is closed after this."""
        self._take = None

    async def _receive(self, request: web.Request) -> web.Response:
        given = request.headers.get(_SECRET_HEADER, "")
        # As bytes: compare_digest rejects non-ASCII text.
        if not secrets.compare_digest(given.encode("utf-8", "replace"), self._secret.encode()):
            return web.Response(status=401)
        try:
            update = json.loads(await request.read())
        except ValueError:
            return web.Response(status=400)
        if not isinstance(update, dict):
            return web.Response(status=400)
        if self._take is None:
            return web.Response(status=503)
        self._metrics.contact()
        try:
            self._take([update])
        except sqlite3.Error as error:
            self._report(error)
            return web.Response(status=500)  # Telegram sends it again
        except DatabaseLostError:
            return web.Response(status=500)  # the process ends; the next one is sent it again
        return web.Response()


def _ignore(error: sqlite3.Error) -> None:
    pass
