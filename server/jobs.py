"""Requests as the event loop sees them: their tokens come over from the worker's threads, many in one call."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from coreinfer.runtime import Token
from coreinfer.runtime.scheduling import Run

from .api_errors import RequestTimedOut

__all__ = ["ChoiceToken", "Event", "Job", "Mail", "merged"]

ChoiceToken = tuple[int, Token]
"""A token and the index of its choice."""
Event = Token | Exception


class Job:
    """A request that waits or is answered. It belongs to the event loop that made it.

    Attributes:
        arrived_seconds: when the request came, by `time.monotonic`.
        timeout_seconds: how long after that it may be worked on.
        run: its generation, once there is one.
        last: its newest token.
        is_over: whether its place is free again.
        bell: rung when an event comes.
        replica, fingerprint: which of several engines answers, and that of its bundle; known by its first token.
    """

    def __init__(
        self, mail: "Mail", give_up: Callable[["Job"], object], *, arrived_seconds: float, timeout_seconds: float
    ) -> None:
        """Prepare a job on the running event loop.

        Args:
            mail: brings its events.
            give_up: ends its generation, and frees its place.
        """
        self.arrived_seconds, self.timeout_seconds = arrived_seconds, timeout_seconds
        self.run: Run | None = None
        self.last: Token | None = None
        self.replica = ""
        self.fingerprint: str | None = None
        self.is_over = False
        self.bell = asyncio.Event()
        self._mail, self._give_up = mail, give_up
        self._events: deque[Event] = deque()
        left_seconds = max(0.0, self.deadline_seconds - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(
            left_seconds, self.deliver, RequestTimedOut(timeout_seconds)
        )

    @property
    def deadline_seconds(self) -> float:
        """When its time is over, by `time.monotonic`."""
        return self.arrived_seconds + self.timeout_seconds

    def post(self, event: Event) -> None:
        """Hand a token or what went wrong to the event loop, from any thread; it comes when the mail is next sent."""
        self._mail.put(self, event)

    def deliver(self, event: Event) -> None:
        """Take an event, on the event loop."""
        if isinstance(event, Exception) or event.finish_reason:
            self._timer.cancel()
        self._events.append(event)
        self.bell.set()

    def abandon(self) -> None:
        """Nobody waits for it any more: free its place, and end it after the step that is being made."""
        self._timer.cancel()
        self._give_up(self)

    def take(self) -> Token | None:
        """Take the next token, if there is one.

        Raises:
            RequestTimedOut: the job's time is over.
            Exception: what the generation raised.
        """
        if not self._events:
            return None
        event = self._events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    async def tokens(self) -> AsyncGenerator[Token, None]:
        """Yield the tokens as they come, to the last.

        Raises:
            RequestTimedOut: the job's time is over.
            Exception: what the generation raised.
        """
        async for _, token in merged([self]):
            yield token


class Mail:
    """Carries events of jobs from any thread to their event loop, which all that are sent together wake once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin without events."""
        self.loop = loop
        self._letters: deque[tuple[Job, Event]] = deque()
        self._is_called = False

    def put(self, job: Job, event: Event) -> None:
        """Add an event to what `send` sends."""
        self._letters.append((job, event))

    def send(self) -> None:
        """Wake the event loop, if there is something for it."""
        # Whoever finds it called has put events where the call to come finds them; that two call is no harm.
        if not self._letters or self._is_called:
            return
        self._is_called = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            # The event loop ended, and with it whoever waited.
            self._is_called = False
            while self._letters:
                self._letters.popleft()[0].abandon()

    def _deliver(self) -> None:
        self._is_called = False
        while self._letters:
            job, event = self._letters.popleft()
            job.deliver(event)


async def merged(jobs: Sequence[Job]) -> AsyncGenerator[ChoiceToken, None]:
    """Yield the tokens of several jobs as they come, each with its job's index, to the last of all.

    Raises:
        Exception: what the first generation that failed raised.
    """
    bell = asyncio.Event()
    for job in jobs:
        job.bell = bell
    going = dict(enumerate(jobs))
    while going:
        bell.clear()
        for index, job in list(going.items()):
            while (token := job.take()) is not None:
                if token.finish_reason:
                    del going[index]
                yield index, token
        if going:
            await bell.wait()
