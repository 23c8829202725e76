"""Which thread steps: one of those that wait for tokens, for all of them, or a thread that does nothing else."""

import os
import threading
from collections.abc import Callable, Generator, Sequence

from coreinfer.bundles.errors import ConfigError
from coreinfer.runtime.generation import Token

from .run import Run
from .scheduler import Scheduler

__all__ = ["Driver"]


class Driver:
    """Lets any number of threads use one scheduler.

    One of the threads that wait for tokens steps for all until it has its own token; then another one does. A thread
    that waits alone steps at once, without a switch of threads.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        """Drive a scheduler, which nothing else may step."""
        self.scheduler = scheduler
        self._stepping = False
        self._serves = False
        self._begin_process()

    def _begin_process(self) -> None:
        self._process_id = os.getpid()
        # Reentrant: a stream that is collected as garbage is closed by whichever thread happens to run.
        self._lock = threading.RLock()
        self._waiting: dict[Run, threading.Condition] = {}
        self._work = threading.Condition(self._lock)

    def _check_process(self) -> None:
        """After a fork, use locks of this process's own, unless a thread of the parent was stepping.

        Raises:
            ConfigError: it was, and left the KV cache in the middle of a step.
        """
        if os.getpid() == self._process_id:
            return
        if self._stepping:
            raise ConfigError(
                "engine: another thread was generating when this process was forked; load the bundle again in it, or "
                "fork when nobody generates"
            )
        for run in self._waiting:
            # The thread that waits for it is not here.
            run.ended = True
        self._begin_process()

    def submit(self, run: Run) -> None:
        """Hand a run to the scheduler.

        Raises:
            ConfigError: the process was forked while another thread was generating.
        """
        self._check_process()
        self.scheduler.add(run)
        with self._lock:
            self._work.notify()

    def stream(self, run: Run) -> Generator[Token, None, None]:
        """Submit a run and yield its tokens; closing the stream ends the run.

        Raises:
            Exception: the run's error.
        """
        try:
            self.submit(run)
            while not run.finished or run.tokens:
                self._wait(run)
                token = run.take()
                if run.options.on_token is not None:
                    run.options.on_token(token)
                yield token
        finally:
            self.end([run])

    def finish(self, runs: Sequence[Run]) -> list[list[Token]]:
        """Submit runs and wait for all of their tokens, in the order of the runs.

        Raises:
            Exception: the error of the first run that failed.
        """
        try:
            for run in runs:
                self.submit(run)
            for run in runs:
                self._wait(run)
            return [run.take_all() for run in runs]
        finally:
            self.end(runs)

    def end(self, runs: Sequence[Run]) -> None:
        """Free what runs hold: at once, or after the step in progress."""
        for run in runs:
            run.ended = True
        if os.getpid() != self._process_id:
            # Of a stream that a forked process closes before it goes on with it.
            return
        with self._lock:
            self._work.notify()
            if self._stepping:
                return
            self._stepping = True
        try:
            self.scheduler.sweep()
        finally:
            self._step_down()

    def serve(self, is_closed: Callable[[], bool]) -> None:
        """Step for all until `is_closed`; a thread that changes that must call `wake`."""
        self._serves = True
        while True:
            with self._lock:
                self._work.wait_for(lambda: is_closed() or (not self._stepping and self.scheduler.has_work))
                if is_closed():
                    break
                self._stepping = True
            self._lead(lambda: True)
        # What was ended after the last step had swept.
        self.end([])

    def wake(self) -> None:
        """Make `serve` check whether it is closed."""
        with self._lock:
            self._work.notify()

    def _wait(self, run: Run) -> None:
        """Return when a run has something to take; step for all meanwhile, unless another thread does."""
        self._check_process()
        with self._lock:
            if self._stepping:
                self._listen(run)
            if run.is_ready:
                return
            self._stepping = True
        self._lead(lambda: run.is_ready)

    def _listen(self, run: Run) -> None:
        """Sleep until a run has something to take, or nobody steps."""
        bell = self._waiting[run] = threading.Condition(self._lock)
        try:
            while self._stepping and not run.is_ready:
                bell.wait()
        finally:
            del self._waiting[run]

    def _lead(self, is_done: Callable[[], bool]) -> None:
        try:
            self.scheduler.step()
            while not is_done():
                if self._waiting:
                    self._ring(lambda run: run.is_ready)
                self.scheduler.step()
        finally:
            self._step_down()

    def _step_down(self) -> None:
        """Let another thread step: the first to wake of those that have nothing to take."""
        with self._lock:
            self._stepping = False
            if self._waiting:
                self._ring(lambda run: True)
            if self._serves:
                self._work.notify()

    def _ring(self, deserves: Callable[[Run], bool]) -> None:
        with self._lock:
            for run, bell in self._waiting.items():
                if deserves(run):
                    bell.notify()
