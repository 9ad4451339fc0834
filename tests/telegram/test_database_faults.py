"""The database of the real bot process is deleted, replaced, copied over, opened twice, or has no room."""

import os
import resource
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from full_stack_transformer.errors import MachineError
from full_stack_transformer.telegram.state.database import DatabaseLostError
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import ENGLISH
from tests.fake_bot_api.process import FakeBotApi
from tests.telegram.bot_forks import QUICK, BotForks, ForkedBot
from tests.telegram.bot_process import bot_command
from tests.telegram.stand_in_service import StandInService
from tests.telegram.watching import finals

NOWHERE = "http://127.0.0.1:9"

WITH_LIMITS = False


def files_of(database: Path) -> list[Path]:
    return sorted(database.parent.glob(f"{database.name}*"))


@pytest.fixture
def database(quick_path: Path) -> Path:
    return quick_path / "bot.sqlite3"


@pytest.fixture
def own_bot(
    telegram: FakeBotApi, service: StandInService, forks: BotForks, database: Path
) -> "ForkedBot":
    command = bot_command(service.url, telegram.url, "--database", str(database))
    return forks.bot(command, telegram.token, QUICK)


def test_nothing_is_lost_when_the_database_is_deleted_under_the_bot(
    telegram: FakeBotApi, service: StandInService, own_bot: ForkedBot, database: Path, chat_id: int
) -> None:
    chats = range(chat_id * 1000, chat_id * 1000 + 10)
    own_bot.start()
    try:
        with service.holding("0"):  # of the first chat: it is pending when the file is gone
            for number in range(3):
                for chat in chats:
                    telegram.write(chat, str(number))
                if number == 1:
                    telegram.state(idle=1)
                    for path in files_of(database):
                        path.unlink()
            assert own_bot.wait() == 1
        *_, sentence = own_bot.log.splitlines()
        assert sentence.startswith(f"fst: --database {database} was deleted or moved while")
        assert f"are in {database}: start it again" in sentence
        assert "Traceback" not in own_bot.log
        own_bot.start()
        for chat in chats:
            texts = [message["text"] for message in finals(telegram, chat, at_least=3)]
            assert [text.split()[0] for text in texts] == ["0", "1", "2"]
        assert own_bot.stop() == 0
    finally:
        own_bot.kill()


def _delete(path: Path) -> None:
    path.unlink()


def _delete_all(path: Path) -> None:
    for file in files_of(path):
        file.unlink()


def _delete_log(path: Path) -> None:
    path.with_name(f"{path.name}-wal").unlink()


def _delete_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def _move(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"of somebody else")
    other.replace(path)


def _copy_over(path: Path) -> None:
    path.write_bytes(path.with_name("other").read_bytes())


@pytest.mark.parametrize(
    "lose",
    [_delete, _delete_all, _delete_log, _delete_folder, _move, _replace, _copy_over],
    ids=lambda function: function.__name__.strip("_"),
)
def test_a_lost_database_is_noticed_and_saved(
    quick_path: Path, lose: Callable[[Path], None]
) -> None:
    path = quick_path / "folder" / "bot.sqlite3"
    earlier = Store(path, 42)
    earlier.add_job(1, "answers", "of an earlier copy")
    earlier.close()
    shutil.copy(path, path.with_name("other"))
    store = Store(path, 42)
    store.add_job(5, "answers", "answer")
    store.check()
    lose(path)
    with pytest.raises(DatabaseLostError):
        store.check()
    sentence = store.rescue()
    store.close()
    assert "its 2 pending messages" in sentence
    at_its_path = lose not in (_replace, _copy_over)
    saved = path if at_its_path else path.with_name("bot.sqlite3.rescued")
    assert f"are in {saved}: " in sentence
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    if lose is _copy_over:  # and nothing of the old log has come into it
        with_other = Store(path, 42)
        assert with_other.num_jobs() == 1
        with_other.close()
    if not at_its_path:
        saved.replace(path)
    again = Store(path, 42)
    assert again.num_jobs() == 2
    again.check()
    again.close()


def test_what_is_emptied_in_place_is_called_lost_and_left_alone(database: Path) -> None:
    Store(database, 42).close()
    store = Store(database, 42)
    store.add_job(5, "answers", "answer")
    database.write_bytes(b"")
    with pytest.raises(DatabaseLostError):
        store.check()
    assert "1 pending messages are lost, as they cannot be saved: " in store.rescue()
    store.close()
    assert files_of(database) == [database]
    assert database.read_bytes() == b""


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_the_files_are_private_whatever_the_umask(quick_path: Path, umask: int) -> None:
    path = quick_path / "bot.sqlite3"
    before = os.umask(umask)
    try:
        store = Store(path, 42)
        store.saw_message(1, 1)
    finally:
        os.umask(before)
    files = files_of(path)
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    store.close()


def test_a_file_that_others_could_read_is_made_private_aloud(
    telegram: FakeBotApi, own_bot: ForkedBot, database: Path
) -> None:
    Store(database, 42).close()
    for ending in ("", "-wal", "-shm"):
        path = database.with_name(database.name + ending)
        path.touch()
        path.chmod(0o644)
    try:
        own_bot.start()
        assert {stat.S_IMODE(file.stat().st_mode) for file in files_of(database)} == {0o600}
        line = own_bot.wait_for_log("could be read by other users (mode 0644)")
        assert str(database) in line
    finally:
        own_bot.kill()


def test_a_path_that_is_no_file_is_refused() -> None:
    with pytest.raises(MachineError, match="not a regular file"):
        Store(Path("/dev/null"), 42)
    assert stat.S_IMODE(Path("/dev/null").stat().st_mode) != 0o600


def test_a_file_of_something_else_is_refused_and_left_alone(database: Path) -> None:
    database.write_text("notes")
    database.chmod(0o644)
    with pytest.raises(MachineError, match="is not a database"):
        Store(database, 42)
    assert stat.S_IMODE(database.stat().st_mode) == 0o644


def test_one_database_is_used_by_one_bot_under_all_its_names(
    telegram: FakeBotApi, own_bot: ForkedBot, forks: BotForks, database: Path
) -> None:
    folder = database.parent
    own_bot.start()
    try:
        (folder / "symbolic").symlink_to(database.name)
        (folder / "hard").hardlink_to(database)
        (folder / "linked").symlink_to(".")
        names = ("symbolic", "hard", "linked/bot.sqlite3", "linked/linked/symbolic")
        relative = os.path.relpath(database)
        for name in (*(str(folder / name) for name in names), relative):
            with pytest.raises(MachineError, match="is used by another bot process"):
                Store(Path(name), 42)
        # A stand-by would look for the log beside its own name.
        hard = str(folder / "hard")
        second = forks.bot(bot_command(NOWHERE, telegram.url, "--database", hard), telegram.token)
        second.begin()
        assert second.wait() == 1
        (line,) = second.log.splitlines()
        assert line.startswith(f"fst: --database {hard} is used by another bot process and has 2")
        assert own_bot.stop() == 0
    finally:
        own_bot.kill()


@pytest.mark.parametrize("kind", ["429", "hang", "reset"])
def test_a_chat_that_takes_no_messages_does_not_hold_up_the_end(
    telegram: FakeBotApi, own_bot: ForkedBot, chat_id: int, kind: str
) -> None:
    if kind == "429":
        telegram.fail("sendMessage", "retry_after", 9, chat_id=chat_id, retry_after=300)
    else:
        telegram.fail("sendMessage", kind, 9999, chat_id=chat_id)
    own_bot.start()
    try:
        telegram.write(chat_id, "For later")
        telegram.write(chat_id, "/help")
        telegram.requests("sendMessage", chat_id, at_least=1, answered=kind != "hang")
        started = time.monotonic()
        assert own_bot.stop() == 0
        assert time.monotonic() - started < 20  # 61 s before
        assert "2 jobs are left for the next start" in own_bot.log
        telegram.clear_faults()
        own_bot.start()
        (answer,) = finals(telegram, chat_id)
        assert answer["text"].startswith("For later goes on")
        assert len(telegram.bot_messages(chat_id, at_least=2)) == 2
        assert own_bot.stop() == 0
    finally:
        own_bot.kill()


def test_a_full_disk_is_one_sentence_and_goes_on_when_there_is_room(
    telegram: FakeBotApi, service: StandInService, own_bot: ForkedBot, database: Path, chat_id: int
) -> None:
    own_bot.start()
    try:
        with service.holding("In the middle") as hold:
            telegram.write(chat_id, "In the middle")
            hold.wait()
            telegram.state(idle=1)
            unlimited = _fill_disk(own_bot, database)
        own_bot.wait_for_log("cannot be written")
        telegram.write(chat_id, "While it is full")
        telegram.write(chat_id + 500_000, "Of another chat")
        time.sleep(2.5)  # several attempts
        assert telegram.state()["num_waiting_updates"] == 2
        assert own_bot.log.count("cannot be written") == 1
        _limit(own_bot, unlimited)
        first, second = finals(telegram, chat_id, at_least=2)
        assert first["text"].startswith("In the middle goes on")
        assert second["text"].startswith("While it is full goes on")
        finals(telegram, chat_id + 500_000)
        own_bot.wait_for_log("can be written again")
        assert len([r for r in service.requests if r.prompt == "In the middle"]) == 2  # type: ignore[union-attr]
        assert "Traceback" not in own_bot.log
        assert ENGLISH.failed not in [m["text"] for m in telegram.bot_messages(chat_id)]
        assert own_bot.stop() == 0
    finally:
        own_bot.kill()


def test_a_full_disk_does_not_hold_up_the_end(
    telegram: FakeBotApi, own_bot: ForkedBot, database: Path, chat_id: int
) -> None:
    own_bot.start()
    try:
        telegram.write(chat_id, "Before")
        finals(telegram, chat_id)
        _fill_disk(own_bot, database)
        telegram.write(chat_id, "Later")
        own_bot.wait_for_log("cannot be written")
        started = time.monotonic()
        assert own_bot.stop() == 0
        assert time.monotonic() - started < 10
        own_bot.start()
        finals(telegram, chat_id, at_least=2)
        assert "Traceback" not in own_bot.log
        assert own_bot.stop() == 0
    finally:
        own_bot.kill()


def _fill_disk(bot: ForkedBot, database: Path) -> tuple[int, int]:
    """Let no file of the bot grow beyond the size of SQLite's log now; its own log is smaller."""
    size = database.with_name(f"{database.name}-wal").stat().st_size
    assert size > 10_000
    return _limit(bot, (size, -1))


def _limit(bot: ForkedBot, limits: tuple[int, int]) -> tuple[int, int]:
    assert bot.process_id is not None
    return resource.prlimit(bot.process_id, resource.RLIMIT_FSIZE, limits)
