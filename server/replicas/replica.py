"""A replica: an engine in a process of Ray's, with the same worker as a server that runs its engine itself."""

import time
from collections.abc import AsyncGenerator
from pathlib import Path

from coreinfer.runtime import Token
from coreinfer.runtime.engine import load_engine
from coreinfer.runtime.load_options import LoadOptions
from coreinfer.server.api_errors import ShuttingDown, api_error
from coreinfer.server.bundle_files import fingerprint
from coreinfer.server.jobs import Job
from coreinfer.server.metrics import Metrics, ModelMetrics
from coreinfer.server.worker import Worker

from .messages import Asked, Facts, Failure, Posted, State

__all__ = ["Replica"]

# The front gives a request up when its time is over; a replica that it cannot reach any more does so a little later.
_SPARE_SECONDS = 10.0


class Replica:
    """Answers requests of the front; Ray makes it, and calls its methods on an event loop."""

    def __init__(self, bundle_dir: str, loading: LoadOptions, parallel: int, name: str) -> None:
        """Load the bundle.

        Args:
            bundle_dir: a folder that exists at the same path on this machine, or an address.
            parallel: requests that are answered at once.
            name: of the model.
        """
        from ray import serve

        self._id = serve.get_replica_context().replica_id.unique_id
        self._engine = load_engine(Path(bundle_dir), loading)
        self._engine.loaded.grammars.prepare()
        self._engine.loaded.prompts.prepare()
        self._fingerprint = fingerprint(self._engine.bundle)
        metrics = ModelMetrics(metrics=Metrics(), model=name)
        # Ray bounds what comes; a few more may come while it notices that some are over.
        self._worker = Worker(name, self._engine, parallel=parallel, capacity=4 * parallel, metrics=metrics)

    async def facts(self) -> Facts:
        """Say what the front must know."""
        decoder = self._engine.decoder
        return Facts(
            max_tokens=self._engine.loaded.max_tokens, num_cache_tokens=decoder.num_pages * decoder.page_tokens
        )

    async def check_health(self) -> None:
        """Tell Ray whether to start another replica in its place.

        Raises:
            RuntimeError: the thread that steps has ended.
        """
        if self._worker.is_closed:
            raise RuntimeError("the engine's thread has ended; the log says why")

    async def answer(self, asked: Asked) -> AsyncGenerator[Posted, None]:
        """Answer a request; a front that goes away closes the generator, which ends the generation."""
        begun = time.monotonic()
        yield self._posted()
        try:
            job = self._worker.submit(
                asked.prompt,
                asked.options,
                arrived_seconds=begun,
                timeout_seconds=asked.left_seconds + _SPARE_SECONDS,
            )
        except Exception as error:
            yield self._failed(error)
            return
        try:
            async for posted in self._follow(job, begun, streamed=asked.streamed):
                yield posted
        finally:
            job.abandon()

    async def _follow(self, job: Job, begun: float, *, streamed: bool) -> AsyncGenerator[Posted, None]:
        """Post the tokens that came together in one message, or all of them at the end."""
        tokens: list[Token] = []
        first_token_seconds: float | None = None
        while True:
            job.bell.clear()
            try:
                while (token := job.take()) is not None:
                    tokens.append(token)
            except Exception as error:
                if streamed and tokens:
                    yield self._posted(tokens, first_token_seconds)
                yield self._failed(error)
                return
            if tokens and first_token_seconds is None:
                first_token_seconds = time.monotonic() - begun
            is_last = bool(tokens) and tokens[-1].finish_reason is not None
            if tokens and (streamed or is_last):
                yield self._posted(tokens, first_token_seconds)
                tokens = []
            if is_last:
                return
            await job.bell.wait()

    def _posted(self, tokens: list[Token] | None = None, first_token_seconds: float | None = None) -> Posted:
        return Posted(state=self._state(), tokens=tokens or [], first_token_seconds=first_token_seconds)

    def _failed(self, error: Exception) -> Posted:
        is_lost = isinstance(error, ShuttingDown)
        return Posted(state=self._state(), failure=Failure.of(api_error(error)), is_lost=is_lost)

    def _state(self) -> State:
        decoder = self._engine.decoder
        return State(
            replica=self._id,
            fingerprint=self._fingerprint,
            num_pages=decoder.num_pages,
            num_free_pages=decoder.num_free_pages,
        )
