"""One thread an engine: it steps all of its requests; more than run at once wait in a bounded queue.

Jobs are made and awaited on the event loop; tokens come over from the worker's threads.
"""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from coreinfer.runtime import Engine, GenerationOptions
from coreinfer.runtime.prompts.requests import Prompt

from .desk import Desk
from .jobs import Job
from .metrics import ModelMetrics

__all__ = ["Worker"]

_log = logging.getLogger(__name__)

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
        self._engine = engine
        self._desk = Desk(num_running=parallel, capacity=capacity, metrics=metrics)
        scheduler = engine.driver.scheduler
        scheduler.max_parallel = parallel
        scheduler.pool.num_to_keep = parallel + _KEPT_SEQUENCES
        metrics.watch(scheduler)
        # Not with each token: woken by the first one, the event loop would hold up the others by Python's lock.
        scheduler.on_posted = self._desk.send_mail
        # Tokenizing, routing and compiling a schema must not delay the tokens of others.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"reader of {name}")
        self._thread = threading.Thread(target=self._run, name=f"worker of {name}", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether it answers no more: it was cut, or its thread failed."""
        return self._desk.is_closed

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        arrived_seconds: float,
        timeout_seconds: float,
        streamed: bool = True,
    ) -> Job:
        """Put a request into the queue; see `Answering.submit`. Tokens are passed on as they come in any case."""
        return self._desk.admit(
            self.abandon,
            lambda job: self._reader.submit(self._begin, job, prompt, options),
            arrived_seconds=arrived_seconds,
            timeout_seconds=timeout_seconds,
        )

    def abandon(self, job: Job) -> None:
        """Free a job's place, and have its generation end after the step that is being made."""
        if self._desk.end(job, "cancelled") and job.run is not None:
            self._engine.driver.end([job.run])

    def cut(self) -> None:
        """End all jobs, waiting and running, with `ShuttingDown`, and take no more."""
        for job in self._desk.close():
            self.abandon(job)
        self._desk.send_mail()
        self._engine.driver.wake()

    def close(self) -> None:
        """Cut what is left and wait for the threads' end."""
        self.cut()
        self._reader.shutdown()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._engine.driver.serve(lambda: self.is_closed)
        except Exception:
            # What fails for a request is its own affair; this is a bug, and nobody would step any more.
            _log.exception("the worker ended; its requests are cut")
            self.cut()

    def _begin(self, job: Job, prompt: Prompt, options: GenerationOptions) -> None:
        """Read a request in the reader's thread, and hand it to the scheduler."""
        if job.is_over:
            return
        try:
            job.run = self._engine.submit(prompt, options, lambda event: self._desk.take(job, event))
        except Exception as error:
            self._desk.take(job, error)
            self._desk.send_mail()
        if job.is_over and job.run is not None:
            # It was given up meanwhile.
            self._engine.driver.end([job.run])
