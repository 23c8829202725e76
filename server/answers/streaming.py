"""Answers that come piece by piece, and clients that go away."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from coreinfer.runtime import Token
from coreinfer.server.api_errors import ApiError, ClientGone, api_error
from coreinfer.server.jobs import ChoiceToken, Job, merged
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

__all__ = ["LINES", "SERVER_SENT_EVENTS", "EventStream", "Framing", "answer_streamed", "answer_whole"]

T = TypeVar("T")
Events = Callable[[int, Token], list[BaseModel]]

_log = logging.getLogger(__name__)

# How long after a request's own time a client may still be reading what was made in time.
_READING_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How JSON objects follow one another in a response.

    Attributes:
        frame: puts an object's text into the stream.
        error: what is said where the status is sent already.
        end: what comes last.
    """

    media_type: str
    frame: Callable[[str], str]
    error: Callable[[ApiError], dict[str, Any]]
    end: str


SERVER_SENT_EVENTS = Framing(
    media_type="text/event-stream",
    frame=lambda text: f"data: {text}\n\n",
    # The clients of OpenAI raise what they find under "error".
    error=lambda error: error.content,
    end="data: [DONE]\n\n",
)
LINES = Framing(
    media_type="application/x-ndjson",
    frame=lambda text: f"{text}\n",
    error=lambda error: error.plain_content,
    end="",
)


class EventStream(StreamingResponse):
    """The tokens of an answer as they come; however it ends, its jobs are given up."""

    def __init__(
        self,
        first: ChoiceToken,
        others: AsyncGenerator[ChoiceToken, None],
        jobs: Sequence[Job],
        events: Events,
        framing: Framing = SERVER_SENT_EVENTS,
    ) -> None:
        """Begin with the first token, which is here already.

        Args:
            first: the first token of all.
            others: yields the others.
            jobs: that they come from.
            events: turns a choice's token into events.
            framing: how they are sent.
        """
        super().__init__(
            _event_texts(first, others, events, framing),
            media_type=framing.media_type,
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
            _abandon(self._jobs)


async def answer_whole(request: Request, jobs: Sequence[Job]) -> list[list[Token]]:
    """Wait for all tokens of each job, as long as the client does; then the jobs are given up.

    Raises:
        ClientGone: the client closed the connection first.
        Exception: what the first generation that failed raised.
    """
    try:
        return await _unless_gone(request, _collect(jobs))
    finally:
        _abandon(jobs)


async def answer_streamed(
    request: Request, jobs: Sequence[Job], events: Events, framing: Framing = SERVER_SENT_EVENTS
) -> EventStream:
    """Stream an answer. Its first token is waited for: until then an error has a status of its own.

    Raises:
        ClientGone: the client closed the connection before.
        Exception: what the first generation that failed raised.
    """
    tokens = merged(jobs)
    try:
        first = await _unless_gone(request, anext(tokens))
    except BaseException:
        _abandon(jobs)
        raise
    return EventStream(first, tokens, jobs, events, framing)


async def _collect(jobs: Sequence[Job]) -> list[list[Token]]:
    choices: list[list[Token]] = [[] for _ in jobs]
    async with aclosing(merged(jobs)) as tokens:
        async for index, token in tokens:
            choices[index].append(token)
    return choices


def _abandon(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.abandon()


async def _unless_gone(request: Request, wanted: Awaitable[T]) -> T:
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
    first: ChoiceToken, others: AsyncGenerator[ChoiceToken, None], events: Events, framing: Framing
) -> AsyncGenerator[str, None]:
    try:
        for event in events(*first):
            yield framing.frame(event.model_dump_json())
        async with aclosing(others):
            async for index, token in others:
                for event in events(index, token):
                    yield framing.frame(event.model_dump_json())
    except Exception as error:
        yield framing.frame(json.dumps(framing.error(api_error(error))))
    if framing.end:
        yield framing.end
