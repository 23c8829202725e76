"""The CUDA seam's order of streams and events, against a torch.cuda that only notes what is asked of it.

No test here ran on a GPU; tests/test_gpu.py is for a machine that has one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from coreinfer.runtime.engines.torch.transfer import CpuTransfer, CudaTransfer, pick_transfer

DEVICE = torch.device("cuda", 0)


class FakeStream:
    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: "FakeStream") -> None:
        self._log.append((self.name, "waits for", other.name))

    def wait_event(self, event: "FakeEvent") -> None:
        self._log.append((self.name, "waits for", event.name))


class FakeEvent:
    name = "unrecorded"

    def record(self, stream: FakeStream) -> None:
        self.name = f"event on {stream.name}"


class FakeGraph:
    def __init__(self) -> None:
        self.log: list[Any] = []

    def replay(self) -> None:
        self.log.append("replay")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    notes: list[Any] = []
    current = [FakeStream("computing", notes)]
    names = iter(("side", "warm-up"))

    @contextmanager
    def on_stream(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    @contextmanager
    def capture(graph: FakeGraph, stream: FakeStream) -> Iterator[None]:
        graph.log = notes
        notes.append(f"capture on {stream.name}")
        yield
        notes.append("captured")

    fakes: dict[str, Callable[..., Any]] = {
        "Stream": lambda device: FakeStream(next(names), notes),
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "stream": on_stream,
        "current_stream": lambda device: current[-1],
        "mem_get_info": lambda device: (7, 9),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return notes


def test_a_copy_waits_for_the_computation_and_is_waited_for(log: list[Any]) -> None:
    transfer = CudaTransfer(DEVICE)
    source, target = torch.arange(4.0), torch.zeros(4)
    ticket = transfer.copy([(source, target)])
    assert log == [("side", "waits for", "computing")]
    torch.testing.assert_close(target, source)
    assert ticket.pairs[0][0] is source
    transfer.wait(ticket)
    assert log[1:] == [("computing", "waits for", "event on side")]


def test_a_step_is_warmed_up_beside_the_computation_and_then_captured(log: list[Any]) -> None:
    transfer = CudaTransfer(DEVICE)
    replay = transfer.record(lambda: log.append("step"), lambda: log.append("rewind"))
    warm_up = [("warm-up", "waits for", "computing"), *["step", "rewind"] * 3, ("computing", "waits for", "warm-up")]
    assert log == [*warm_up, "capture on warm-up", "step", "captured"]
    replay()
    assert log[-1] == "replay"


@pytest.mark.usefixtures("log")
def test_free_memory_is_what_cuda_says() -> None:
    assert CudaTransfer(DEVICE).free_bytes() == 7


@pytest.mark.usefixtures("log")
def test_each_device_has_its_seam() -> None:
    assert isinstance(pick_transfer(DEVICE), CudaTransfer)
    assert isinstance(pick_transfer(torch.device("cpu")), CpuTransfer)
    assert pick_transfer(torch.device("mps")) is None


def test_the_cpu_copies_at_once() -> None:
    transfer = CpuTransfer()
    target = transfer.allocate("pack", (2, 3), torch.bfloat16)
    source = transfer.pin(torch.ones(2, 3, dtype=torch.bfloat16))
    transfer.wait(transfer.copy([(source, target)]))
    torch.testing.assert_close(target, source)
    assert transfer.free_bytes() > 0
    steps: list[int] = []
    transfer.record(lambda: steps.append(1), lambda: None)()
    assert steps == [1]
