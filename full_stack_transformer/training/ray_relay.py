"""What the processes of a training on Ray say, and what they are told: an actor beside the command.

Knows no training.
"""

import asyncio


class Relay:
    """Lines and exit codes from the workers, signals to them; methods that wait do not hold up others."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._has_lost = False
        self._changed = asyncio.Condition()
        self._pieces: list[tuple[str, bytes]] = []
        self._orders: list[int] = []
        self._num_starts = 0
        self._code = 0
        self._has_complained = False
        self._is_closed = False

    # For the workers

    async def begin(self) -> int:
        """How often the training was started before."""
        self._num_starts += 1
        self._has_lost = False
        return self._num_starts - 1

    async def write(self, stream: str, text: bytes) -> None:
        """Show a text in the terminal of the command."""
        async with self._changed:
            self._pieces.append((stream, text))
            self._changed.notify_all()

    async def lost(self, sentence: str) -> None:
        """Say why all processes are started again; the first one of them that notices is heard."""
        if not self._has_lost and self._num_starts <= self._max_restarts:
            self._has_lost = True
            again = f"starting all again, {self._num_starts} of {self._max_restarts} times"
            await self.write("stderr", f"{sentence}; {again}\n".encode())

    async def complain(self, sentence: str) -> None:
        """End the training with a sentence; the first one is shown."""
        if not self._has_complained:
            self._has_complained = True
            await self.write("stderr", f"fst: {sentence}\n".encode())
        await self.ended(1)

    async def ended(self, code: int) -> None:
        """One process ended; after an error the others are ended too."""
        self._code = self._code or code
        if code and not self._orders:
            await self._add_order(0)

    async def next_order(self, num_before: int) -> int:
        """The number of a signal, or 0 to end at once; waits for one."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._orders) > num_before)
        return self._orders[num_before]

    async def was_ordered(self) -> bool:
        """Whether the processes were told to end."""
        return bool(self._orders)

    # For the command

    async def order(self, number: int) -> bool:
        """Send a signal to all processes; false if none has begun."""
        await self._add_order(number)
        return self._num_starts > 0

    async def read(self) -> list[tuple[str, bytes]] | None:
        """What was written since; waits for it. None after `close`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._pieces or self._is_closed)
            pieces, self._pieces = self._pieces, []
        return pieces or None

    async def close(self) -> int:
        """The exit code: the first one that is not 0."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        return self._code

    async def _add_order(self, number: int) -> None:
        async with self._changed:
            self._orders.append(number)
            self._changed.notify_all()
