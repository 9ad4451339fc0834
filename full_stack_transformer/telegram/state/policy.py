"""Who may use the bot, and how much: allow-list, admins, quota, floods.

Knows numbers of users and chats; neither messages nor the model.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from full_stack_transformer.telegram.state.store import Store

# A person types about one message a second; who keeps on beyond this is flooding.
_FLOOD_BURST = 30.0
_FLOOD_PER_SECOND = 1.0
_MAX_REMEMBERED = 10_000


@dataclass
class Policy:
    """Decisions about people; `store` holds what admins decided while the bot ran."""

    store: Store
    allowed_ids: frozenset[int] = frozenset()
    """Users and chats; empty for everybody."""
    admin_ids: frozenset[int] = frozenset()
    max_tokens_per_day: int = 0
    """For each user but admins; 0 for no limit."""
    clock: Callable[[], float] = time.monotonic
    _flood: dict[int, tuple[float, float]] = field(default_factory=dict)
    _said: dict[Hashable, float] = field(default_factory=dict)

    def is_admin(self, user_id: int) -> bool:
        """Whether a user may do everything."""
        return user_id in self.admin_ids

    def may_use(self, user_id: int, chat_id: int) -> bool:
        """Whether the bot answers a user in a chat; what an admin decided is stronger than the option."""
        if self.is_admin(user_id):
            return True
        guests = self.store.guests()
        if user_id in guests:
            return guests[user_id]
        if chat_id in guests:
            return guests[chat_id]
        return not self.allowed_ids or not self.allowed_ids.isdisjoint((user_id, chat_id))

    def has_tokens(self, user_id: int) -> bool:
        """Whether a user has tokens left today; the last text may go over it."""
        if not self.max_tokens_per_day or self.is_admin(user_id):
            return True
        return self.store.tokens_today(user_id) < self.max_tokens_per_day

    def is_flooding(self, user_id: int) -> bool:
        """Count one action of a user; whether there were too many."""
        now = self.clock()
        tokens, since = self._flood.get(user_id, (_FLOOD_BURST, now))
        tokens = min(_FLOOD_BURST, tokens + (now - since) * _FLOOD_PER_SECOND)
        if len(self._flood) > _MAX_REMEMBERED:
            self._flood.clear()
        self._flood[user_id] = (max(0.0, tokens - 1), now)
        return tokens < 1

    def may_say_again(self, what: Hashable, seconds: float) -> bool:
        """Whether a repeated sentence is due again; whoever floods hears it once in a while."""
        now = self.clock()
        if now < self._said.get(what, 0.0):
            return False
        if len(self._said) > _MAX_REMEMBERED:
            self._said = {key: until for key, until in self._said.items() if until > now}
        self._said[what] = now + seconds
        return True

    def describe(self) -> str:
        """Who is let in, for admins."""
        guests = self.store.guests()
        allowed = self.allowed_ids | {guest for guest, is_in in guests.items() if is_in}
        denied = [guest for guest, is_in in guests.items() if not is_in]
        text = ", ".join(map(str, sorted(allowed))) if self.allowed_ids else "*"
        return text + "".join(f", −{guest}" for guest in denied)
