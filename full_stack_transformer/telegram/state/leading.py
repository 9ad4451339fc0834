"""Which of several bot processes with one database answers: the one that has its lock; the others stand by.

The kernel gives the lock back when its process ends, kill -9 included. A process that hangs or is stopped
(SIGSTOP) keeps it, so two can never answer at once. Knows the database, not Telegram.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

from full_stack_transformer.errors import MachineError
from full_stack_transformer.telegram.state.database import check_owner
from full_stack_transformer.telegram.state.database_file import DatabaseFile
from full_stack_transformer.telegram.state.store import Store

logger = logging.getLogger(__name__)

# A try is one system call.
_SECONDS_BETWEEN_TRIES = 0.1


async def open_when_free(
    path: Path, bot_id: int, begin_standing_by: Callable[[], Awaitable[None]]
) -> Store:
    """The rows of the bot, once no other process uses the file.

    Args:
        path: of the database.
        bot_id: of the bot.
        begin_standing_by: called once, where another process uses it.

    Raises:
        MachineError: the file cannot be used, or was replaced meanwhile.
        UsageError: it belongs to another bot or another version.
    """
    file = DatabaseFile(path)
    try:
        if not file.lock():
            await _stand_by(file, bot_id, begin_standing_by)
    except BaseException:
        file.close()
        raise
    return Store(path, bot_id, file)


async def _stand_by(
    file: DatabaseFile, bot_id: int, begin_standing_by: Callable[[], Awaitable[None]]
) -> None:
    path = file.path
    if file.num_names > 1:
        raise MachineError(
            f"--database {path} is used by another bot process and has {file.num_names} names (hard links), "
            "of which SQLite's log belongs to one; to stand by, start the bot on a file with one name"
        )
    await begin_standing_by()
    logger.info("standing by: another process of this bot uses --database %s", path)
    is_checked = False
    while not file.lock():
        if not is_checked:
            try:
                check_owner(path, bot_id)
                is_checked = True
            except sqlite3.Error:  # the other process has only begun
                pass
        await asyncio.sleep(_SECONDS_BETWEEN_TRIES)
    logger.info("taking over: the process that used --database %s has ended", path)
