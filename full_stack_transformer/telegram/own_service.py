"""`--checkpoint PATH`: the bot starts `fst serve` by itself and keeps it running.

The service is a process of its own, so that the bot never imports torch.
"""

import asyncio
import contextlib
import ctypes
import logging
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from full_stack_transformer.errors import ModelError

logger = logging.getLogger(__name__)

_STARTED = re.compile(r"serving .* at http://127\.0\.0\.1:(\d+)")
_STOP_SECONDS = 35.0
_FIRST_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1


@asynccontextmanager
async def own_service(checkpoint: Path, device: str) -> AsyncIterator[str]:
    """The address of a service for `checkpoint`, which is started again when it dies.

    Raises:
        ModelError: it does not start; its own words say why.
    """
    command = [
        *(sys.executable, "-m", "full_stack_transformer", "serve", str(checkpoint)),
        *("--device", device, "--port"),
    ]
    process, port = await _start([*command, "0"])
    # The same port again after a crash, so that the address stays.
    keeper = asyncio.create_task(_keep([*command, port], process))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        keeper.cancel()
        await asyncio.wait({keeper})


async def _start(command: list[str]) -> tuple[asyncio.subprocess.Process, str]:
    """A service that listens, and its port."""
    process = await asyncio.create_subprocess_exec(
        *command, stderr=asyncio.subprocess.PIPE, preexec_fn=_die_with_parent
    )
    assert process.stderr is not None
    last = ""
    async for raw in process.stderr:
        last = raw.decode("utf-8", "replace").rstrip()
        logger.info("service: %s", last)
        if started := _STARTED.search(last):
            return process, started.group(1)
    await process.wait()
    raise ModelError(f"the service of --checkpoint does not start: {last.removeprefix('fst: ')}")


def _die_with_parent() -> None:
    """A bot that is killed must not leave a model in memory; Linux ends the service with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _keep(command: list[str], process: asyncio.subprocess.Process) -> None:
    pause_seconds = _FIRST_PAUSE_SECONDS
    try:
        while True:
            assert process.stderr is not None
            async for raw in process.stderr:
                logger.info("service: %s", raw.decode("utf-8", "replace").rstrip())
            code = await process.wait()
            logger.warning("the service ended with %d; again in %.0f s", code, pause_seconds)
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)
            with contextlib.suppress(ModelError):
                process, _ = await _start(command)
                pause_seconds = _FIRST_PAUSE_SECONDS
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
