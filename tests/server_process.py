"""A real `coreinfer-serve` in a process of its own, on a free loopback port."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai

__all__ = ["JSON", "RunningServer", "serving", "user"]

JSON = {"Content-Type": "application/json"}
START_SECONDS = 120
STOP_SECONDS = 30
COMMAND = "from coreinfer.server.cli import main; main()"
# A tiny model answers before anything can happen to its client: this one takes its time for each step.
SLOWED = """
import sys, time
from coreinfer.runtime.scheduling import Scheduler
seconds, step = float(sys.argv.pop(1)), Scheduler.step
def slowed(self):
    step(self)
    time.sleep(seconds)
Scheduler.step = slowed
"""


@dataclass
class RunningServer:
    """A server that answers."""

    process: subprocess.Popen[str]
    url: str
    key: str = "none"
    lines: list[str] = field(default_factory=list)

    def client(self, **options: Any) -> openai.OpenAI:
        """A client that tries once."""
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0, "timeout": 60, **options}
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, **{"timeout": 30, **options})

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def metric(self, name: str, **labels: str) -> float:
        """Sum of all samples of a name that carry the labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.get("/metrics").text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))

    def resident_bytes(self) -> int:
        """Memory of the process that is in RAM."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0]) << 10

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def serving(
    *arguments: object, key: str | None = None, token_seconds: float = 0.0, engine: str = "native"
) -> Iterator[RunningServer]:
    """Start a server and end it.

    Args:
        arguments: of the command, bundles first.
        key: what it asks its clients for.
        token_seconds: how long each token takes at least.
    """
    code, first = (SLOWED + COMMAND, [token_seconds]) if token_seconds else (COMMAND, [])
    environment = {name: value for name, value in os.environ.items() if name != "COREINFER_API_KEY"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code]
        + [str(part) for part in (*first, *arguments, "--port", 0, "--threads", 1, "--engine", engine)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment | ({"COREINFER_API_KEY": key} if key else {}),
    )
    try:
        server = RunningServer(process, "", key or "none")
        started = threading.Event()
        reading = threading.Thread(target=_read, args=(server, started), daemon=True)
        reading.start()
        assert started.wait(START_SECONDS), server.lines
        assert server.url, server.lines
        yield server
        if process.poll() is None:
            assert server.end() == 0, server.lines
        reading.join()
        assert not [line for line in server.lines if "Traceback" in line], server.lines
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _read(server: RunningServer, started: threading.Event) -> None:
    """Keep what the server says, so that it never waits for a reader."""
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.lines.append(line.rstrip())
        if line.startswith("serving "):
            server.url = line.split()[-1]
            started.set()
    started.set()


def user(text: str) -> list[Any]:
    """A chat of one message."""
    return [{"role": "user", "content": text}]
