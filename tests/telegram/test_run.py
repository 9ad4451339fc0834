"""What is rejected before Telegram is called."""

import logging
from pathlib import Path

import pytest

from full_stack_transformer.arguments.serving import TelegramBotArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.telegram.run import (
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    hide_from_logs,
)
from full_stack_transformer.telegram.run import (
    main as run_bot,
)

TOKEN = "42:very-secret"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)


@pytest.mark.parametrize("value", ["", "  \n", "secret", "42:very secret", "42:a/../b", "42:{x}"])
def test_an_invalid_token_is_rejected_without_being_quoted(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, value)
    with pytest.raises(UsageError, match=TOKEN_VARIABLE) as refused:
        run_bot(TelegramBotArguments())
    assert refused.value.exit_code == 2
    assert not value.strip() or value not in str(refused.value)


@pytest.mark.parametrize(
    "content", [None, b"", b" \n", b"secret", b"\xff\xfe"], ids=["none", "0", "blank", "odd", "utf"]
)
def test_a_token_file_without_a_token_is_rejected(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="--token_file") as refused:
        run_bot(TelegramBotArguments(token_file=path))
    assert "secret" not in str(refused.value)


def test_a_directory_is_rejected_as_token_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        run_bot(TelegramBotArguments(token_file=tmp_path))


@pytest.mark.parametrize(
    "address", ["", "localhost:9228", "ftp://host", "http://", "http://[", "http://h/{token}"]
)
@pytest.mark.parametrize("option", ["service_url", "telegram_api_base", "webhook_url"])
def test_an_invalid_url_is_rejected(option: str, address: str) -> None:
    with pytest.raises(UsageError, match=f"--{option}"):
        run_bot(TelegramBotArguments(**{option: address}))  # type: ignore[arg-type]


def test_a_default_length_beyond_the_bound_is_rejected() -> None:
    with pytest.raises(UsageError, match="--max_new_tokens"):
        run_bot(TelegramBotArguments(max_new_tokens=10_000_000))


@pytest.mark.parametrize("secret", ["", "short", "with space and é, long enough"])
def test_a_webhook_needs_a_secret(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    with pytest.raises(UsageError, match=SECRET_VARIABLE) as refused:
        run_bot(TelegramBotArguments(webhook_url="https://example.org/updates"))
    assert not secret or secret not in str(refused.value)


def test_the_token_is_hidden_in_messages_and_tracebacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    hide_from_logs(TOKEN)
    try:
        raise ValueError(f"https://api.telegram.org/bot{TOKEN}/getMe")
    except ValueError:
        logging.getLogger("library").exception("failed at bot%s", TOKEN)
    written = capsys.readouterr().err
    assert "very-secret" not in written
    assert "failed at botTOKEN" in written
    assert "ValueError: https://api.telegram.org/botTOKEN/getMe" in written
