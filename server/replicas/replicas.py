"""The front's side of replicas: it sends requests to Ray Serve, and asks again where a replica died.

A job is the same as one of a worker. Its task runs on the event loop; leaving cancels the task, and that the replica's
generation.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from coreinfer.runtime import GenerationOptions, Token
from coreinfer.runtime.prompts.requests import Prompt
from coreinfer.server.api_errors import ApiError
from coreinfer.server.desk import Desk
from coreinfer.server.jobs import Job
from coreinfer.server.metrics import ModelMetrics
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from .hints import Hints
from .messages import Asked, Hint, Posted, State
from .warmth import WarmPacks, share_of

__all__ = ["ReplicaLost", "Replicas"]

_log = logging.getLogger(__name__)

_MAX_TIMES = 3
"""A request is asked: one that kills every replica must not kill them all."""
_KEPT_STATES = 8
_PAUSE_SECONDS = 0.2
"""Before it is asked again, in which Ray notices more of what happened."""


class ReplicaLost(ApiError):
    """The replica that answered ended, and nobody else can go on with the answer."""

    def __init__(self, reason: str) -> None:
        """Say why."""
        super().__init__(503, f"the replica that answered was lost; {reason}", code="replica_lost")


class _Lost(Exception):
    """A replica says that it cannot go on."""


class Replicas:
    """Answers the requests of one bundle by engines in other processes."""

    def __init__(
        self, handle: DeploymentHandle[Posted], hints: Hints, *, parallel: int, capacity: int, metrics: ModelMetrics
    ) -> None:
        """Begin without requests.

        Args:
            handle: of the deployment's `Replica`.
            parallel: requests that each replica answers at once.
            capacity: number of further requests that may wait, for all replicas.
        """
        self.hints = hints
        self._answer_of = handle.options(stream=True, method_name="answer")
        self._desk = Desk(num_running=parallel, capacity=capacity, metrics=metrics)
        self._parallel, self._metrics, self._num_replicas = parallel, metrics, 1
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._placed: set[Job] = set()
        self._states: dict[str, State] = {}
        self._warm, self._num_clusters = WarmPacks(), 1
        # Routing must not delay the tokens of others.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        metrics.watch_replicas(
            num_replicas=lambda: self._num_replicas,
            num_active=lambda: len(self._placed),
            num_pages=lambda: sum(state.num_pages for state in self._known()),
            num_free_pages=lambda: sum(state.num_free_pages for state in self._known()),
        )

    def use(self, hints: Hints, num_clusters: int) -> None:
        """Read requests for another bundle from now on."""
        self.hints, self._warm, self._num_clusters = hints, WarmPacks(), num_clusters

    def count(self, num_replicas: int) -> None:
        """Note how many replicas answer now, from any thread."""
        self._num_replicas = num_replicas
        self._desk.num_running = self._parallel * max(1, num_replicas)

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        arrived_seconds: float,
        timeout_seconds: float,
        streamed: bool = True,
    ) -> Job:
        """Put a request into the queue; see `Answering.submit`."""

        def begin(job: Job) -> None:
            task = asyncio.get_running_loop().create_task(self._answer(job, prompt, options, streamed=streamed))
            self._tasks[job] = task
            task.add_done_callback(lambda _: self._forget(job))

        return self._desk.admit(self.abandon, begin, arrived_seconds=arrived_seconds, timeout_seconds=timeout_seconds)

    def abandon(self, job: Job) -> None:
        """Free a job's place, and have its generation end."""
        if self._desk.end(job, "cancelled"):
            self._cancel(job)

    def cut(self) -> None:
        """End all jobs with `ShuttingDown`, and take no more."""
        for job in self._desk.close():
            self.abandon(job)
        self._desk.send_mail()

    def close(self) -> None:
        """Cut what is left; replicas end with their deployment."""
        self.cut()
        self._reader.shutdown()

    def _cancel(self, job: Job) -> None:
        task = self._tasks.get(job)
        # The event loop ends before what was cut.
        with contextlib.suppress(RuntimeError):
            if task is not None:
                task.get_loop().call_soon_threadsafe(task.cancel)

    def _forget(self, job: Job) -> None:
        self._tasks.pop(job, None)
        self._placed.discard(job)

    def _known(self) -> Iterable[State]:
        """The newest states, of no more replicas than there are."""
        return list(self._states.values())[-max(1, self._num_replicas) :]

    async def _answer(self, job: Job, prompt: Prompt, options: GenerationOptions, *, streamed: bool) -> None:
        """Ask until there is an answer, an error, or a stream that cannot be begun again."""
        try:
            loop = asyncio.get_running_loop()
            hint = await loop.run_in_executor(self._reader, self.hints.read, prompt, options)
            for number in range(_MAX_TIMES):
                if number:
                    self._metrics.asked_again()
                    await asyncio.sleep(_PAUSE_SECONDS * number)
                if await self._ask(job, prompt, options, hint, streamed=streamed):
                    return
                if job.last is not None:
                    raise ReplicaLost("what it said before is not repeated")
            raise ReplicaLost(f"so were {_MAX_TIMES} that were asked")
        except Exception as error:
            self._desk.take(job, _client_error(error))
            self._desk.send_mail()

    async def _ask(self, job: Job, prompt: Prompt, options: GenerationOptions, hint: Hint, *, streamed: bool) -> bool:
        """Ask once; False if the replica was lost."""
        left_seconds = max(0.0, job.deadline_seconds - time.monotonic())
        answer = self._answer_of.remote(
            Asked(prompt=prompt, options=options, left_seconds=left_seconds, streamed=streamed, hint=hint)
        )
        try:
            placed_seconds: float | None = None
            async for posted in answer:
                placed_seconds = placed_seconds or time.monotonic() - job.arrived_seconds
                self._note(job, posted, placed_seconds)
        except RayTaskError:
            # The replica's own code failed: another one's would as well.
            raise
        except (RayError, _Lost) as error:
            _log.warning("a replica was lost: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
            return False
        finally:
            self._placed.discard(job)
            answer.cancel()
        return True

    def _note(self, job: Job, posted: Posted, placed_seconds: float) -> None:
        """Pass on what a replica says.

        Raises:
            _Lost: it cannot go on.
        """
        state = posted.state
        self._placed.add(job)
        job.replica, job.fingerprint = state.replica, state.fingerprint
        self._states.pop(state.replica, None)
        self._states[state.replica] = state
        if len(self._states) > 2 * max(1, self._num_replicas) + _KEPT_STATES:
            # Of a replica that ended long ago.
            del self._states[next(iter(self._states))]
            self._warm.keep(self._states)
        for token in posted.tokens:
            if token.num_tokens == 1:
                self._count_pack(state.replica, token)
            self._desk.take(job, token, first_token_seconds=placed_seconds + (posted.first_token_seconds or 0.0))
        if posted.is_lost:
            raise _Lost
        if posted.failure is not None:
            self._desk.take(job, posted.failure.error)
        self._desk.send_mail()

    def _count_pack(self, replica: str, token: Token) -> None:
        if token.mode in ("similarity", "lossless") and self.hints.has_pack(token.cluster):
            share = share_of(self._num_clusters, self._num_replicas)
            self._metrics.pack_used(was_warm=self._warm.note(replica, token.cluster, at_most=share))


def _client_error(error: Exception) -> Exception:
    if isinstance(error, RayServeException):
        _log.error("no replica answers: %s", error)
        return ApiError(503, "no replica answers", code="no_replica")
    return error
