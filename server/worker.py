"""One thread an engine: it steps all of its requests; more than run at once wait in a bounded queue.

Jobs are made and awaited on the event loop; tokens come over from the worker's threads.
"""

import asyncio
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from coreinfer.runtime import Engine, GenerationOptions
from coreinfer.runtime.prompts.requests import Prompt

from .api_errors import QueueFull, ShuttingDown
from .jobs import Event, Job, Mail
from .metrics import ModelMetrics, Outcome

__all__ = ["Worker"]

_log = logging.getLogger(__name__)

_MAX_RETRY_SECONDS = 60
_KEPT_SEQUENCES = 32
"""Of finished answers, for the next turn of their chats, while there are pages for them."""


class Worker:
    """Answers the requests of one engine, several at once."""

    def __init__(self, name: str, engine: Engine, *, parallel: int, capacity: int, metrics: ModelMetrics) -> None:
        """Start the threads.

        Args:
            name: of the model.
            engine: nobody else may generate with it.
            parallel: jobs that run at once.
            capacity: number of further jobs that may wait.
        """
        self.metrics = metrics
        self._engine = engine
        self._parallel, self._capacity = parallel, capacity
        scheduler = engine.driver.scheduler
        scheduler.max_parallel = parallel
        scheduler.pool.num_to_keep = parallel + _KEPT_SEQUENCES
        metrics.watch(scheduler)
        # Not with each token: woken by the first one, the event loop would hold up the others by Python's lock.
        scheduler.on_posted = self._send_mail
        self._mail: Mail | None = None
        self._jobs: list[Job] = []  # not over, in the order in which they came
        self._closed = False
        self._lock = threading.Lock()
        self._mean_job_seconds = 1.0
        # Tokenizing, routing and compiling a schema must not delay the tokens of others.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"reader of {name}")
        self._thread = threading.Thread(target=self._run, name=f"worker of {name}", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Prompt, options: GenerationOptions, *, arrived_seconds: float, timeout_seconds: float
    ) -> Job:
        """Put a request into the queue.

        Args:
            arrived_seconds, timeout_seconds: those of `Job`.
        Raises:
            QueueFull: there is no place.
            ShuttingDown: the worker was closed.
        """
        mail = self._mail_on(asyncio.get_running_loop())
        job = Job(mail, self.abandon, arrived_seconds=arrived_seconds, timeout_seconds=timeout_seconds)
        with self._lock:
            if self._closed:
                raise ShuttingDown
            if len(self._jobs) >= self._parallel + self._capacity:
                seconds = math.ceil(self._mean_job_seconds / self._parallel)
                raise QueueFull(self._capacity, max(1, min(_MAX_RETRY_SECONDS, seconds)))
            self._jobs.append(job)
            self._note_queue()
            self._reader.submit(self._begin, job, prompt, options)
        return job

    def abandon(self, job: Job) -> None:
        """Free a job's place, and have its generation end after the step that is being made."""
        if self._end(job, "cancelled") and job.run is not None:
            self._engine.driver.end([job.run])

    def cut(self) -> None:
        """End all jobs, waiting and running, with `ShuttingDown`, and take no more."""
        with self._lock:
            self._closed = True
            jobs = list(self._jobs)
        for job in jobs:
            job.post(ShuttingDown())
            self.abandon(job)
        self._send_mail()
        self._engine.driver.wake()

    def close(self) -> None:
        """Cut what is left and wait for the threads' end."""
        self.cut()
        self._reader.shutdown()
        self._thread.join()

    def _mail_on(self, loop: asyncio.AbstractEventLoop) -> Mail:
        """All jobs of an event loop share one mail."""
        if self._mail is None or self._mail.loop is not loop:
            self._mail = Mail(loop)
        return self._mail

    def _send_mail(self) -> None:
        if self._mail is not None:
            self._mail.send()

    def _run(self) -> None:
        try:
            self._engine.driver.serve(lambda: self._closed)
        except Exception:
            # What fails for a request is its own affair; this is a bug, and nobody would step any more.
            _log.exception("the worker ended; its requests are cut")
            self.cut()

    def _begin(self, job: Job, prompt: Prompt, options: GenerationOptions) -> None:
        """Read a request in the reader's thread, and hand it to the scheduler."""
        if job.is_over:
            return
        try:
            job.run = self._engine.submit(prompt, options, lambda event: self._take(job, event))
        except Exception as error:
            self._take(job, error)
            self._send_mail()
        if job.is_over and job.run is not None:
            # It was given up meanwhile.
            self._engine.driver.end([job.run])

    def _take(self, job: Job, event: Event) -> None:
        """Pass an event to the event loop, counted first, so that metrics that are read afterwards include it."""
        if job.is_over:
            return
        if isinstance(event, Exception):
            self._end(job, "error")
        else:
            job.last = event
            if event.num_tokens == 1:
                self.metrics.first_token(time.monotonic() - job.arrived_seconds)
                self._note_queue()
            if event.finish_reason:
                self._end(job, "stop" if event.finish_reason == "stop" else "length")
        job.post(event)

    def _end(self, job: Job, outcome: Outcome) -> bool:
        """Free a job's place; False if it was free already."""
        with self._lock:
            if job.is_over:
                return False
            job.is_over = True
            self._jobs.remove(job)
            self._note_queue()
            if job.last is not None:
                seconds = job.last.prefill_seconds + job.last.decode_seconds
                self._mean_job_seconds += 0.2 * (seconds - self._mean_job_seconds)
        self.metrics.finished(outcome, job.last)
        return True

    def _note_queue(self) -> None:
        self.metrics.queue_length(max(0, len(self._jobs) - self._parallel))
