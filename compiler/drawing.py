"""What the command shows of a compile: one bar for all of it on a terminal, a line a stage in a log."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import click

from .progress import Advance, Progress, ignore_steps
from .time_left import TimeLeft

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["BarProgress", "LineProgress", "command_progress"]

Forecast = Callable[[], Sequence[tuple[str, float]]]
"""Returns the stages that will run and their seconds; none where they cannot be foretold."""
_BEFORE_PLAN = ("hash", "copy")
"""Stages of a compile that may be over in a moment, before torch is imported: a plan would take longer."""
_REFRESHES_PER_SECOND = 4
_BAR_CHARACTERS = 32


class LineProgress(Progress):
    """Writes a line on stderr when a stage ends: its name and its seconds."""

    @contextmanager
    def bar(self, name: str, num_steps: int) -> Iterator[Advance]:
        """Write the line; none where the stage fails."""
        start = time.perf_counter()
        yield ignore_steps
        click.echo(f"{name:12s} {time.perf_counter() - start:8.1f}", err=True)


class BarProgress(Progress):
    """Draws one bar for the whole compile on a terminal's stderr; a context manager, which takes the bar away again."""

    def __init__(self, forecast: Forecast) -> None:
        super().__init__()
        self._forecast = forecast
        self._left: TimeLeft | None = None
        self._stage, self._start = "", time.perf_counter()
        self._open = ExitStack()

    def __enter__(self) -> "BarProgress":
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    @contextmanager
    def bar(self, name: str, num_steps: int) -> Iterator[Advance]:
        """Draw the stage's share of the bar."""
        if not self._stage:
            self._begin()
        self._stage = name
        if self._left is None and name not in _BEFORE_PLAN:
            self._left = TimeLeft(self._forecast())
        if (left := self._left) is None:
            yield ignore_steps
            return
        left.begin(name, time.perf_counter())
        done = 0

        def advance(steps: int = 1) -> None:
            nonlocal done
            done += steps
            left.advance(done / max(1, num_steps), time.perf_counter())

        yield advance
        left.end(time.perf_counter())

    def _begin(self) -> None:
        # Here, not above: neither help nor a refusal should wait for it, and only the extra `compile` has it.
        from rich.console import Console
        from rich.live import Live

        before = sys.stderr
        self._open.enter_context(
            Live(
                console=Console(stderr=True),
                get_renderable=self._render,
                refresh_per_second=_REFRESHES_PER_SECOND,
                transient=True,
            )
        )
        # While the bar is there, rich puts what is written on stderr above it.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)
                self._open.callback(handler.setStream, before)

    def _render(self) -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        now = time.perf_counter()
        elapsed = now - self._start
        share = None if self._left is None else self._left.share(elapsed, now)
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=share or 0.0, width=_BAR_CHARACTERS, pulse=share is None)
        cells: list[str | ProgressBar] = [f"{self._stage:12s}", bar]
        if share is not None and self._left is not None:
            cells += [f"{share:4.0%}", clock(elapsed), f"{clock(self._left.seconds(now))} left"]
        else:
            cells.append(clock(elapsed))
        row.add_row(*cells)
        return row


def clock(seconds: float) -> str:
    """Write seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def command_progress(forecast: Forecast) -> Iterator[Progress]:
    """Show progress as stderr can show it, for the time of the block."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with BarProgress(forecast) as progress:
            yield progress
    else:
        yield LineProgress()
