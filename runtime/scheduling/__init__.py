"""The one loop of all generations: `Scheduler.step` admits, reads, decodes and posts."""

from .driver import Driver
from .run import Post, Run, prepare
from .scheduler import MAX_PARALLEL, Scheduler

__all__ = ["MAX_PARALLEL", "Driver", "Post", "Run", "Scheduler", "prepare"]
