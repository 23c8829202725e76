"""Time and memory of a start of `coreinfer-run` up to its first token."""

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from coreinfer.bundles import CoreInferError

__all__ = ["Starts", "measure_starts"]

# What the script coreinfer-run does, and at its end says what Linux knows of its memory: what a parent is told of
# its child counts the parent's own pages.
_PROGRAM = """
import atexit, contextlib, sys
def report():
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        sys.stderr.write(status.read())
atexit.register(report)
from coreinfer.runtime.commands.run import main
main()
"""
_PROMPT = "How do I make soup?"


@dataclass(frozen=True, kw_only=True)
class Starts:
    """Medians over some starts with a warm page cache.

    Attributes:
        first_token_seconds: from the start of the process to the first byte that it prints.
        peak_rss_bytes: peak resident memory of the process, mapped weights included; None where there is no /proc.
    """

    first_token_seconds: float
    peak_rss_bytes: int | None


def measure_starts(arguments: Sequence[str], num_starts: int) -> Starts:
    """Run `coreinfer-run` for one token, several times.

    Args:
        arguments: arguments of coreinfer-run, without the prompt and the number of tokens.
    Raises:
        CoreInferError: it failed.
    """
    found = [_start([*arguments, "-n", "1", _PROMPT]) for _ in range(num_starts)]
    peaks = [peak for _, peak in found if peak is not None]
    return Starts(
        first_token_seconds=statistics.median(seconds for seconds, _ in found),
        peak_rss_bytes=int(statistics.median(peaks)) if peaks else None,
    )


def _start(arguments: Sequence[str]) -> tuple[float, int | None]:
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    seconds = time.perf_counter() - start
    _, said = process.communicate()
    if not first or process.returncode:
        raise CoreInferError(
            f"coreinfer-run printed no token (exit {process.returncode}); run coreinfer-run {' '.join(arguments[:1])} "
            "by hand to see why, or leave starts out with --starts 0"
        )
    peak = re.search(rb"VmHWM:\s+(\d+) kB", said)
    return seconds, int(peak[1]) * 1024 if peak else None
