"""A device that lies in the CPU's memory and keeps books: what is resident, what was copied, what was waited for.

Resident bytes are counted by the life of the memory itself: what is still referenced from anywhere counts. A copy is
done when it is waited for, and not before; until then its target holds garbage, as it may on a GPU. Unlike a GPU it
does not let one wait serve for copies that were begun earlier.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from coreinfer.runtime.engines.torch.transfer import CpuTransfer, Kind, Pairs, Ticket


class FakeDevice(CpuTransfer):
    def __init__(self, free_bytes: int = 10**12) -> None:
        super().__init__()
        self.free = free_bytes
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_bytes = 0
        self.log: list[tuple[str, str]] = []
        self.never_waited: set[str] = set()
        """Kinds whose waits are left out, as by a mistake."""
        self.recorded_addresses: Callable[[], Any] = lambda: None
        """What a recorded step relies on."""
        self.num_recorded = 0
        self._kinds: dict[int, str] = {}

    def free_bytes(self) -> int:
        return self.free

    def allocate(self, kind: Kind, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        memory = np.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=np.uint8)
        weakref.finalize(memory, self._given_back, kind, memory.nbytes)
        self.now[kind] += memory.nbytes
        self.peak[kind] = max(self.peak[kind], self.now[kind])
        self.peak_bytes = max(self.peak_bytes, self.now.total())
        tensor = torch.from_numpy(memory).view(dtype).view(tuple(shape))
        self._kinds[tensor.data_ptr()] = kind
        return _spoil(tensor)

    def _given_back(self, kind: str, num_bytes: int) -> None:
        self.now[kind] -= num_bytes

    def copy(self, pairs: Pairs) -> Ticket:
        for source, target in pairs:
            assert (source.shape, source.dtype) == (target.shape, target.dtype)
            _spoil(target)
        self.log.append(("copy", self._kind(pairs)))
        return Ticket(pairs=pairs)

    def wait(self, ticket: Ticket) -> None:
        kind = self._kind(ticket.pairs)
        self.log.append(("wait", kind))
        if kind not in self.never_waited:
            super().copy(ticket.pairs)

    def _kind(self, pairs: Pairs) -> str:
        return self._kinds[pairs[0][1].data_ptr()]

    def record(self, step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
        step()
        rewind()
        self.num_recorded += 1
        addresses = self.recorded_addresses()

        def replay() -> None:
            assert self.recorded_addresses() == addresses
            step()

        return replay


def _spoil(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 7)
