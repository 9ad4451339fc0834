"""The fake Bot API as its own process, and its user's side as Python calls.

with running_fake_bot_api() as telegram:
    telegram.write(chat_id=1, text="Hello")
    (answer,) = telegram.bot_messages(chat_id=1, at_least=1)
"""

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

Json = dict[str, Any]

_REPOSITORY = Path(__file__).parents[2]
# Long, because a busy machine is slow; what is expected comes in milliseconds.
_PATIENCE_SECONDS = 300.0


class FakeBotApi:
    """A running server, seen from a test."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.token = token
        # Longer than any waiting read, so that a test fails with 408 and not in the client.
        self.http = httpx.Client(base_url=url, timeout=2 * _PATIENCE_SECONDS, trust_env=False)

    def write(self, chat_id: int, text: str | None = None, **more: Any) -> Json:
        """A user writes; `content={"photo": [...]}` instead of a text for something else."""
        body = {"chat_id": chat_id, **({} if text is None else {"text": text}), **more}
        return self._post("/user/messages", body)

    def press(self, chat_id: int, message_id: int, **more: Any) -> str:
        """A user presses the first button below a message; returns the id of the query."""
        body = {"chat_id": chat_id, "message_id": message_id, **more}
        return str(self._post("/user/presses", body)["query_id"])

    def stop(self, chat_id: int) -> None:
        """A user presses the Stop of the draft that streams."""
        self._post("/user/stops", {"chat_id": chat_id})

    def block(self, chat_id: int, *, is_blocked: bool = True, tell: bool = True) -> None:
        """A user blocks the bot; without an update if `tell` is false."""
        self._post("/user/blocks", {"chat_id": chat_id, "is_blocked": is_blocked, "tell": tell})

    def migrate(self, chat_id: int, new_id: int, *, tell: bool = True) -> None:
        """A group becomes a supergroup."""
        self._post("/user/migrations", {"chat_id": chat_id, "new_id": new_id, "tell": tell})

    def edit(self, chat_id: int, message_id: int, text: str) -> Json:
        """A user edits a message."""
        body = {"chat_id": chat_id, "message_id": message_id, "text": text}
        return self._post("/user/edits", body)

    def send_raw_updates(self, updates: list[Any]) -> None:
        """Send updates that Telegram would never send."""
        # In ASCII: half a surrogate pair, which Telegram may send too, has no UTF-8.
        content = json.dumps({"updates": updates})
        headers = {"content-type": "application/json"}
        self.http.post("/user/updates", content=content, headers=headers).raise_for_status()

    def draft(self, chat_id: int, words: str = "", timeout: float = _PATIENCE_SECONDS) -> Json:
        """The draft in a chat, once there is one that holds `words`."""
        query: Json = {"at_least": 1, "words": words, "timeout": timeout}
        return self._get(f"/user/chats/{chat_id}/draft", query)[0]

    def has_draft(self, chat_id: int) -> bool:
        """Whether a chat has a draft."""
        return bool(self._get(f"/user/chats/{chat_id}/draft", {"at_least": 0}))

    def state(self, **query: Any) -> Json:
        """Number of waiting updates, and of calls beyond a rate limit."""
        query = {"timeout": _PATIENCE_SECONDS, **query}
        state: Json = self.http.get("/user/state", params=query).json()
        return state

    def delete(self, chat_id: int, message_id: int) -> None:
        """A user deletes a message."""
        self._post("/user/deletions", {"chat_id": chat_id, "message_id": message_id})

    def bot_messages(
        self,
        chat_id: int,
        at_least: int = 0,
        button: str = "",
        words: str = "",
        timeout: float = _PATIENCE_SECONDS,
    ) -> list[Json]:
        """The bot's messages in a chat, once there are `at_least`: those with `button` and `words`."""
        query: Json = {"sender": "bot", "at_least": at_least, "timeout": timeout}
        query |= {"button": button, "words": words}
        return self._get(f"/user/chats/{chat_id}/messages", query)

    def query_answer(self, query_id: str, timeout: float = _PATIENCE_SECONDS) -> Json:
        """How the bot answered a press, once it did."""
        return self._get(f"/user/query_answers/{query_id}", {"timeout": timeout})[0]

    def requests(
        self,
        method: str,
        chat_id: int | None = None,
        at_least: int = 0,
        *,
        answered: bool = True,
        timeout: float = _PATIENCE_SECONDS,
    ) -> list[Json]:
        """Recorded calls of the bot, once there are `at_least` of them that were answered (or begun)."""
        query: Json = {"method": method, "at_least": at_least, "timeout": timeout}
        if answered:
            query["answered"] = 1
        if chat_id is not None:
            query["chat_id"] = chat_id
        return self._get("/user/requests", query)

    def fail(self, method: str, kind: str, times: int = 1, **more: Any) -> None:
        """Let the next calls of `method` (or "*") fail: retry_after, bad_gateway, reset, error, hang."""
        self._post("/user/faults", {"method": method, "kind": kind, "times": times, **more})

    def clear_faults(self) -> None:
        """End all faults; calls that hang end with 504."""
        self.http.delete("/user/faults")

    def _post(self, path: str, body: Json) -> Json:
        answer: Json = self.http.post(path, json=body).raise_for_status().json()
        return answer

    def _get(self, path: str, query: Json) -> list[Json]:
        response = self.http.get(path, params=query)
        assert response.status_code == 200, f"in time there was only: {response.text[:2000]}"
        answer: list[Json] = response.json()
        return answer


@contextmanager
def running_fake_bot_api(
    token: str | None = None, *, with_limits: bool = True
) -> Iterator[FakeBotApi]:
    """Start the server on a free port, and stop it at the end.

    Its token is one of its own: a bot of another test that polls a port of long ago gets 401 here, and
    not the updates of this test.
    """
    token = token or f"42:FAKE-{secrets.token_urlsafe(16)}"
    command = [sys.executable, "-m", "tests.fake_bot_api", "--port", "0", "--token", token]
    command += [] if with_limits else ["--no_limits"]
    with subprocess.Popen(command, cwd=_REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            telegram = FakeBotApi(process.stdout.readline().strip(), token)
            with telegram.http:
                yield telegram
        finally:
            process.terminate()
            process.wait(_PATIENCE_SECONDS)
