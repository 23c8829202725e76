"""One thread an engine: requests wait in a bounded queue and are answered one after another.

Jobs are made and awaited on the event loop; tokens come over from the worker's thread.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing

from coreinfer.runtime import Token

from .errors import QueueFull, RequestTimedOut, ShuttingDown
from .metrics import ModelMetrics, Outcome

__all__ = ["Job", "Worker"]

StartStream = Callable[[], Generator[Token, None, None]]

_MAX_RETRY_SECONDS = 60


class Job:
    """A request that waits or is answered."""

    def __init__(self, start: StartStream, worker: "Worker", *, arrived_seconds: float, timeout_seconds: float) -> None:
        """Prepare a job on the running event loop.

        Args:
            start: begins the generation; the worker calls it when the job's turn has come.
            worker: whose queue it is in.
            arrived_seconds: when the request came, by `time.monotonic`.
            timeout_seconds: how long after that it may be worked on.
        """
        self.start = start
        self.arrived_seconds = arrived_seconds
        self.timeout_seconds = timeout_seconds
        self.abandoned = threading.Event()
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Token | Exception] = asyncio.Queue()

    @property
    def deadline_seconds(self) -> float:
        """When its time is over, by `time.monotonic`."""
        return self.arrived_seconds + self.timeout_seconds

    def post(self, event: Token | Exception) -> None:
        """Hand a token or what went wrong to the event loop, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            # The event loop ended, and with it whoever waited.
            self.abandoned.set()

    def abandon(self) -> None:
        """Nobody waits for it any more: free its place, or end it after the token that is being made."""
        self._worker.abandon(self)

    async def next(self) -> Token:
        """Wait for the next token.

        Raises:
            RequestTimedOut: the job's time is over.
            Exception: whatever the generation raised.
        """
        try:
            async with asyncio.timeout(self.deadline_seconds - time.monotonic()):
                event = await self._events.get()
        except TimeoutError as error:
            raise RequestTimedOut(self.timeout_seconds) from error
        if isinstance(event, Exception):
            raise event
        return event

    async def tokens(self) -> AsyncGenerator[Token, None]:
        """Yield the tokens as they come, to the last."""
        while True:
            token = await self.next()
            yield token
            if token.finish_reason:
                return


class Worker:
    """Answers the requests of one engine."""

    def __init__(self, name: str, *, capacity: int, metrics: ModelMetrics) -> None:
        """Start the thread.

        Args:
            name: of the model.
            capacity: jobs that may wait besides the one that runs.
        """
        self.metrics = metrics
        self._capacity = capacity
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._mean_job_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name=f"worker of {name}", daemon=True)
        self._thread.start()

    def submit(self, start: StartStream, *, arrived_seconds: float, timeout_seconds: float) -> Job:
        """Put a generation into the queue; the arguments are those of `Job`.

        Raises:
            QueueFull: there is no place.
            ShuttingDown: the worker was closed.
        """
        job = Job(start, self, arrived_seconds=arrived_seconds, timeout_seconds=timeout_seconds)
        with self._changed:
            if self._closed:
                raise ShuttingDown
            # Between two jobs the worker has none, and the next one still waits.
            if len(self._waiting) + (self._running is not None) > self._capacity:
                retry_seconds = max(1, min(_MAX_RETRY_SECONDS, math.ceil(self._mean_job_seconds)))
                raise QueueFull(self._capacity, retry_seconds)
            self._waiting.append(job)
            self.metrics.queue_length(len(self._waiting))
            self._changed.notify()
        return job

    def abandon(self, job: Job) -> None:
        """Take a job out of the queue, or have it end after the token that is being made."""
        with self._changed:
            job.abandoned.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self.metrics.queue_length(len(self._waiting))
                self.metrics.finished("cancelled", None)

    def cut(self) -> None:
        """End all jobs, waiting and running, with `ShuttingDown`, and take no more."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify()
        for job in jobs:
            job.post(ShuttingDown())
            self.abandon(job)

    def close(self) -> None:
        """Cut what is left and wait for the thread's end."""
        self.cut()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._take()) is not None:
            start = time.monotonic()
            self._answer(job)
            with self._changed:
                self._running = None
            self._mean_job_seconds += 0.2 * (time.monotonic() - start - self._mean_job_seconds)

    def _take(self) -> Job | None:
        """Wait for the next job; None when the worker was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            self.metrics.queue_length(len(self._waiting))
            return self._running

    def _answer(self, job: Job) -> None:
        """Hand over one token after another, as long as somebody waits for them."""
        last: Token | None = None
        outcome: Outcome = "cancelled"
        try:
            with closing(job.start()) as stream:
                for last in stream:
                    self._hand_over(job, last)
                    if last.finish_reason or job.abandoned.is_set():
                        break
        except Exception as error:
            outcome = "error"
            job.post(error)
        if last is None or not last.finish_reason:
            self.metrics.finished(outcome, last)

    def _hand_over(self, job: Job, token: Token) -> None:
        """Give one token to the event loop, counted first: whoever then asks for the metrics finds it there."""
        if token.num_tokens == 1:
            self.metrics.first_token(time.monotonic() - job.arrived_seconds)
        if token.finish_reason:
            self.metrics.finished("stop" if token.finish_reason == "stop" else "length", token)
        job.post(token)
