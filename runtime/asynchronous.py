"""Tokens for asyncio: the generation runs in a thread of its own."""

from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor

from .generation import Token

__all__ = ["in_thread"]


async def in_thread(stream: Generator[Token, None, None]) -> AsyncGenerator[Token, None]:
    """Run a stream in a worker thread; a token is decoded when it is asked for, not earlier.

    When the consumer stops, the stream is closed after the token in progress.
    """
    # Not at the top: coreinfer-run would wait some 25 ms for it at each start.
    import asyncio

    loop = asyncio.get_running_loop()
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="coreinfer")
    try:
        # A cancelled consumer must not cancel the wait only to leave the thread at work unseen: it is closed below.
        while (token := await loop.run_in_executor(worker, next, stream, None)) is not None:
            yield token
    finally:
        # The one worker closes the stream when it is done with the token in progress; a second cancellation ends the
        # waiting, not the closing.
        closed = loop.run_in_executor(worker, stream.close)
        worker.shutdown(wait=False)
        await asyncio.shield(closed)
