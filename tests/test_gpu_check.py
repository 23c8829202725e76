"""tools/gpu-check.sh on the CPU: one JSON file that says what ran and what was cut, and that no GPU was there."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .programs import load_program

SCRIPT = Path(__file__).parents[1] / "tools" / "gpu-check.sh"
_COLUMNS = "test_columns_give_what_masks_give"
QUICK = ["--dtype", "float32", "--tokens", "3", "--prompt-tokens", "8", "--read-bytes", "1048576", "--rounds"]


def check(folder: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], Any]:
    """Run it; gives the process and what its file says."""
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    command = [str(SCRIPT), *(str(one) for one in arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    file = folder / "gpu-check.json"
    return done, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def test_all_parts_on_the_cpu(bundle: Path, tmp_path: Path) -> None:
    done, report = check(tmp_path, bundle, "--device", "cpu", "--", *QUICK, 2)
    assert done.returncode == 0, done.stderr
    assert report["ran_on_gpu"] is False
    assert report["gpu"] is None
    assert report["note"].startswith("ran on no GPU")
    assert report["note"] in done.stderr
    assert report["cut"] == []
    parts = report["parts"]
    assert (parts["install"]["status"], parts["install"]["why"]) == ("left out", "all is there")
    assert parts["tests"]["status"] == "passed"
    # Where Triton is, its kernels are interpreted.
    skipped = [] if importlib.util.find_spec("triton") else [f"tests/test_gpu.py::{_COLUMNS}"]
    assert parts["tests"]["found"]["not_passed"] == skipped
    assert parts["tests"]["found"]["counts"]["passed"] > 3
    assert parts["benchmark"]["status"] == "passed"
    assert [run["name"] for run in parts["benchmark"]["found"]["runs"]] == ["dense", "pack", "lossless", "bounded"]


def test_it_stops_at_its_limit(bundle: Path, tmp_path: Path) -> None:
    # Far more rounds than fit.
    done, report = check(tmp_path, bundle, "--device", "cpu", "--seconds", 30, "--", *QUICK, 100_000)
    assert done.returncode == 1
    assert report["seconds"] < 30
    assert "benchmark" in report["cut"]
    benchmark = report["parts"]["benchmark"]
    assert benchmark["status"] == "cut"
    # By itself; or ended, where a loaded machine takes all its time to start it.
    assert benchmark["why"].startswith(("no time was left for", "its time was over"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing-bundle"], "missing-bundle: no bundle is there"),
        (["--transformers", "missing-model"], "--transformers: expected a folder"),
        (["--seconds", "3"], "--seconds: expected more than"),
    ],
)
def test_bad_input_is_said_in_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    done, report = check(tmp_path, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert report is None


def test_no_gpu_is_said(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done, report = check(tmp_path)
    assert (done.returncode, report) == (2, None)
    assert "torch sees no GPU here" in done.stderr


def test_without_a_bundle_only_tests_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load_program("tools/gpu_check.py")
    asked = []

    def run_tests(device: str, deadline: float) -> Any:
        asked.append((device, deadline - time.monotonic() > 300))
        return program.Part(status="passed")

    # They run in the test of all parts.
    monkeypatch.setattr(program, "run_tests", run_tests)
    # The program would answer SIGTERM as if this process were its own.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu"])
    assert program.main() == 0
    report = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))
    assert report["parts"]["benchmark"]["why"] == "no bundle was given"
    assert report["parts"]["tests"]["status"] == "passed"
    # All of the time is theirs.
    assert asked == [("cpu", True)]
