"""What the workers of a compile took: seconds of each stage, memory, and bytes that went to others."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Spent", "WorkerReport", "num_bytes"]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one task took.

    Attributes:
        process: that ran it, on its machine.
        seconds: by the clock.
        result_bytes: of arrays in what it returned.
        peak_bytes: most resident memory of the process so far; None if the system does not report it.
    """

    stage: str
    process: str
    seconds: float
    result_bytes: int
    peak_bytes: int | None


@dataclass(kw_only=True)
class WorkerReport:
    """What one place's worker took, with those that it replaced.

    Attributes:
        stage_seconds: stage -> seconds in which it worked.
        sent_bytes: stage -> bytes of arrays that other places or the main process got from it.
        peak_bytes: most resident memory.
        processes: that stood at this place, one after another.
    """

    stage_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    peak_bytes: int = 0
    processes: set[str] = field(default_factory=set)

    def add(self, spent: Spent, num_receivers: int) -> None:
        """Take in one task."""
        self.stage_seconds[spent.stage] += spent.seconds
        self.sent_bytes[spent.stage] += spent.result_bytes * num_receivers
        self.peak_bytes = max(self.peak_bytes, spent.peak_bytes or 0)
        self.processes.add(spent.process)

    def fields(self) -> dict[str, Any]:
        """Name what there is, for JSON."""
        return {
            "stage_seconds": dict(self.stage_seconds),
            "sent_bytes": dict(self.sent_bytes),
            "peak_bytes": self.peak_bytes,
            "num_replaced": max(0, len(self.processes) - 1),
        }


def num_bytes(value: object) -> int:
    """Bytes of the arrays that a value holds."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(num_bytes, value))
    if is_dataclass(value):
        return sum(num_bytes(getattr(value, item.name)) for item in fields(value))
    return 0
