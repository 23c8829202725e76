"""The places of one model's jobs, those that run and those that wait: a bounded queue that counts how each job ends."""

import asyncio
import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

from coreinfer.runtime import GenerationOptions
from coreinfer.runtime.prompts.requests import Prompt

from .api_errors import QueueFull, ShuttingDown
from .jobs import Event, Job, Mail
from .metrics import ModelMetrics, Outcome

__all__ = ["Answering", "Desk"]

_MAX_RETRY_SECONDS = 60


class Answering(Protocol):
    """What answers the requests of one model: an engine in this process, or replicas of it in others."""

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        arrived_seconds: float,
        timeout_seconds: float,
        streamed: bool = True,
    ) -> Job:
        """Put a request into the queue, on the event loop.

        Args:
            arrived_seconds, timeout_seconds: those of `Job`.
            streamed: whether its client sees tokens before the last one.
        Raises:
            QueueFull: there is no place.
            ShuttingDown: no more is answered.
        """

    def cut(self) -> None:
        """End all jobs, waiting and running, with `ShuttingDown`, and take no more; from any thread."""

    def close(self) -> None:
        """Cut what is left and wait for its end."""


class Desk:
    """Gives each job a place until it is over. Places are taken on the event loop and freed by any thread."""

    def __init__(self, *, num_running: int, capacity: int, metrics: ModelMetrics) -> None:
        """Begin without jobs.

        Args:
            num_running: jobs that run at once; may change.
            capacity: number of further jobs that may wait.
        """
        self.num_running, self.metrics = num_running, metrics
        self._capacity = capacity
        self._jobs: list[Job] = []  # not over, in the order in which they came
        self._closed = False
        self._lock = threading.Lock()
        self._mail: Mail | None = None
        self._mean_job_seconds = 1.0

    @property
    def is_closed(self) -> bool:
        """Whether no more jobs are taken."""
        return self._closed

    def admit(
        self,
        give_up: Callable[[Job], object],
        begin: Callable[[Job], object],
        *,
        arrived_seconds: float,
        timeout_seconds: float,
    ) -> Job:
        """Make a job on the running event loop, give it a place, and begin it.

        Args:
            give_up, arrived_seconds, timeout_seconds: those of `Job`.
            begin: must not block.
        Raises:
            QueueFull: there is no place.
            ShuttingDown: the desk is closed.
        """
        job = Job(
            self._mail_on(asyncio.get_running_loop()),
            give_up,
            arrived_seconds=arrived_seconds,
            timeout_seconds=timeout_seconds,
        )
        with self._lock:
            if self._closed:
                raise ShuttingDown
            if len(self._jobs) >= self.num_running + self._capacity:
                seconds = math.ceil(self._mean_job_seconds / self.num_running)
                raise QueueFull(self._capacity, max(1, min(_MAX_RETRY_SECONDS, seconds)))
            self._jobs.append(job)
            self.note_queue()
            begin(job)
        return job

    def take(self, job: Job, event: Event, *, first_token_seconds: float | None = None) -> None:
        """Pass an event to the event loop, counted first, so that metrics that are read afterwards include it.

        Args:
            first_token_seconds: from the job's arrival to its first token; None for what has passed until now.
        """
        if job.is_over:
            return
        if isinstance(event, Exception):
            self.end(job, "error")
        else:
            job.last = event
            if event.num_tokens == 1:
                waited = time.monotonic() - job.arrived_seconds
                self.metrics.first_token(waited if first_token_seconds is None else first_token_seconds)
                self.note_queue()
            if event.finish_reason:
                self.end(job, "stop" if event.finish_reason == "stop" else "length")
        job.post(event)

    def end(self, job: Job, outcome: Outcome) -> bool:
        """Free a job's place; False if it was free already."""
        with self._lock:
            if job.is_over:
                return False
            job.is_over = True
            self._jobs.remove(job)
            self.note_queue()
            if job.last is not None:
                seconds = job.last.prefill_seconds + job.last.decode_seconds
                self._mean_job_seconds += 0.2 * (seconds - self._mean_job_seconds)
        self.metrics.finished(outcome, job.last, engine=job.replica)
        return True

    def close(self) -> list[Job]:
        """Take no more jobs; returns those that are not over, which were told so."""
        with self._lock:
            self._closed = True
            jobs = list(self._jobs)
        for job in jobs:
            job.post(ShuttingDown())
        return jobs

    def send_mail(self) -> None:
        """Wake the event loop for the events that were passed on."""
        if self._mail is not None:
            self._mail.send()

    def note_queue(self) -> None:
        """Show how many jobs wait."""
        self.metrics.queue_length(max(0, len(self._jobs) - self.num_running))

    def _mail_on(self, loop: asyncio.AbstractEventLoop) -> Mail:
        """All jobs of an event loop share one mail."""
        if self._mail is None or self._mail.loop is not loop:
            self._mail = Mail(loop)
        return self._mail
