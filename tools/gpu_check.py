"""Check the torch engine on a GPU: what is missing is installed, tests/test_gpu.py, benchmarks/gpu.py, one JSON file.

    tools/gpu-check.sh [BUNDLE] [--transformers FOLDER] [--seconds 480] [-- --rounds 3]

It needs nothing but Python to begin with: what the project needs may not be installed yet. The JSON file is written
after each part, so that it is there whatever ends the check.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_LIMIT_SECONDS = 480.0
# Of what is left when the tests begin; the benchmark has the rest.
_TESTS_SHARE = 0.5
# For a program to end by itself, and for writing the file.
_END_SECONDS = 10.0
_TAIL_LINES = 40
_OUTCOME = re.compile(r"^(tests/\S+::\S.*?) (PASSED|FAILED|SKIPPED|ERROR)\b")
_NO_GPU = "ran on no GPU: this shows that the check works, and nothing of a GPU"
_SEE_DEVICE = """
import importlib.metadata, importlib.util, json, sys, torch
triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
cuda = torch.cuda.is_available()
name = torch.cuda.get_device_name(sys.argv[1]) if cuda and sys.argv[1].startswith("cuda") else None
seen = {"gpu": name, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton, "sees_gpu": cuda}
print(json.dumps(seen))
"""


@dataclass(kw_only=True)
class Part:
    """What became of one part of the check.

    Attributes:
        status: "passed", "failed", "cut" at the limit, or "left out".
        found: its figures.
        output_tail: the last lines that it printed, but for the figures.
    """

    status: str
    why: str | None = None
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    output_tail: list[str] = field(default_factory=list)


def main() -> int:
    """Run all parts, and say where the file is; 0 where all passed, 1 where not, 2 for bad input."""
    options = _options()
    deadline = time.monotonic() + options.seconds
    if problem := _problem(options):
        return _refuse(problem)
    # Whoever ends the check gets the file too: the part that runs is ended, and counts as cut.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report: dict[str, Any] = {"device": options.device, "limit_seconds": options.seconds, "commit": _commit()}
    parts: dict[str, Part] = {}
    begin = time.monotonic()
    try:
        parts["install"] = install(deadline)
        report |= see_device(options.device)
        if not report["ran_on_gpu"] and options.device != "cpu":
            return _refuse(f"--device {options.device}: torch sees no GPU here; --device cpu runs the same to try it")
        for name, part in _measure(options, deadline):
            parts[name] = part
            _write(options.output, report, parts, begin)
    except KeyboardInterrupt:
        report["note"] = "interrupted" if "note" not in report else f"interrupted; {report['note']}"
    _write(options.output, report, parts, begin)
    for name, part in parts.items():
        _say(f"{name}: {part.status}{'' if part.why is None else ': ' + part.why}, {part.seconds:.0f} s")
    _say(f"{options.output}{': ' + report['note'] if 'note' in report else ''}")
    return 0 if len(parts) == 3 and all(part.status in ("passed", "left out") for part in parts.values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check.sh", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle to time; without one only the tests run")
    parser.add_argument("--transformers", type=Path, help="folder of the model that the bundle was compiled from")
    parser.add_argument("--device", default="cuda", help="cpu tries the check itself where there is no GPU")
    parser.add_argument("--seconds", type=float, default=_LIMIT_SECONDS, help="limit of all together (%(default)g)")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-check.json"), help="(%(default)s)")
    given, more = sys.argv[1:], []
    if "--" in given:
        position = given.index("--")
        given, more = given[:position], given[position + 1 :]
    options = parser.parse_args(given)
    options.more = more
    return options


def _problem(options: argparse.Namespace) -> str | None:
    if options.bundle is not None and not (options.bundle / "manifest.json").is_file():
        return f"{options.bundle}: no bundle is there; carry one along, or leave it out to run the tests alone"
    if options.transformers is not None and not options.transformers.is_dir():
        return f"--transformers: expected a folder, got {options.transformers}"
    if options.seconds <= 2 * _END_SECONDS:
        return f"--seconds: expected more than {2 * _END_SECONDS:g}, got {options.seconds:g}"
    return None


def _refuse(problem: str) -> int:
    _say(f"error: {problem}")
    return 2


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _commit() -> str | None:
    found = subprocess.run(["git", "-C", _ROOT, "rev-parse", "HEAD"], check=False, capture_output=True, text=True)
    return found.stdout.strip() or None


def install(deadline: float) -> Part:
    """Install what the tests and the benchmark need and is not there in any version, then the package itself."""
    missing = _missing()
    commands = [["install", *missing]] if missing else []
    if not _has_native():
        commands.append(["install", "--no-deps", "--no-build-isolation", "-e", str(_ROOT)])
    if not commands:
        return Part(status="left out", why="all is there")
    part = Part(status="passed", found={"installed": missing})
    for command in commands:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", *command]
        ran = _run(pip, deadline - _END_SECONDS)
        part.seconds += ran.seconds
        part.status, part.output_tail = ran.status, ran.output_tail
        if ran.status != "passed":
            break
    return part


def _missing() -> list[str]:
    """Requirements of the project whose package is not installed; versions are as they are."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["compile"], "pytest"]
    if not _has_native():
        wanted += project["build-system"]["requires"]
    return [requirement for requirement in wanted if not _is_installed(requirement)]


def _is_installed(requirement: str) -> bool:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    try:
        importlib.metadata.version(found[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _has_native() -> bool:
    code = "from coreinfer.runtime.engines.native import _native"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def see_device(device: str) -> dict[str, Any]:
    """What torch sees, and whether the check runs on a GPU."""
    command = [sys.executable, "-c", _SEE_DEVICE, device]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    seen = json.loads(found.stdout) if found.returncode == 0 else {"gpu": None, "problem": found.stderr.strip()[-500:]}
    on_gpu = seen["gpu"] is not None
    note = {} if on_gpu else {"note": _NO_GPU}
    return {"ran_on_gpu": on_gpu, **note, **seen, "python": platform.python_version(), "machine": platform.machine()}


def _measure(options: argparse.Namespace, deadline: float) -> Iterator[tuple[str, Part]]:
    """The tests, then the benchmark."""
    for_tests = (deadline - time.monotonic()) * _TESTS_SHARE if options.bundle else deadline - time.monotonic()
    _say(f"tests: {for_tests:.0f} s at most")
    yield "tests", run_tests(options.device, time.monotonic() + for_tests - _END_SECONDS)
    if options.bundle is None:
        yield "benchmark", Part(status="left out", why="no bundle was given")
        return
    _say(f"benchmark: {deadline - time.monotonic():.0f} s at most")
    yield "benchmark", run_benchmark(options, deadline - _END_SECONDS)


def run_tests(device: str, deadline: float) -> Part:
    """Run tests/test_gpu.py on the device, and count outcomes; those until the cut too."""
    # Warnings of other versions of packages are no failures here.
    pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no", "-W", "default"]
    environment = {"COREINFER_TEST_DEVICE": device}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    part = _run([*pytest, "tests/test_gpu.py"], deadline, environment=environment)
    outcomes = [found.groups() for line in part.output_tail if (found := _OUTCOME.match(line))]
    part.found = {
        "counts": dict(Counter(outcome.lower() for _, outcome in outcomes)),
        "not_passed": [name for name, outcome in outcomes if outcome != "PASSED"],
    }
    if part.status == "passed" and not part.found["counts"].get("passed"):
        part.status, part.why = "failed", "no test ran"
    part.output_tail = part.output_tail[-_TAIL_LINES:]
    return part


def run_benchmark(options: argparse.Namespace, deadline: float) -> Part:
    """Run benchmarks/gpu.py, which ends by itself between two contenders when its time is over."""
    command = [sys.executable, str(_ROOT / "benchmarks" / "gpu.py"), str(options.bundle.absolute())]
    command += ["--device", options.device, "--seconds", f"{max(1.0, deadline - time.monotonic() - _END_SECONDS):.0f}"]
    if options.transformers is not None:
        command += ["--transformers", str(options.transformers.absolute())]
    part = _run([*command, *options.more], deadline)
    figures = next((line for line in reversed(part.output_tail) if line.startswith("{")), None)
    if figures is not None:
        part.output_tail.remove(figures)
        part.found = json.loads(figures)
        if part.status == "passed" and part.found.get("cut"):
            part.status, part.why = "cut", part.found["cut"]
    part.output_tail = part.output_tail[-_TAIL_LINES:]
    return part


def _run(command: Sequence[str], deadline: float, environment: dict[str, str] | None = None) -> Part:
    """Run a program until it ends or its time is over; all that it printed is in `output_tail`."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = _wait(process, deadline)
        output.seek(0)
        lines = output.read().splitlines()
    status = "cut" if code is None else "passed" if code == 0 else "failed"
    why = "its time was over" if code is None else None if code == 0 else f"exit status {code}"
    return Part(status=status, why=why, seconds=time.monotonic() - begin, output_tail=lines)


def _wait(process: subprocess.Popen[Any], deadline: float) -> int | None:
    """The exit status; None for a program that was ended, with all that it had started."""
    try:
        return process.wait(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _end(process)
        return None
    except KeyboardInterrupt:
        _end(process)
        raise


def _end(process: subprocess.Popen[Any]) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=_END_SECONDS / 2)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
        break
    process.wait()


def _write(path: Path, report: dict[str, Any], parts: dict[str, Part], begin: float) -> None:
    cut = [name for name, part in parts.items() if part.status == "cut"]
    cut += [name for name in ("install", "tests", "benchmark") if name not in parts]
    whole = {**report, "seconds": round(time.monotonic() - begin, 1), "cut": cut}
    whole["parts"] = {name: asdict(part) for name, part in parts.items()}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
