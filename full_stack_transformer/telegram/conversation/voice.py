"""The bot's own words: the jobs of the lane `words`, from their record to the message.

    say      a text of the bot                    panel    /settings, in the place of its message
    notice   one that vanishes with the answer    render   a reply whose shown variant changed
    delete   what was such a notice               status   /status
    export   /export

Knows how to send and what the database holds; not what was asked.
"""

import json

from aiogram.exceptions import TelegramBadRequest
from aiogram.methods import EditMessageText, SendDocument, SendMessage
from aiogram.types import BufferedInputFile, InlineKeyboardMarkup

from full_stack_transformer.errors import ServiceError
from full_stack_transformer.telegram.conversation.lanes import Chats
from full_stack_transformer.telegram.conversation.writing import Writer
from full_stack_transformer.telegram.sending.buttons import settings_keyboard
from full_stack_transformer.telegram.sending.delivery import Courier, MessageGoneError
from full_stack_transformer.telegram.sending.replies import (
    NO_PREVIEW,
    Piece,
    answers_to,
    explained_pieces,
    text_pieces,
)
from full_stack_transformer.telegram.state.policy import Policy
from full_stack_transformer.telegram.state.records import Job
from full_stack_transformer.telegram.state.settings import Settings
from full_stack_transformer.telegram.state.store import Store
from full_stack_transformer.telegram.texts import LANGUAGES


class Voice:
    """Does the jobs of the lane `words`."""

    def __init__(
        self,
        store: Store,
        courier: Courier,
        chats: Chats,
        writer: Writer,
        policy: Policy,
        default: Settings,
    ) -> None:
        self._store = store
        self._courier = courier
        self._chats = chats
        self._writer = writer
        self._policy = policy
        self._default = default

    async def say(self, job: Job) -> None:
        """Do one job."""
        kinds = {
            "say": self._say,
            "notice": self._notice,
            "delete": self._delete,
            "panel": self._panel,
            "render": self._render,
            "status": self._status,
            "export": self._export,
        }
        await kinds[job.kind](job)

    async def _say(self, job: Job) -> None:
        if "codes" in job.content:
            pieces = explained_pieces(job.content["text"], job.content["codes"])
        else:
            pieces = text_pieces("", job.content["text"])
        for position, piece in enumerate(pieces):
            keyboard = job.content.get("keyboard") if position == len(pieces) - 1 else None
            await self._send(job, position, piece, keyboard)

    async def _send(self, job: Job, position: int, piece: Piece, keyboard: object = None) -> int:
        reply_to = job.content.get("reply_to")
        method = SendMessage(
            chat_id=job.chat_id,
            message_thread_id=job.content.get("thread_id") or None,
            text=piece.text,
            entities=piece.entities,
            parse_mode=None,
            link_preview_options=NO_PREVIEW,
            reply_parameters=answers_to(reply_to) if reply_to else None,
            reply_markup=InlineKeyboardMarkup.model_validate(keyboard) if keyboard else None,
        )
        key = f"{job.id}:{position}"
        try:
            return await self._courier.send(key, method)
        except TelegramBadRequest as error:
            if "thread not found" not in error.message:
                raise
            return await self._courier.send(
                key, method.model_copy(update={"message_thread_id": None})
            )

    async def _notice(self, job: Job) -> None:
        answer_id = job.content["job_id"]
        if self._store.job(answer_id) is None:
            return  # the answer was quicker
        message_id = await self._send(job, 0, Piece(job.content["text"], []))
        answer = self._store.job(answer_id)
        if answer is None:
            await self._chats.display.delete(job.chat_id, message_id)
        else:
            notices = [*answer.content.get("notices", []), message_id]
            self._store.remember(answer_id, notices=notices)

    async def _delete(self, job: Job) -> None:
        await self._chats.display.delete(job.chat_id, job.content["message_id"])

    async def _panel(self, job: Job) -> None:
        if self._store.has_newer_panel(job):
            return  # who presses quickly sees the last state only
        words = LANGUAGES[job.content["language"]]
        thread_id = job.content["thread_id"]
        settings = self._store.settings(job.chat_id, thread_id, self._default)
        method = EditMessageText(
            chat_id=job.chat_id,
            message_id=job.content["message_id"],
            text=words.settings_topic if thread_id else words.settings_title,
            entities=[],
            parse_mode=None,
            reply_markup=settings_keyboard(words, job.content["user_id"], settings),
        )
        try:
            await self._courier.call(method)
        except MessageGoneError:
            return

    async def _render(self, job: Job) -> None:
        reply = None if job.reply_id is None else self._store.reply(job.reply_id)
        if reply is not None:
            await self._chats.display.show(reply, str(job.id))

    async def _status(self, job: Job) -> None:
        words = LANGUAGES[job.content["language"]]
        user_id = job.content["user_id"]
        try:
            model = (await self._writer.describe(anew=True)).model
            lines = [words.status_service.format(model=model)]
        except ServiceError:
            lines = [words.status_away]
        lines.append(words.status.format(num_waiting=self._store.num_unwritten(job.chat_id)))
        used, quota = self._store.tokens_today(user_id), self._policy.max_tokens_per_day
        template = words.status_quota if quota else words.status_no_quota
        lines.append(template.format(used=used, quota=quota))
        if self._policy.is_admin(user_id):
            lines.append(
                words.status_admin.format(
                    num_jobs=self._store.num_jobs(),
                    num_running=len(self._chats.running),
                    allowed=self._policy.describe(),
                )
            )
        await self._send(job, 0, Piece("\n".join(lines), []))

    async def _export(self, job: Job) -> None:
        words = LANGUAGES[job.content["language"]]
        exported = self._store.export_chat(job.chat_id, job.content["user_id"])
        content = json.dumps(exported, ensure_ascii=False, indent=1).encode("utf-8", "replace")
        await self._courier.send(
            f"{job.id}:0",
            SendDocument(
                chat_id=job.chat_id,
                message_thread_id=job.content.get("thread_id") or None,
                document=BufferedInputFile(content, "telegram_bot_export.json"),
                caption=words.export_caption,
                parse_mode=None,
            ),
        )
