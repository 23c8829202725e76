"""The one loop of all generations: `Scheduler.step` admits, reads, decodes and posts."""

from .driver import Driver
from .run import Post, Run, prepare
from .scheduler import Scheduler

__all__ = ["Driver", "Post", "Run", "Scheduler", "prepare"]
