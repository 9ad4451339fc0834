"""How often a chat may be written to: token buckets a little below Telegram's own limits.

A private chat takes about one message a second, a group 20 a minute, the bot 30 a second in all
(https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this). Text that is still
being made takes only what is left over; what is owed waits for its turn. Knows nothing of messages.
"""

import asyncio
import time
from collections.abc import Callable

_PRIVATE = (3.0, 1 / 1.05)
_GROUP = (16.0, 1 / 3.2)
_ALL = (28.0, 28.0)
# After a start nobody knows what an earlier process has used up.
_FIRST_SHARE = 0.7
# Left for what is owed, such as the end of a text, while one is being made.
_PRIVATE_RESERVE = 1.0
_GROUP_RESERVE = 4.0
_MAX_IDLE_BUCKETS = 10_000


class _Bucket:
    def __init__(self, capacity: float, tokens_per_second: float, now: float) -> None:
        self.capacity = capacity
        self.tokens_per_second = tokens_per_second
        self.tokens = max(1.0, capacity * _FIRST_SHARE)
        self.filled_at = now

    def seconds_until(self, tokens: float, now: float) -> float:
        """How long until there are so many tokens."""
        if now > self.filled_at:
            gained = (now - self.filled_at) * self.tokens_per_second
            self.tokens = min(self.capacity, self.tokens + gained)
            self.filled_at = now
        until_full_time = max(0.0, self.filled_at - now)  # a pause lies in the future
        return until_full_time + max(0.0, tokens - self.tokens) / self.tokens_per_second

    def pause(self, seconds: float, now: float) -> None:
        self.tokens = min(self.tokens, 1.0)
        self.filled_at = max(self.filled_at, now + seconds)


class Pace:
    """The buckets of all chats."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._chats: dict[int, _Bucket] = {}
        self._all = _Bucket(*_ALL, clock())

    async def take(self, chat_id: int) -> None:
        """Wait until a message that is owed may be sent."""
        while (seconds := self._seconds_until(chat_id, 1.0)) > 0:
            await asyncio.sleep(seconds)
        self._spend(chat_id)

    def try_take(self, chat_id: int) -> bool:
        """Whether a message that nobody would miss may be sent now."""
        reserve = _GROUP_RESERVE if chat_id < 0 else _PRIVATE_RESERVE
        if self._seconds_until(chat_id, 1.0 + reserve) > 0:
            return False
        self._spend(chat_id)
        return True

    def pause(self, chat_id: int, seconds: float) -> None:
        """Telegram asked to leave a chat alone for a while."""
        self._bucket(chat_id).pause(seconds, self._clock())

    def _seconds_until(self, chat_id: int, tokens: float) -> float:
        bucket = self._bucket(chat_id)
        now = self._clock()
        return max(bucket.seconds_until(tokens, now), self._all.seconds_until(1.0, now))

    def _spend(self, chat_id: int) -> None:
        self._bucket(chat_id).tokens -= 1
        self._all.tokens -= 1

    def _bucket(self, chat_id: int) -> _Bucket:
        if chat_id not in self._chats:
            if len(self._chats) >= _MAX_IDLE_BUCKETS:
                self._drop_full_ones()
            self._chats[chat_id] = _Bucket(*(_GROUP if chat_id < 0 else _PRIVATE), self._clock())
        return self._chats[chat_id]

    def _drop_full_ones(self) -> None:
        now = self._clock()
        self._chats = {
            chat_id: bucket
            for chat_id, bucket in self._chats.items()
            if bucket.seconds_until(bucket.capacity, now) > 0
        }
