"""Whether a message is meant for the bot, and what it says: by Telegram's entities, never by substrings.

    private chat   everything that a person sends
    group          a command, a mention, or a reply to the bot; nothing that was only forwarded
    channel        nothing, neither its posts nor their automatic forwards into a group

An administrator, or a bot without privacy mode, receives every message of a group, so this decides, not
the fact that a message arrived. Knows aiogram's messages; not what is done with them.
"""

import re
from dataclasses import dataclass

from aiogram.enums import ContentType
from aiogram.types import Message, MessageEntity, User

_COMMAND = re.compile(r"/([A-Za-z0-9_]{1,64})(?:@([A-Za-z0-9_]{1,64}))?")
# A group's admin who writes anonymously. https://core.telegram.org/bots/api#message, field `from`
_GROUP_ANONYMOUS_BOT = 1087968824
# Telegram itself, which also forwards posts of a channel into its group.
_TELEGRAM = 777000
# What a person sends in order to show something. All else that has no text is a notice of Telegram, such
# as a pin, or asks people, such as a poll; new kinds of content are among these until they are known.
_SHOWN = frozenset(
    [
        ContentType.ANIMATION,
        ContentType.AUDIO,
        ContentType.CHECKLIST,
        ContentType.CONTACT,
        ContentType.DICE,
        ContentType.DOCUMENT,
        ContentType.LIVE_PHOTO,
        ContentType.LOCATION,
        ContentType.PAID_MEDIA,
        ContentType.PHOTO,
        ContentType.RICH_MESSAGE,
        ContentType.STICKER,
        ContentType.STORY,
        ContentType.VENUE,
        ContentType.VIDEO,
        ContentType.VIDEO_NOTE,
        ContentType.VOICE,
    ]
)


@dataclass(frozen=True)
class Command:
    """A command at the beginning of a message."""

    name: str
    argument: str


@dataclass(frozen=True)
class Address:
    """A message that is, or may be, meant for the bot."""

    text: str
    """The text or caption; in a group without the mention of the bot."""
    command: Command | None
    is_certain: bool
    """False for a command in a group that names no bot: it is meant for every bot that knows it."""
    replied_id: int | None
    """The message of the bot that it replies to."""


def sender_id(message: Message) -> int | None:
    """Who wrote a message: a person, or for an anonymous admin the group; None for everybody else.

    Bots, channels (also a person who writes as one) and Telegram are not answered.
    """
    user, sender_chat = message.from_user, message.sender_chat
    if user is None or message.is_automatic_forward or user.id == _TELEGRAM:
        return None
    if sender_chat is not None:
        # One id stands for the anonymous admins of all groups, so it must not carry quotas or rights.
        is_anonymous = user.id == _GROUP_ANONYMOUS_BOT and sender_chat.id == message.chat.id
        return message.chat.id if is_anonymous else None
    if user.id == _GROUP_ANONYMOUS_BOT:
        return message.chat.id
    return None if user.is_bot else user.id


# What a text file is called, where its sender's program does not say text/….
_TEXT_NAME = re.compile(
    r".*\.(txt|md|rst|csv|tsv|jsonl?|ya?ml|toml|ini|cfg|log|xml|html|css|js|ts|py|c|h|[ch]pp|java|go|rs|rb|php"
    r"|sh|sql|tex|srt)",
    re.IGNORECASE | re.DOTALL,
)
_TEXT_TYPES = ("application/json", "application/xml", "application/x-sh", "application/toml")


def text_file_of(message: Message) -> dict[str, str] | None:
    """Id and name of the text file of a message."""
    document = message.document
    if document is None:
        return None
    name, kind = document.file_name or "file.txt", document.mime_type or ""
    is_text = kind.startswith("text/") or kind in _TEXT_TYPES
    if not (is_text or _TEXT_NAME.fullmatch(name)):
        return None
    return {"id": document.file_id, "name": re.sub(r"[\s`]+", "_", name)[:100]}


def address_of(message: Message, me: User) -> Address | None:
    """What a message says to the bot; None if it is meant for others or for nobody."""
    text, entities = _text_of(message)
    is_private = message.chat.type == "private"
    if not is_private and message.forward_origin is not None:
        return None  # the words of somebody else, who did not ask here
    if not text:
        is_shown = is_private and message.content_type in _SHOWN
        return Address("", None, True, None) if is_shown else None
    replied = message.reply_to_message
    author_id = None if replied is None or replied.from_user is None else replied.from_user.id
    # Every message of a topic seems to reply to the notice that opened the topic.
    replies_to_me = author_id == me.id and replied is not None and not replied.forum_topic_created
    replied_id = replied.message_id if replied is not None and replies_to_me else None
    mentions = [entity for entity in entities if _mentions(entity, text, me)]
    is_certain = is_private or replies_to_me or bool(mentions)
    spoken = _leading_command(text, entities, without_entities=is_private)
    if spoken is not None:
        name, addressee, argument = spoken
        if addressee and addressee.lower() != (me.username or "").lower():
            return None
        is_for_a_bot = replied is not None and replied.from_user and replied.from_user.is_bot
        if not (is_certain or addressee) and is_for_a_bot:
            return None  # a reply to another bot
        command = Command(name.lower(), argument)
        return Address(text, command, is_certain or bool(addressee), replied_id)
    if not is_certain:
        return None
    return Address(text if is_private else _without(mentions, text), None, True, replied_id)


def _text_of(message: Message) -> tuple[str, list[MessageEntity]]:
    if message.text:
        return _without_surrogates(message.text), message.entities or []
    return _without_surrogates(message.caption or ""), message.caption_entities or []


def _mentions(entity: MessageEntity, text: str, me: User) -> bool:
    if entity.type == "text_mention":
        return entity.user is not None and entity.user.id == me.id
    return entity.type == "mention" and _covered(entity, text).lower() == f"@{me.username}".lower()


def _leading_command(
    text: str, entities: list[MessageEntity], *, without_entities: bool
) -> tuple[str, str, str] | None:
    """Name, addressee and argument of the command that a message begins with.

    Args:
        text: of the message.
        entities: of the text.
        without_entities: whether a text that has no entities at all, as only a program sends it, may
            have a command.
    """
    for entity in entities:
        if entity.type == "bot_command" and entity.offset == 0:
            word = _covered(entity, text)
            break
    else:
        if entities or not without_entities:
            return None
        word = text.split(maxsplit=1)[0] if text.strip() else ""
    command = _COMMAND.fullmatch(word)
    if command is None:
        return None
    return command[1], command[2] or "", text[len(word) :].strip()


def _without(mentions: list[MessageEntity], text: str) -> str:
    """The text without these mentions, and without what separates them from it."""
    units = text.encode("utf-16-le")
    for entity in sorted(mentions, key=lambda entity: entity.offset, reverse=True):
        after = _decoded(units[2 * (entity.offset + entity.length) :])
        if entity.offset == 0:
            after = after.lstrip(" \t\n,:")
        elif after[:1].isspace():
            after = after[1:]
        units = units[: 2 * entity.offset] + after.encode("utf-16-le")
    return _decoded(units).strip()


def _covered(entity: MessageEntity, text: str) -> str:
    """The part of a text that an entity marks; offsets count UTF-16 units."""
    if entity.offset < 0 or entity.length < 0:
        return ""
    units = text.encode("utf-16-le")
    return _decoded(units[2 * entity.offset : 2 * (entity.offset + entity.length)])


def _decoded(units: bytes) -> str:
    return units.decode("utf-16-le", "replace")


def _without_surrogates(text: str) -> str:
    """Text whose surrogate pairs are joined, and single surrogates replaced."""
    return _decoded(text.encode("utf-16-le", "surrogatepass"))
