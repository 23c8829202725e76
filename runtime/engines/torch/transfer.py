"""The interface to a device: its memory, copies that run in parallel with the computation, and captured steps.

Everything that knows of streams, events and pinned memory is here. `CudaTransfer` ran on no GPU yet (docs/gpu.md).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from coreinfer.bundles import ConfigError

__all__ = ["CpuTransfer", "CudaTransfer", "Kind", "Ticket", "Transfer", "needed_transfer", "pick_transfer"]

Kind = Literal["base", "pack", "layer", "dense"]
"""What device memory is for: the base, the chosen pack, a buffer of the layer stream, the resident dense FFN."""
Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
_WARM_UP_RUNS = 3


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A copy under way; what it reads and writes stays alive with it.

    Attributes:
        event: recorded after the copy, None where copies are done at once.
    """

    pairs: Pairs
    event: torch.cuda.Event | None = None


class Transfer(Protocol):
    """One device."""

    device: torch.device

    def free_bytes(self) -> int:
        """Memory of the device that no one holds."""

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put a host tensor where copies from it run in parallel with the computation."""

    def allocate(self, kind: Kind, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Take device memory until the last reference goes; its contents are undefined."""

    def copy(self, pairs: Pairs) -> Ticket:
        """Begin to copy each pair's first tensor, on the host, over its second, on the device.

        The copy begins when what was asked of the device before is done, so that a buffer may be written again as soon
        as its last use was asked for. The targets are undefined until the ticket was waited for.
        """

    def wait(self, ticket: Ticket) -> None:
        """Let what is asked of the device from now on begin after the copy; the host does not wait."""

    def record(self, step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
        """Make a step of fixed shapes and addresses cheap to repeat.

        Args:
            step: the computation; it neither asks the device for values nor allocates what outlives it.
            rewind: undoes what one run of the step does to state; recording may run the step several times.
        Returns:
            Runs the step once; state is as before the call.
        """


class CpuTransfer:
    """The CPU as a device: copies are done at once, and steps run as they are."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def free_bytes(self) -> int:
        """See `Transfer`."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Transfer`."""
        return tensor

    def allocate(self, kind: Kind, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Transfer`."""
        return torch.empty(tuple(shape), dtype=dtype)

    def copy(self, pairs: Pairs) -> Ticket:
        """See `Transfer`."""
        for source, target in pairs:
            target.copy_(source)
        return Ticket(pairs=pairs)

    def wait(self, ticket: Ticket) -> None:
        """See `Transfer`."""

    def record(self, step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
        """See `Transfer`."""
        return step


class CudaTransfer:
    """A GPU: copies from pinned memory run on a stream of their own, steps become CUDA graphs.

    Device memory is allocated on the computing stream. A copy waits for that stream before it begins, and the computing
    stream waits for the copy before the memory is used or dropped; so the allocator needs no `record_stream`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)

    def free_bytes(self) -> int:
        """See `Transfer`."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Transfer`."""
        return tensor.contiguous().pin_memory()

    def allocate(self, kind: Kind, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Transfer`."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def copy(self, pairs: Pairs) -> Ticket:
        """See `Transfer`. From memory that is not pinned the host waits, and nothing runs in parallel."""
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._side)
        return Ticket(pairs=pairs, event=event)

    def wait(self, ticket: Ticket) -> None:
        """See `Transfer`."""
        assert ticket.event is not None
        torch.cuda.current_stream(self.device).wait_event(ticket.event)

    def record(self, step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
        """See `Transfer`. Libraries set themselves up in the first runs, which a graph cannot hold."""
        warm_up, computing = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        warm_up.wait_stream(computing)
        with torch.cuda.stream(warm_up):
            for _ in range(_WARM_UP_RUNS):
                step()
                rewind()
        computing.wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        # On the same stream, on which libraries have set themselves up. Capturing runs nothing: nothing to rewind.
        with torch.cuda.graph(graph, stream=warm_up):
            step()
        return graph.replay


def pick_transfer(device: torch.device) -> Transfer | None:
    """Find the seam of a device; None where weights are put there once and for all."""
    if device.type == "cuda":
        return CudaTransfer(device)
    return CpuTransfer() if device.type == "cpu" else None


def needed_transfer(
    device: torch.device, *, asked: str, gpu_memory_mb: float | None, given: Transfer | None
) -> Transfer | None:
    """Find the seam that weights are copied by; None where they are put on the device once and for all.

    Args:
        asked: how the device was named.
        gpu_memory_mb: with it weights are copied on the CPU too.
        given: is taken instead of the device's own.
    Raises:
        ConfigError: a GPU's memory was limited, and "auto" found none.
    """
    if asked == "auto" and device.type == "cpu" and gpu_memory_mb is not None:
        raise ConfigError("gpu_memory_mb: torch sees no GPU here; leave it out, or try it with device 'cpu'")
    if given or (device.type == "cpu" and gpu_memory_mb is None):
        return given
    return pick_transfer(device)
