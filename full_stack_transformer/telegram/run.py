"""`fst telegram_bot`: options and secrets, checked before anything slow is imported.

With `--checkpoint PATH` it also starts `fst serve` and keeps it running, as a process of its own, so that
the bot never imports torch. Knows nothing of Telegram but the format of a token.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

from full_stack_transformer import interruption
from full_stack_transformer.arguments.serving import TelegramBotArguments
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.telegram.state.settings import MAX_LENGTH, Settings

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "TELEGRAM_BOT_TOKEN"  # noqa: S105 - the name of the variable, not a token
SECRET_VARIABLE = "TELEGRAM_WEBHOOK_SECRET"  # noqa: S105 - as above
API_KEY_VARIABLE = "SERVICE_API_KEY"
# https://core.telegram.org/bots/api#setwebhook takes 1 to 256; a short one could be guessed
_SECRET_PATTERN = re.compile(r"[A-Za-z0-9_-]{16,256}")
# https://core.telegram.org/bots/api#authorizing-your-bot; nothing that could change a URL
_TOKEN_PATTERN = re.compile(r"[0-9]{1,20}:[A-Za-z0-9_-]{1,200}")
_MAX_TOKEN_FILE_CHARACTERS = 4096

_SERVICE_STARTED = re.compile(r"serving .* at http://127\.0\.0\.1:(\d+)")
_SERVICE_STOP_SECONDS = 35.0
_FIRST_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1


def main(arguments: TelegramBotArguments) -> int:
    """Answer Telegram messages until SIGTERM or SIGINT, and return the exit code.

    Raises:
        UsageError: the token, the webhook's secret or an option is missing or invalid.
        InputError: Telegram rejects the token.
        MachineError: Telegram is unreachable, or a file or port is in use.
        ModelError: the service of --checkpoint does not start.
        KeyboardInterrupt: by Ctrl-C, after the answers.
    """
    token = _read_token(arguments.token_file)
    _check_url("--telegram_api_base", arguments.telegram_api_base)
    _check_url("--service_url", arguments.service_url)
    secret = ""
    if arguments.webhook_url is not None:
        _check_url("--webhook_url", arguments.webhook_url)
        secret = _read_webhook_secret()
    settings = _default_settings(arguments)
    # Imported here: aiogram takes 3 s, and a missing token should be reported at once.
    from full_stack_transformer.telegram.bot import run

    api_key = os.environ.get(API_KEY_VARIABLE, "").strip() or None
    for hidden in filter(None, (token, secret, api_key)):
        hide_from_logs(hidden)
    service: AbstractAsyncContextManager[str]
    if arguments.checkpoint is None:
        service = nullcontext(arguments.service_url.rstrip("/").removesuffix("/v1"))
    else:
        service = own_service(
            *(arguments.checkpoint, arguments.device, arguments.allow_code_from),
            base=arguments.base,
        )
    interruption.hold()  # until the loop takes signals
    number = asyncio.run(
        run(
            arguments,
            settings,
            service,
            token=token,
            webhook_secret=secret,
            service_api_key=api_key,
        )
    )
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    return 0


def _read_webhook_secret() -> str:
    secret = os.environ.get(SECRET_VARIABLE, "").strip()
    if not _SECRET_PATTERN.fullmatch(secret):
        raise UsageError(
            f"--webhook_url needs a random secret of 16 to 256 letters, digits, - and _ in the environment "
            f"variable {SECRET_VARIABLE}, which is {'not set' if not secret else 'invalid'}"
        )
    return secret


def _read_token(token_file: Path | None) -> str:
    if token_file is None:
        source, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            raise UsageError(
                f"missing token: set the environment variable {TOKEN_VARIABLE} to the token that "
                "@BotFather gave you, or pass --token_file with a file that holds it"
            )
    else:
        source, token = f"--token_file {token_file}", _read_token_file(token_file)
    if not _TOKEN_PATTERN.fullmatch(token):
        # Without the value, which may be the token with a typing error.
        raise UsageError(
            f"{source} does not hold a valid token, such as 123456789:AAE-xyz; copy it again from "
            "@BotFather"
        )
    return token


def _read_token_file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            token = file.read(_MAX_TOKEN_FILE_CHARACTERS).strip()
    except OSError as error:
        raise UsageError(f"--token_file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--token_file {path} is not a text file with a token") from None
    if not token:
        raise UsageError(f"--token_file {path} is empty; put the bot's token into it")
    return token


def _check_url(flag: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    # aiogram fills in braces of the URL
    if not is_valid or re.search(r"[\s{}?#]", url):
        raise UsageError(f"{flag}: invalid URL {url!r}; expected one such as http://127.0.0.1:9228")


def _default_settings(arguments: TelegramBotArguments) -> Settings:
    """The settings of a chat that never changed them."""
    if (arguments.max_new_tokens or 0) > MAX_LENGTH:
        raise UsageError(
            f"--max_new_tokens must be at most {MAX_LENGTH}, found {arguments.max_new_tokens}"
        )
    return Settings(
        mode=arguments.mode,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        length=arguments.max_new_tokens,
    )


class _HideSecret(logging.Filter):
    """Replaces a secret in every log record and its traceback.

    The bot's own errors never hold the token; a library that logs a URL may.
    """

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret = secret

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if self._secret in message:
            record.msg, record.args = message.replace(self._secret, "TOKEN"), None
        if record.exc_info and not record.exc_text:
            trace = logging.Formatter().formatException(record.exc_info)
            record.exc_text = trace.replace(self._secret, "TOKEN")
        return True


def hide_from_logs(secret: str) -> None:
    """Replace `secret` in everything that the root logger's handlers write from now on."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_HideSecret(secret))


@asynccontextmanager
async def own_service(
    checkpoint: Path,
    device: str,
    allow_code_from: Sequence[str] = (),
    *,
    base: str | None = None,
) -> AsyncIterator[str]:
    """The URL of a service for `checkpoint`, which is restarted when it ends.

    Args:
        checkpoint: the model.
        device: where to compute.
        allow_code_from: modules whose classes the model may name.
        base: of an adapter, if it is not the one that it names.

    Raises:
        ModelError: it does not start; the message quotes its own error.
    """
    command = [
        *(sys.executable, "-m", "full_stack_transformer", "serve", str(checkpoint)),
        *(f"--allow_code_from={module}" for module in allow_code_from),
        *(() if base is None else ("--base", base)),
        *("--device", device, "--port"),
    ]
    process, port = await _start_service([*command, "0"])
    # Restarted with the same port, so that the URL stays.
    keeper = asyncio.create_task(_keep_running([*command, port], process))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        keeper.cancel()
        await asyncio.wait({keeper})


async def _start_service(command: list[str]) -> tuple[asyncio.subprocess.Process, str]:
    """The process of a service, once it listens, and its port."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=_die_with_parent,
        process_group=0,  # Ctrl-C is for the bot, which finishes its answers with the service
    )
    assert process.stderr is not None
    last = ""
    async for raw in process.stderr:
        last = raw.decode("utf-8", "replace").rstrip()
        logger.info("service: %s", last)
        if started := _SERVICE_STARTED.search(last):
            return process, started.group(1)
    await process.wait()
    raise ModelError(f"the service of --checkpoint does not start: {last.removeprefix('fst: ')}")


def _die_with_parent() -> None:
    """Let Linux end the service with the bot: a killed bot must not leave a model in memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _keep_running(command: list[str], process: asyncio.subprocess.Process) -> None:
    pause_seconds = _FIRST_PAUSE_SECONDS
    try:
        while True:
            assert process.stderr is not None
            async for raw in process.stderr:
                logger.info("service: %s", raw.decode("utf-8", "replace").rstrip())
            code = await process.wait()
            logger.warning("the service exited with %d; restarting in %.0f s", code, pause_seconds)
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)
            with contextlib.suppress(ModelError):
                process, _ = await _start_service(command)
                pause_seconds = _FIRST_PAUSE_SECONDS
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(_SERVICE_STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
