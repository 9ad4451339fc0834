"""The methods that a bot calls, by their lower-case names; Telegram takes any spelling."""

import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tests.fake_bot_api.checks import (
    checked_keyboard,
    checked_text,
    from_json,
    integer,
    refuse,
)
from tests.fake_bot_api.state import UPDATE_TYPES, ApiError, Chat, Json, World

_MAX_UPDATES = 100
_MAX_QUERY_TEXT_CHARACTERS = 200
_MAX_CAPTION_CHARACTERS = 1024
# https://core.telegram.org/bots/api#botcommandscope
_SCOPES = frozenset(
    [
        "default",
        "all_private_chats",
        "all_group_chats",
        "all_chat_administrators",
        "chat",
        "chat_administrators",
        "chat_member",
    ]
)
# https://core.telegram.org/bots/api#sendchataction
_CHAT_ACTIONS = frozenset(
    [
        "typing",
        "upload_photo",
        "record_video",
        "upload_video",
        "record_voice",
        "upload_voice",
        "upload_document",
        "choose_sticker",
        "find_location",
        "record_video_note",
        "upload_video_note",
    ]
)


async def get_me(world: World, parameters: Json) -> Json:
    """Who the bot is."""
    return {**world.bot, "can_join_groups": True}


async def get_updates(world: World, parameters: Json) -> list[Json]:
    """Wait for unconfirmed updates; the newest of two concurrent polls wins."""
    if world.webhook_url:
        raise ApiError(
            409,
            "Conflict: can't use getUpdates method while webhook is active; "
            "use deleteWebhook to delete the webhook first",
        )
    allowed = from_json(parameters, "allowed_updates", list, None)
    if allowed is not None:
        world.allowed_updates = tuple(allowed) or UPDATE_TYPES
    _confirm(world, integer(parameters, "offset", 0))
    limit = max(1, min(integer(parameters, "limit", _MAX_UPDATES), _MAX_UPDATES))
    world.num_polls += 1
    own_number = world.num_polls
    world.bell.ring()  # wakes an older poll, which then finds itself replaced
    await world.bell.wait_until(
        lambda: bool(world.updates) or world.num_polls != own_number,
        integer(parameters, "timeout", 0),
    )
    if world.num_polls != own_number:
        raise ApiError(
            409,
            "Conflict: terminated by other getUpdates request; "
            "make sure that only one bot instance is running",
        )
    return world.updates[:limit]


def _confirm(world: World, offset: int) -> None:
    if offset < 0:
        world.updates = world.updates[offset:]
    else:
        world.updates = [
            update
            for update in world.updates
            # What is no update has no number; it goes with the next confirmation.
            if (update["update_id"] >= offset if isinstance(update, dict) else offset == 0)
        ]


async def send_message(world: World, parameters: Json) -> Json:
    """Write into a chat."""
    if "chat_id" not in parameters:
        raise refuse("chat_id is empty")
    chat = world.writable_chat(parameters["chat_id"])
    text, entities = checked_text(parameters)
    message: Json = {"from": world.bot, "text": text}
    if entities:
        message["entities"] = entities
    return _added(chat, message, parameters)


def _added(chat: Chat, message: Json, parameters: Json) -> Json:
    if keyboard := checked_keyboard(parameters):
        message["reply_markup"] = keyboard
    if replied := _replied(chat, parameters):
        message["reply_to"] = replied
    if "message_thread_id" in parameters:
        thread_id = integer(parameters, "message_thread_id")
        if thread_id not in chat.threads:
            raise refuse("message thread not found")
        message["message_thread_id"] = thread_id
        message["is_topic_message"] = True
    chat.draft = None  # a real message takes the place of what streamed
    return chat.view(chat.add(message))


async def send_document(world: World, parameters: Json) -> Json:
    """Write a file into a chat; its content stays readable for the test."""
    chat = world.writable_chat(parameters.get("chat_id"))
    uploads = [value for value in parameters.values() if isinstance(value, web.FileField)]
    if len(uploads) != 1:
        raise refuse("there is no document in the request")
    content = uploads[0].file.read()
    caption = str(parameters.get("caption", ""))
    if len(caption) > _MAX_CAPTION_CHARACTERS:
        raise refuse("message caption is too long")
    document = {
        "file_id": "file",
        "file_unique_id": "unique",
        "file_name": uploads[0].filename,
        "file_size": len(content),
        "content": content.decode("utf-8", "replace"),
    }
    message = {"from": world.bot, "caption": caption, "document": document}
    return _added(chat, message, parameters)


async def send_message_draft(world: World, parameters: Json) -> bool:
    """Stream a text into a private chat; it vanishes with time, and with a real message."""
    chat = world.writable_chat(parameters.get("chat_id"))
    if chat.type != "private":
        raise refuse("message drafts are supported in private chats only")
    draft_id = integer(parameters, "draft_id", 0)
    if draft_id == 0:
        raise refuse("DRAFT_ID_INVALID")
    text, entities = ("", []) if not parameters.get("text") else checked_text(parameters)
    chat.draft = {
        "draft_id": draft_id,
        "text": text,
        "entities": entities,
        "can_stop": str(parameters.get("can_stop", "")).lower() == "true",
        "at": time.monotonic(),
    }
    return True


def _replied(chat: Chat, parameters: Json) -> int | None:
    reply = from_json(parameters, "reply_parameters", dict, None)
    if reply is None:
        return None
    message_id = integer(reply, "message_id")
    if message_id in chat.messages:
        return message_id
    if reply.get("allow_sending_without_reply"):
        return None
    raise refuse("message to be replied not found")


def _own_message(world: World, parameters: Json, action: str) -> tuple[Chat, Json]:
    # Deleting is not counted; what a probe finds missing is.
    find = world.chat if action == "delete" else world.writable_chat
    chat = find(parameters.get("chat_id"))
    message = chat.messages.get(integer(parameters, "message_id", 0))
    if message is None:
        raise refuse(f"message to {action} not found")
    if message["from"] != world.bot:
        raise refuse(f"message can't be {action.removesuffix('e')}ed")
    return chat, message


async def edit_message_text(world: World, parameters: Json) -> Json:
    """Replace text, entities and keyboard of one of the bot's messages."""
    chat, message = _own_message(world, parameters, "edit")
    text, entities = checked_text(parameters)
    return _edited(
        chat, message, text=text, entities=entities, reply_markup=checked_keyboard(parameters)
    )


async def edit_message_reply_markup(world: World, parameters: Json) -> Json:
    """Replace the keyboard of one of the bot's messages."""
    chat, message = _own_message(world, parameters, "edit")
    return _edited(chat, message, reply_markup=checked_keyboard(parameters))


def _edited(chat: Chat, message: Json, **changes: Any) -> Json:
    changed = {key: value for key, value in {**message, **changes}.items() if value}
    if changed == message:
        raise refuse(
            "message is not modified: specified new message content and reply markup are exactly "
            "the same as a current content and reply markup of the message"
        )
    chat.messages[message["message_id"]] = changed
    return chat.view(changed)


async def delete_message(world: World, parameters: Json) -> bool:
    """Delete one of the bot's messages."""
    chat, message = _own_message(world, parameters, "delete")
    del chat.messages[message["message_id"]]
    return True


async def answer_callback_query(world: World, parameters: Json) -> bool:
    """End the progress circle of a pressed button, once."""
    query_id = str(parameters.get("callback_query_id", ""))
    if query_id not in world.open_queries:
        raise refuse("query is too old and response timeout expired or query ID is invalid")
    text = str(parameters.get("text", ""))
    if len(text) > _MAX_QUERY_TEXT_CHARACTERS:
        raise refuse("MESSAGE_TOO_LONG")
    del world.open_queries[query_id]
    show_alert = str(parameters.get("show_alert", "")).lower() == "true"
    world.query_answers[query_id] = {"text": text, "show_alert": show_alert}
    return True


async def send_chat_action(world: World, parameters: Json) -> bool:
    """Show what the bot is doing; only its record is kept."""
    world.chat(parameters.get("chat_id"))
    if parameters.get("action") not in _CHAT_ACTIONS:
        raise refuse("wrong parameter action in request")
    return True


async def set_my_commands(world: World, parameters: Json) -> bool:
    """Set the menu of commands of a scope and language."""
    commands = from_json(parameters, "commands", list, [])
    scope = from_json(parameters, "scope", dict, {"type": "default"})
    if scope.get("type") not in _SCOPES:
        raise refuse("unsupported scope specified")
    language = str(parameters.get("language_code", ""))
    if not re.fullmatch(r"[a-z]{2}|", language):
        raise refuse("invalid language code specified")
    for command in commands:
        if not re.fullmatch(r"[a-z0-9_]{1,32}", str(command.get("command"))):
            raise refuse("BOT_COMMAND_INVALID")
        if not 1 <= len(str(command.get("description", ""))) <= 256:
            raise refuse("BOT_COMMAND_DESCRIPTION_INVALID")
    world.commands[_menu_key(scope, language)] = commands
    return True


async def set_my_description(world: World, parameters: Json) -> bool:
    """Set what an empty chat shows, in a language."""
    return _set_description(world, parameters, "description", 512)


async def set_my_short_description(world: World, parameters: Json) -> bool:
    """Set what the bot's profile shows, in a language."""
    return _set_description(world, parameters, "short_description", 120)


def _set_description(world: World, parameters: Json, name: str, most: int) -> bool:
    text = str(parameters.get(name, ""))
    if len(text) > most:
        raise refuse("description is too long")
    world.descriptions[f"{name} {parameters.get('language_code', '')}".strip()] = text
    return True


async def get_file(world: World, parameters: Json) -> Json:
    """Where a user's file can be read."""
    file_id = str(parameters.get("file_id", ""))
    if file_id not in world.files:
        raise refuse("wrong file_id or the file is temporarily unavailable")
    size = len(world.files[file_id])
    return {
        "file_id": file_id,
        "file_unique_id": file_id,
        "file_size": size,
        "file_path": f"documents/{file_id}",
    }


async def get_my_commands(world: World, parameters: Json) -> list[Json]:
    """The menu of a scope and language."""
    scope = from_json(parameters, "scope", dict, {"type": "default"})
    key = _menu_key(scope, str(parameters.get("language_code", "")))
    return world.commands.get(key, [])


def _menu_key(scope: Json, language: str) -> str:
    return json.dumps([scope, language], sort_keys=True)


async def set_webhook(world: World, parameters: Json) -> bool:
    """Push updates to a URL from now on; polling conflicts with it.

    Less strict than Telegram in one thing: http will do, because it runs on one machine.
    """
    secret = str(parameters.get("secret_token", ""))
    if not re.fullmatch(r"[A-Za-z0-9_-]{0,256}", secret):
        raise refuse("secret token contains unallowed characters")
    allowed = from_json(parameters, "allowed_updates", list, None)
    if allowed is not None:
        world.allowed_updates = tuple(allowed) or UPDATE_TYPES
    world.webhook_url, world.webhook_secret = str(parameters.get("url", "")), secret
    world.bell.ring()
    return True


async def delete_webhook(world: World, parameters: Json) -> bool:
    """Delete the webhook."""
    world.webhook_url = ""
    if str(parameters.get("drop_pending_updates", "")).lower() == "true":
        world.updates.clear()
    return True


async def get_webhook_info(world: World, parameters: Json) -> Json:
    """The webhook, and the number of waiting updates."""
    return {
        "url": world.webhook_url,
        "has_custom_certificate": False,
        "pending_update_count": len(world.updates),
    }


Method = Callable[[World, Json], Awaitable[Any]]

METHODS: dict[str, Method] = {
    name.replace("_", ""): method
    for name, method in {
        "get_me": get_me,
        "get_updates": get_updates,
        "send_message": send_message,
        "send_message_draft": send_message_draft,
        "send_document": send_document,
        "edit_message_text": edit_message_text,
        "edit_message_reply_markup": edit_message_reply_markup,
        "delete_message": delete_message,
        "answer_callback_query": answer_callback_query,
        "send_chat_action": send_chat_action,
        "set_my_commands": set_my_commands,
        "get_my_commands": get_my_commands,
        "set_my_description": set_my_description,
        "set_my_short_description": set_my_short_description,
        "get_file": get_file,
        "set_webhook": set_webhook,
        "delete_webhook": delete_webhook,
        "get_webhook_info": get_webhook_info,
    }.items()
}
