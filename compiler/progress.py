"""Progress in stages: the library reports it, commands draw it."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from coreinfer.bundles.shared.machine import give_back_heap
from tqdm import tqdm

__all__ = ["Advance", "Progress", "TqdmProgress", "ignore_steps", "peak_memory_bytes"]


class Advance(Protocol):
    """Report that `steps` more of a stage's steps are done."""

    def __call__(self, steps: int = 1) -> None:
        """Advance."""


def ignore_steps(steps: int = 1) -> None:
    """Draw nothing."""


@dataclass(kw_only=True)
class Progress:
    """Times the stages of a compile and draws nothing.

    Attributes:
        stage_seconds: stage -> seconds, in the order in which the stages ran.
        stage_peak_bytes: stage -> the process's peak resident memory until the stage's end; empty if the
            system does not report it.
        workers: what each worker took where several compile: see `WorkerReport.fields`.
    """

    stage_seconds: dict[str, float] = field(default_factory=dict)
    stage_peak_bytes: dict[str, int] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, num_steps: int) -> Iterator[Advance]:
        """Time a stage of `num_steps` steps; the block calls the yielded function as steps are done."""
        start = time.perf_counter()
        with self.bar(name, num_steps) as advance:
            yield advance
        # What it alone needed; what later stages need would come on top.
        give_back_heap()
        self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + time.perf_counter() - start
        if (peak := peak_memory_bytes()) is not None:
            self.stage_peak_bytes[name] = peak

    @contextmanager
    def bar(self, name: str, num_steps: int) -> Iterator[Advance]:
        """Draw a stage; this class draws nothing."""
        yield ignore_steps


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process so far; None if the system does not report it."""
    try:
        import resource  # Not on Windows.
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class TqdmProgress(Progress):
    """Draws one tqdm bar per stage on stderr."""

    @contextmanager
    def bar(self, name: str, num_steps: int) -> Iterator[Advance]:
        """Draw a stage as a bar."""
        interval = 0.1 if sys.stderr.isatty() else 10.0
        with tqdm(
            total=num_steps, desc=f"{name:12s}", mininterval=interval, dynamic_ncols=True, file=sys.stderr
        ) as bar:

            def advance(steps: int = 1) -> None:
                bar.update(steps)

            yield advance
