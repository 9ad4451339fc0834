"""What a test does as a user (`/user/...`): write, press, delete, read, and script faults.

Bodies and answers are JSON. Reading waits for what is expected: 408 when it did not come in time.
"""

import re
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.fake_bot_api.checks import units
from tests.fake_bot_api.state import Chat, Fault, Json, World

# As in Telegram's client library: https://github.com/tdlib/td/blob/master/td/telegram/MessageEntity.cpp
_ENTITY_PATTERNS = (
    ("url", re.compile(r"https?://\S+")),
    ("email", re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+")),
    ("bot_command", re.compile(r"(?<![\w/<>])/\w{1,64}(?:@\w{3,32})?(?![\w/<>])", re.ASCII)),
    ("mention", re.compile(r"(?<!\w)@[A-Za-z0-9_]{2,32}(?!\w)")),
)

FAULT_KINDS = ("retry_after", "bad_gateway", "reset", "error", "hang")


def user_routes(world: World) -> list[web.RouteDef]:
    """The routes of the user's side."""
    user = _User(world)
    return [
        web.post("/user/messages", user.write),
        web.post("/user/presses", user.press),
        web.post("/user/deletions", user.delete),
        web.post("/user/stops", user.stop),
        web.post("/user/blocks", user.block),
        web.post("/user/migrations", user.migrate),
        web.post("/user/edits", user.edit),
        web.post("/user/updates", user.add_raw_updates),
        web.post("/user/bot", user.change_bot),
        web.get("/user/state", user.read_state),
        web.get("/user/chats/{chat_id}/draft", user.read_draft),
        web.get("/user/chats/{chat_id}/messages", user.read),
        web.get("/user/query_answers/{query_id}", user.read_query_answer),
        web.get("/user/requests", user.read_requests),
        web.post("/user/faults", user.add_faults),
        web.get("/user/faults", user.read_faults),
        web.delete("/user/faults", user.clear_faults),
    ]


class _User:
    def __init__(self, world: World) -> None:
        self._world = world

    async def write(self, request: web.Request) -> web.Response:
        """{chat_id, text} or {chat_id, content: {"photo": [...]}}; user_id, reply_to_message_id …

        Entities are found as Telegram does, unless `content` has them. The bot receives every message of
        a group, as an administrator does.
        """
        body = await request.json()
        chat = self._world.open_chat(int(body["chat_id"]))
        user_id = body.get("user_id", abs(chat.id))
        message: Json = {"from": _person(user_id, body.get("language_code"))}
        if "text" in body:
            message["text"] = body["text"]
        message.update(body.get("content", {}))
        if "file" in body:
            message["document"] = self._document(body["file"])
        for field, entities in (("text", "entities"), ("caption", "caption_entities")):
            if field in message and entities not in message:
                message[entities] = _entities_of(message[field])
        if "reply_to_message_id" in body:
            message["reply_to"] = int(body["reply_to_message_id"])
        if "message_thread_id" in body:
            message["message_thread_id"] = int(body["message_thread_id"])
            chat.threads.add(message["message_thread_id"])
            message["is_topic_message"] = True
        message = chat.add(message)
        self._world.add_update("message", chat.view(message))
        return web.json_response(chat.view(message))

    def _document(self, file: Json) -> Json:
        """A file of {name, text, mime_type} that the bot may read; `hex` instead of a text."""
        content = bytes.fromhex(file["hex"]) if "hex" in file else file["text"].encode()
        file_id = f"file{len(self._world.files)}"
        self._world.files[file_id] = content
        document = {"file_id": file_id, "file_unique_id": file_id, "file_name": file["name"]}
        more = {"mime_type": file["mime_type"]} if "mime_type" in file else {}
        return {**document, **more, "file_size": len(content)}

    async def press(self, request: web.Request) -> web.Response:
        """{chat_id, message_id} presses its first button, or the one whose text holds `button`.

        `data` sends that instead of what the button carries.

        `inaccessible` has Telegram describe the message as too old to be seen.
        """
        body = await request.json()
        chat = self._world.open_chat(int(body["chat_id"]))
        message = chat.messages[int(body["message_id"])]
        data = body.get("data") or _button_data(message, body.get("button", ""))
        self._world.num_queries += 1
        query_id = str(self._world.num_queries)
        self._world.open_queries[query_id] = chat.id
        self._world.add_update(
            "callback_query",
            {
                "id": query_id,
                "from": _person(body.get("user_id", abs(chat.id)), body.get("language_code")),
                "message": _described(chat, message, bool(body.get("inaccessible"))),
                "chat_instance": str(chat.id),
                "data": data,
            },
        )
        return web.json_response({"query_id": query_id})

    async def stop(self, request: web.Request) -> web.Response:
        """{chat_id} presses the Stop of the draft that streams now."""
        chat = self._world.open_chat(int((await request.json())["chat_id"]))
        draft = chat.living_draft()
        if draft is None or not draft["can_stop"]:
            return web.json_response({"error": "nothing streams that can be stopped"}, status=409)
        stopped = {"chat": chat.as_json(), "draft_id": draft["draft_id"]}
        self._world.add_update("stopped_message_generation", stopped)
        return web.json_response({"draft_id": draft["draft_id"]})

    async def block(self, request: web.Request) -> web.Response:
        """{chat_id}: a user blocks the bot, or with `is_blocked` false lets it in again."""
        body = await request.json()
        chat = self._world.open_chat(int(body["chat_id"]))
        chat.is_blocked = bool(body.get("is_blocked", True))
        out: Json = {"user": self._world.bot, "status": "kicked", "until_date": 0}
        inside: Json = {"user": self._world.bot, "status": "member"}
        old, new = (inside, out) if chat.is_blocked else (out, inside)
        update = {
            "chat": chat.as_json(),
            "from": _person(abs(chat.id)),
            "date": int(time.time()),
            "old_chat_member": old,
            "new_chat_member": new,
        }
        if body.get("tell", True):
            self._world.add_update("my_chat_member", update)
        return web.json_response({})

    async def migrate(self, request: web.Request) -> web.Response:
        """{chat_id, new_id}: a group becomes a supergroup; `tell` false keeps it from the bot."""
        body = await request.json()
        old = self._world.open_chat(int(body["chat_id"]))
        new = self._world.open_chat(int(body["new_id"]))
        old.moved_to = new.id
        person = {"from": _person(abs(old.id))}
        leaving = old.add({**person, "migrate_to_chat_id": new.id})
        arriving = new.add({**person, "migrate_from_chat_id": old.id})
        if body.get("tell", True):
            self._world.add_update("message", old.view(leaving))
            self._world.add_update("message", new.view(arriving))
        return web.json_response({})

    async def edit(self, request: web.Request) -> web.Response:
        """{chat_id, message_id, text}: a user edits a message."""
        body = await request.json()
        chat = self._world.open_chat(int(body["chat_id"]))
        message = chat.messages[int(body["message_id"])]
        message.update({"text": body["text"], "edit_date": int(time.time())})
        self._world.add_update("edited_message", chat.view(message))
        return web.json_response(chat.view(message))

    async def add_raw_updates(self, request: web.Request) -> web.Response:
        """{updates: [...]}: updates that Telegram would never send; one without an id gets one."""
        for update in (await request.json())["updates"]:
            self._world.num_updates += 1
            if isinstance(update, dict):
                update = {"update_id": self._world.num_updates, **update}
            self._world.updates.append(update)
        self._world.bell.ring()
        return web.json_response({"num_updates": self._world.num_updates})

    async def change_bot(self, request: web.Request) -> web.Response:
        """{can_read_all_group_messages: true}: what the bot's owner changes."""
        self._world.bot.update(await request.json())
        return web.json_response(self._world.bot)

    async def read_state(self, request: web.Request) -> web.Response:
        """Number of waiting updates, and of calls beyond a rate limit; waits for `idle`."""
        if "idle" in request.query:
            timeout_seconds = float(request.query.get("timeout", 10))
            await self._world.bell.wait_until(lambda: not self._world.updates, timeout_seconds)
        return web.json_response(
            {
                "num_waiting_updates": len(self._world.updates),
                "num_limited": self._world.num_limited,
                "webhook_failures": self._world.webhook_failures,
            }
        )

    async def read_draft(self, request: web.Request) -> web.Response:
        """The draft of a chat; waits for one whose text contains `words`."""
        chat = self._world.open_chat(int(request.match_info["chat_id"]))
        words = request.query.get("words", "")

        def drafts() -> list[Json]:
            draft = chat.living_draft()
            return [draft] if draft is not None and words in draft["text"] else []

        return await self._when_enough(request, drafts)

    async def delete(self, request: web.Request) -> web.Response:
        """{chat_id, message_id}: a user deletes a message; bots are not told."""
        body = await request.json()
        del self._world.open_chat(int(body["chat_id"])).messages[int(body["message_id"])]
        return web.json_response({})

    async def read(self, request: web.Request) -> web.Response:
        """Messages of a chat; `sender=bot` only the bot's, only with such a `button` and `words`; waits."""
        chat = self._world.open_chat(int(request.match_info["chat_id"]))
        only_bot = request.query.get("sender") == "bot"
        button, words = request.query.get("button", ""), request.query.get("words", "")

        def messages() -> list[Json]:
            return [
                chat.view(message)
                for message in list(chat.messages.values())
                if (message["from"]["is_bot"] or not only_bot)
                and _has_button(message, button)
                and words in message.get("text", "")
            ]

        return await self._when_enough(request, messages)

    async def read_query_answer(self, request: web.Request) -> web.Response:
        """How the bot answered a press; waits for it."""
        query_id = request.match_info["query_id"]
        answers = self._world.query_answers

        def found() -> list[Json]:
            return [answers[query_id]] if query_id in answers else []

        return await self._when_enough(request, found, at_least=1)

    async def read_requests(self, request: web.Request) -> web.Response:
        """Recorded calls, of one `method` and `chat_id` if given, or `answered`; waits."""
        method, chat_id = request.query.get("method", ""), request.query.get("chat_id")

        def requests() -> list[Json]:
            return [
                record
                for record in self._world.requests
                if method.lower() in ("", record["method"].lower())
                and (record["status"] is not None or "answered" not in request.query)
                and chat_id in (None, str(record["parameters"].get("chat_id")))
            ]

        return await self._when_enough(request, requests)

    async def _when_enough(
        self, request: web.Request, found: Callable[[], list[Json]], at_least: int = 0
    ) -> web.Response:
        at_least = int(request.query.get("at_least", at_least))
        timeout_seconds = float(request.query.get("timeout", 10))
        enough = await self._world.bell.wait_until(
            lambda: len(found()) >= at_least, timeout_seconds
        )
        return web.json_response(found(), status=200 if enough else 408)

    async def add_faults(self, request: web.Request) -> web.Response:
        """{method, kind, times, chat_id, retry_after, status, description, after}."""
        body = await request.json()
        if body["kind"] not in FAULT_KINDS:
            return web.json_response({"kinds": FAULT_KINDS}, status=400)
        fault = Fault(
            method=body["method"],
            kind=body["kind"],
            times=int(body.get("times", 1)),
            chat_id=body.get("chat_id"),
            status=int(body.get("status", 403)),
            description=body.get("description", "Forbidden: bot was blocked by the user"),
            retry_after=int(body.get("retry_after", 1)),
            seconds=float(body.get("seconds", 3600)),
            after=bool(body.get("after", False)),
        )
        self._world.faults.append(fault)
        return web.json_response({})

    async def read_faults(self, request: web.Request) -> web.Response:
        """Faults that have not happened yet."""
        left = [vars(fault) for fault in self._world.faults if fault.times > 0]
        return web.json_response(left)

    async def clear_faults(self, request: web.Request) -> web.Response:
        """End all faults, and the calls that hang."""
        self._world.faults.clear()
        self._world.bell.ring()
        return web.json_response({})


def _person(user_id: Any, language_code: str | None = None) -> Json:
    person = {"id": int(user_id), "is_bot": False, "first_name": f"User {user_id}"}
    return person if language_code is None else {**person, "language_code": language_code}


def _button_data(message: Json, words: str) -> str:
    rows = message["reply_markup"]["inline_keyboard"]
    found = [button["callback_data"] for row in rows for button in row if words in button["text"]]
    return str(found[0])


def _has_button(message: Json, words: str) -> bool:
    rows = message.get("reply_markup", {}).get("inline_keyboard", [])
    return not words or any(words == button["text"] for row in rows for button in row)


def _entities_of(text: str) -> list[Json]:
    """What Telegram finds in a text: addresses first, so that no name within one is a mention."""
    found: list[Json] = []
    taken: list[tuple[int, int]] = []
    for kind, pattern in _ENTITY_PATTERNS:
        for match in pattern.finditer(text):
            start, end = match.span()
            if all(end <= other or start >= other_end for other, other_end in taken):
                taken.append((start, end))
                offset, length = units(text[:start]), units(match.group())
                found.append({"type": kind, "offset": offset, "length": length})
    return sorted(found, key=lambda entity: int(entity["offset"]))


def _described(chat: Chat, message: Json, inaccessible: bool) -> Json:
    if inaccessible:
        return {"chat": chat.as_json(), "message_id": message["message_id"], "date": 0}
    return {**chat.view(message), "date": message.get("date", int(time.time()))}
