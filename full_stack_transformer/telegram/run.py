"""`fst telegram_bot`: the token and the options, checked before anything slow is imported.

Knows nothing of Telegram but the shape of a token, and that the token is a secret.
"""

import asyncio
import logging
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from full_stack_transformer.arguments.serving import TelegramBotArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.telegram.state.settings import MAX_LENGTH, Settings

TOKEN_VARIABLE = "TELEGRAM_BOT_TOKEN"  # noqa: S105 - the name of the variable, no token
SECRET_VARIABLE = "TELEGRAM_WEBHOOK_SECRET"  # noqa: S105 - as above
API_KEY_VARIABLE = "SERVICE_API_KEY"
# https://core.telegram.org/bots/api#setwebhook takes 1 to 256; a short one could be guessed
_SECRET_PATTERN = re.compile(r"[A-Za-z0-9_-]{16,256}")
# https://core.telegram.org/bots/api#authorizing-your-bot; nothing that could change an address
_TOKEN_PATTERN = re.compile(r"[0-9]{1,20}:[A-Za-z0-9_-]{1,200}")
_MAX_TOKEN_FILE_CHARACTERS = 4096


def run_bot(arguments: TelegramBotArguments) -> int:
    """Answer Telegram messages until SIGTERM or SIGINT, and return the exit code.

    Raises:
        UsageError: the token or the webhook's secret is missing or malformed, or an option is.
        InputError: Telegram does not accept the token.
        MachineError: Telegram cannot be reached, or a file or port is taken.
    """
    token = _read_token(arguments.token_file)
    _check_address("--telegram_api_base", arguments.telegram_api_base)
    _check_address("--service_url", arguments.service_url)
    secret = ""
    if arguments.webhook_url is not None:
        _check_address("--webhook_url", arguments.webhook_url)
        secret = _read_webhook_secret()
    settings = _default_settings(arguments)
    # Imported here: aiogram takes 3 s, and a missing token should be said at once.
    from full_stack_transformer.telegram.bot import BotOptions, run

    api_key = os.environ.get(API_KEY_VARIABLE, "").strip() or None
    for hidden in filter(None, (token, secret, api_key)):
        hide_from_logs(hidden)
    options = BotOptions(
        token=token,
        telegram_api_base=arguments.telegram_api_base,
        database=arguments.database,
        default_settings=settings,
        service_url=arguments.service_url.rstrip("/").removesuffix("/v1"),
        service_api_key=api_key,
        checkpoint=arguments.checkpoint,
        device=arguments.device,
        allowed_ids=frozenset(arguments.allowed_ids),
        admin_ids=frozenset(arguments.admin_ids),
        max_tokens_per_day=arguments.max_tokens_per_day,
        webhook_url=arguments.webhook_url,
        webhook_secret=secret,
        webhook_host=arguments.webhook_host,
        webhook_port=arguments.webhook_port,
        monitoring_port=arguments.monitoring_port,
        log_texts=arguments.log_texts,
    )
    asyncio.run(run(options))
    return 0


def _read_webhook_secret() -> str:
    secret = os.environ.get(SECRET_VARIABLE, "").strip()
    if not _SECRET_PATTERN.fullmatch(secret):
        raise UsageError(
            f"--webhook_url needs a secret that nobody can guess, of 16 to 256 letters, digits, - and _, "
            f"in the environment variable {SECRET_VARIABLE}; found {'none' if not secret else 'another'}"
        )
    return secret


def _read_token(token_file: Path | None) -> str:
    if token_file is None:
        source, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            raise UsageError(
                f"the bot needs its token, which @BotFather gives: set the environment variable "
                f"{TOKEN_VARIABLE}, or pass --token_file with a file that holds it"
            )
    else:
        source, token = f"--token_file {token_file}", _read_token_file(token_file)
    if not _TOKEN_PATTERN.fullmatch(token):
        # Without what was found: it may be the token with a slip.
        raise UsageError(
            f"{source} should hold a token such as 123456789:AAE-xyz, digits, a colon and letters, "
            "and holds something else; copy it again from @BotFather"
        )
    return token


def _read_token_file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            token = file.read(_MAX_TOKEN_FILE_CHARACTERS).strip()
    except OSError as error:
        raise UsageError(f"--token_file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--token_file {path} should hold a token, but is no text") from None
    if not token:
        raise UsageError(f"--token_file {path} is empty; put the bot's token into it")
    return token


def _check_address(flag: str, address: str) -> None:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    # aiogram takes braces in the address for places to fill in
    if not usable or re.search(r"[\s{}?#]", address):
        raise UsageError(
            f"{flag} must be an address such as http://127.0.0.1:9228, found {address!r}"
        )


def _default_settings(arguments: TelegramBotArguments) -> Settings:
    """The settings of a chat that never changed them, within the bounds that chats have."""
    if arguments.max_new_tokens > MAX_LENGTH:
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
    """Replaces a secret in every record, also in the traceback that comes with it.

    The bot's own errors never hold the token; this is for a library that logs an address.
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
    """Keep `secret` out of whatever the root logger's handlers write from now on."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_HideSecret(secret))
