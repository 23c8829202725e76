"""Server-sent events, and clients that go away."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from coreinfer.runtime import Token
from coreinfer.server.api_errors import ClientGone, api_error
from coreinfer.server.jobs import ChoiceToken, Job
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

__all__ = ["EventStream", "unless_gone"]

T = TypeVar("T")
Events = Callable[[int, Token], list[BaseModel]]

_log = logging.getLogger(__name__)

# How long after a request's own time a client may still be reading what was made in time.
_READING_SECONDS = 30.0


class EventStream(StreamingResponse):
    """The tokens of an answer as server-sent events; however it ends, its jobs are given up."""

    def __init__(
        self, first: ChoiceToken, others: AsyncGenerator[ChoiceToken, None], jobs: Sequence[Job], events: Events
    ) -> None:
        """Begin with the first token, which is here already.

        Args:
            first: the first token of all.
            others: yields the others.
            jobs: that they come from.
            events: turns a choice's token into events.
        """
        super().__init__(
            _event_texts(first, others, events),
            media_type="text/event-stream",
            # Proxies must pass each event on at once.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._jobs = jobs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            async with asyncio.timeout(self._jobs[0].deadline_seconds + _READING_SECONDS - time.monotonic()):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _log.warning("a client did not read its answer within %g s of its time", _READING_SECONDS)
        finally:
            for job in self._jobs:
                job.abandon()


async def unless_gone(request: Request, wanted: Awaitable[T]) -> T:
    """Wait for something, but no longer than the client does.

    Raises:
        ClientGone: the client closed the connection first.
    """
    waiting = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGone
        return await waiting
    finally:
        for task in (waiting, gone):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _event_texts(
    first: ChoiceToken, others: AsyncGenerator[ChoiceToken, None], events: Events
) -> AsyncGenerator[str, None]:
    try:
        for event in events(*first):
            yield _event_text(event)
        async with aclosing(others):
            async for index, token in others:
                for event in events(index, token):
                    yield _event_text(event)
    except Exception as error:
        # The status is sent: the clients of OpenAI raise what they find under "error".
        yield f"data: {json.dumps(api_error(error).content)}\n\n"
    yield "data: [DONE]\n\n"


def _event_text(event: BaseModel) -> str:
    return f"data: {event.model_dump_json()}\n\n"
