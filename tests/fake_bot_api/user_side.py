"""What a test does as a user (`/user/...`): write, press, delete, read, and make things go wrong.

Bodies and answers are JSON. Reading waits for what is expected: 408 when it did not come in time.
"""

import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.fake_bot_api.state import Chat, Fault, Json, World

FAULT_KINDS = ("retry_after", "bad_gateway", "reset", "error")


def user_routes(world: World) -> list[web.RouteDef]:
    """The routes of the user's side."""
    user = _User(world)
    return [
        web.post("/user/messages", user.write),
        web.post("/user/presses", user.press),
        web.post("/user/deletions", user.delete),
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
        """{chat_id, text} or {chat_id, content: {"photo": [...]}}; user_id, reply_to_message_id …"""
        body = await request.json()
        chat = self._world.open_chat(int(body["chat_id"]))
        message: Json = {"from": _person(body.get("user_id", abs(chat.id)))}
        if "text" in body:
            message["text"] = body["text"]
            message.update(_command_entities(body["text"]))
        message.update(body.get("content", {}))
        if "reply_to_message_id" in body:
            message["reply_to"] = int(body["reply_to_message_id"])
        if "message_thread_id" in body:
            message["message_thread_id"] = int(body["message_thread_id"])
            message["is_topic_message"] = True
        message = chat.add(message)
        self._world.add_update("message", chat.view(message))
        return web.json_response(chat.view(message))

    async def press(self, request: web.Request) -> web.Response:
        """{chat_id, message_id} presses its first button; `data` sends that instead.

        `inaccessible` has Telegram describe the message as too old to be seen.
        """
        body = await request.json()
        chat = self._world.open_chat(int(body["chat_id"]))
        message = chat.messages[int(body["message_id"])]
        data = body.get("data") or message["reply_markup"]["inline_keyboard"][0][0]["callback_data"]
        self._world.num_queries += 1
        query_id = str(self._world.num_queries)
        self._world.open_queries[query_id] = chat.id
        self._world.add_update(
            "callback_query",
            {
                "id": query_id,
                "from": _person(body.get("user_id", abs(chat.id))),
                "message": _described(chat, message, bool(body.get("inaccessible"))),
                "chat_instance": str(chat.id),
                "data": data,
            },
        )
        return web.json_response({"query_id": query_id})

    async def delete(self, request: web.Request) -> web.Response:
        """{chat_id, message_id}: a user deletes a message; bots are not told."""
        body = await request.json()
        del self._world.open_chat(int(body["chat_id"])).messages[int(body["message_id"])]
        return web.json_response({})

    async def read(self, request: web.Request) -> web.Response:
        """All messages of a chat; `sender=bot` only the bot's; waits for `at_least` so many."""
        chat = self._world.open_chat(int(request.match_info["chat_id"]))
        only_bot = request.query.get("sender") == "bot"

        def messages() -> list[Json]:
            return [
                chat.view(message)
                for message in list(chat.messages.values())
                if message["from"]["is_bot"] or not only_bot
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
        """Recorded calls, of one `method` and `chat_id` if given; waits for `at_least` so many."""
        method, chat_id = request.query.get("method", ""), request.query.get("chat_id")

        def requests() -> list[Json]:
            return [
                record
                for record in self._world.requests
                if method.lower() in ("", record["method"].lower())
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
            after=bool(body.get("after", False)),
        )
        self._world.faults.append(fault)
        return web.json_response({})

    async def read_faults(self, request: web.Request) -> web.Response:
        """Faults that have not struck yet."""
        left = [vars(fault) for fault in self._world.faults if fault.times > 0]
        return web.json_response(left)

    async def clear_faults(self, request: web.Request) -> web.Response:
        """Nothing goes wrong any more."""
        self._world.faults.clear()
        return web.json_response({})


def _person(user_id: Any) -> Json:
    return {"id": int(user_id), "is_bot": False, "first_name": f"User {user_id}"}


def _command_entities(text: str) -> Json:
    command = text.split(maxsplit=1)[0] if text.strip() else ""
    if not command.startswith("/"):
        return {}
    return {"entities": [{"type": "bot_command", "offset": 0, "length": len(command)}]}


def _described(chat: Chat, message: Json, inaccessible: bool) -> Json:
    if inaccessible:
        return {"chat": chat.as_json(), "message_id": message["message_id"], "date": 0}
    return {**chat.view(message), "date": message.get("date", int(time.time()))}
