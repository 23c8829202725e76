"""One bar with the time left on a terminal, a line a stage in a log, and nothing else in either."""

import errno
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
from coreinfer.compiler.drawing import BarProgress, LineProgress, clock, command_progress
from coreinfer.compiler.time_left import TimeLeft

FORECAST = [("load", 10.0), ("corpus", 30.0), ("pack", 20.0), ("evaluate", 30.0), ("pack", 10.0)]

PROGRAM = """
import logging, sys, time
from coreinfer.bundles.shared.command import start_logging
from coreinfer.compiler.drawing import command_progress
start_logging(verbose=False)
with command_progress(lambda: [("load", 0.2), ("corpus", 0.6)]) as progress:
    for name in ("hash", "load", "corpus"):
        with progress.stage(name, 4) as advance:
            for _ in range(4):
                time.sleep(0.1)
                advance()
            logging.getLogger("coreinfer.test").warning("remark in %s", name)
print("the end", [*progress.stage_seconds])
"""


def test_a_log_gets_a_line_a_stage() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    lines = [re.sub(r"\d+\.\d", "S", line) for line in done.stderr.splitlines()]
    stages = [f"{name:12s}      S" for name in ("hash", "load", "corpus")]
    remarks = [f"WARNING coreinfer.test: remark in {name}" for name in ("hash", "load", "corpus")]
    assert lines == [line for pair in zip(remarks, stages, strict=True) for line in pair]
    assert done.stdout == "the end ['hash', 'load', 'corpus']\n"


def on_terminal(environment: dict[str, str]) -> str:
    """What the program writes on a terminal of 100 columns, stderr and stdout."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", **environment})
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM])
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError as error:
        # What Linux says of a terminal whose program has ended.
        if error.errno != errno.EIO:
            raise
    finally:
        os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    return written.decode()


def test_a_terminal_gets_one_bar_with_the_time_left() -> None:
    written = on_terminal({})
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert re.search(r"corpus +━+.* \d+% 0:0\d 0:0\d left", plain)
    assert re.search(r"hash +\S+ 0:\d\d", plain)
    # Remarks stand above the bar, on lines of their own.
    remarks = [line.strip() for line in plain.replace("\r", "\n").split("\n") if "remark" in line]
    assert remarks == [f"WARNING coreinfer.test: remark in {name}" for name in ("hash", "load", "corpus")]
    # The bar is taken away again: its line is erased before what comes after.
    assert "\x1b[2K" in written.split("the end")[0][-80:]


def test_a_dumb_terminal_gets_lines() -> None:
    written = on_terminal({"TERM": "dumb"})
    assert "\x1b" not in written
    assert len(re.findall(r"^(?:hash|load|corpus) +\d+\.\d\r$", written, re.MULTILINE)) == 3


def test_what_is_no_terminal_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def forecast() -> list[tuple[str, float]]:
        raise AssertionError

    with command_progress(forecast) as progress:
        assert isinstance(progress, LineProgress)


def test_a_stage_that_fails_leaves_nothing_that_draws() -> None:
    before = threading.active_count(), sys.stderr
    drawing = []

    def fail() -> None:
        with BarProgress(list) as progress, progress.stage("load", 1):
            drawing.append(threading.active_count())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert drawing == [before[0] + 1]
    # rich's thread ends with its next look at the clock.
    end = time.perf_counter() + 10
    while threading.active_count() > before[0] and time.perf_counter() < end:
        time.sleep(0.05)
    assert (threading.active_count(), sys.stderr) == before


def test_the_forecast_waits_until_a_compile_is_known_to_run() -> None:
    asked: list[str] = []

    def forecast() -> list[tuple[str, float]]:
        asked.append("")
        return FORECAST

    with BarProgress(forecast) as progress:
        for name in ("hash", "copy"):
            with progress.stage(name, 1) as advance:
                advance()
        assert not asked
        for name in ("load", "corpus"):
            with progress.stage(name, 1) as advance:
                advance()
    assert len(asked) == 1
    assert [*progress.stage_seconds] == ["hash", "copy", "load", "corpus"]


def test_time_left_is_what_is_foretold_and_then_what_is_seen() -> None:
    left = TimeLeft(FORECAST)
    left.begin("load", 0.0)
    assert left.seconds(0.0) == 100.0
    assert left.seconds(4.0) == 96.0
    left.end(20.0)
    # 10 seconds took 20: with 10 that are trusted, all others are thought to take 1.5 times as long.
    assert left.seconds(20.0) == 90.0 * 30 / 20
    left.begin("corpus", 20.0)
    left.advance(0.05, 21.0)
    assert left.seconds(21.0) == pytest.approx(135.0 - 1)
    # A tenth is done: the stage's own pace counts.
    left.advance(0.25, 40.0)
    assert left.seconds(40.0) == pytest.approx(60 * 1.5 + 60)
    assert left.seconds(50.0) == pytest.approx(60 * 1.5 + 50)


def test_stages_from_the_cache_are_passed_over() -> None:
    left = TimeLeft(FORECAST)
    left.begin("evaluate", 0.0)
    assert left.seconds(0.0) == 40.0
    left.end(30.0)
    left.begin("something else", 31.0)
    assert left.seconds(35.0) == 10.0
    left.end(40.0)
    left.begin("pack", 40.0)
    assert left.seconds(40.0) == 10.0
    assert left.seconds(90.0) == 0.0


def test_the_share_never_falls() -> None:
    left = TimeLeft([("load", 10.0), ("corpus", 90.0)])
    left.begin("load", 0.0)
    assert left.share(0.0, 0.0) == 0.0
    assert left.share(5.0, 5.0) == pytest.approx(0.05)
    left.advance(0.5, 9.0)
    assert left.share(9.0, 9.0) == pytest.approx(9 / (9 + 9 + 90))
    left.end(60.0)
    # What is left takes 3.5 times as long as foretold: 60 / (60 + 315) is over, but for a bar that went back.
    assert left.share(60.0, 60.0) == pytest.approx(60 / 375)
    left.begin("corpus", 60.0)
    left.advance(0.1, 200.0)
    assert left.share(200.0, 200.0) == pytest.approx(60 / 375)
    assert TimeLeft([]).share(5.0, 5.0) is None


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3661, "1:01:01")])
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_rich_is_not_imported_for_help() -> None:
    code = "import sys, coreinfer.compiler.cli; print({'rich', 'torch', 'tqdm.auto'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"
