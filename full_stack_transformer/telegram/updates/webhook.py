"""Updates from Telegram by webhook: recorded first, and only then answered 200.

Put a proxy with a certificate before it. The secret, which Telegram sends along, is required: without
one anybody who knows the address could speak for Telegram.
"""

import json
import logging
import secrets
import sqlite3
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from full_stack_transformer.telegram.monitoring import Metrics, listen

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 1 << 20
_SECRET_HEADER = "X-Telegram-Bot-Api-Secret-Token"  # noqa: S105 - the name of a header


async def serve_webhook(
    take: Callable[[list[Any]], None],
    metrics: Metrics,
    secret: str,
    url: str,
    host: str,
    port: int,
) -> web.AppRunner:
    """Listen for updates at the path of `url`.

    Raises:
        MachineError: the port is in use.
    """

    async def receive(request: web.Request) -> web.Response:
        given = request.headers.get(_SECRET_HEADER, "")
        # As bytes: compare_digest refuses text beyond ASCII.
        if not secrets.compare_digest(given.encode("utf-8", "replace"), secret.encode()):
            return web.Response(status=401)
        try:
            update = json.loads(await request.read())
        except ValueError:
            return web.Response(status=400)
        if not isinstance(update, dict):
            return web.Response(status=400)
        metrics.contact()
        try:
            take([update])
        except sqlite3.Error as error:
            logger.error("an update could not be recorded (%s)", type(error).__name__)
            return web.Response(status=500)  # Telegram will send it again
        return web.Response()

    app = web.Application(client_max_size=_MAX_BODY_BYTES)
    app.router.add_post(urlsplit(url).path or "/", receive)
    return await listen(app, host, port, "--webhook_port")
