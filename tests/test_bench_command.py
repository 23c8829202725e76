"""`coreinfer-bench`, in this process and as a process of its own."""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from coreinfer.runtime import _native, bench
from coreinfer.runtime.bench import main

TIMEOUT_SECONDS = 120
READ_BYTES = 1 << 20
# The tiny models have 256 positions.
SHORT = ("--tokens", "4", "--prompt-tokens", "20", "--rounds", "2", "--threads", "1")
POSITIONS = 256


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """A command installs handlers of signals and of the log, which outlive a call within this process."""
    handler, handlers = signal.getsignal(signal.SIGTERM), list(logging.root.handlers)
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_READ_BYTES", READ_BYTES)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*SHORT, *map(str, arguments)])


def measured(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return data


def test_figures_agree_with_each_other(tiny_bundle: Callable[..., Path]) -> None:
    data = measured(run(tiny_bundle("llama"), "--json"))
    assert (data["threads"], [run["ffn"] for run in data["runs"]]) == (1, ["dense", "pack"])
    for figures in data["runs"]:
        expected = figures["bytes_per_token"] * figures["decode_tok_s"] / 1e9
        assert figures["gbps"] == pytest.approx(expected)
        assert figures["share_of_read"] == pytest.approx(expected / data["read_gbps"])
        assert figures["prefill_tok_s"] > 0
    dense, pack = data["runs"]
    assert pack["bytes_per_token"] < dense["bytes_per_token"]


def test_a_table_without_json(tiny_bundle: Callable[..., Path]) -> None:
    lines = run(tiny_bundle("llama")).stdout.splitlines()
    assert len(lines) == 4
    assert "plain read" in lines[0]
    assert [line.split()[1] for line in lines[2:]] == ["dense", "pack"]


def test_without_a_dense_ffn_only_the_pack_is_measured(tiny_bundle: Callable[..., Path]) -> None:
    data = measured(run(tiny_bundle("llama", dense=False), "--json"))
    assert [figures["ffn"] for figures in data["runs"]] == ["pack"]


def test_all_kernels(tiny_bundle: Callable[..., Path]) -> None:
    data = measured(run(tiny_bundle("llama"), "--json", "--isa", "all"))
    assert [figures["isa"] for figures in data["runs"][::2]] == list(_native.available_isas())


def test_one_kernel(tiny_bundle: Callable[..., Path]) -> None:
    data = measured(run(tiny_bundle("llama"), "--json", "--isa", "portable"))
    assert {figures["isa"] for figures in data["runs"]} == {"portable"}


@pytest.mark.parametrize("option", ["--tokens", "--prompt-tokens", "--rounds", "--threads"])
def test_nothing_to_measure_is_an_error(option: str, tiny_bundle: Callable[..., Path]) -> None:
    result = run(tiny_bundle("llama"), option, 0)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {option.removeprefix('--') if option == '--threads' else option}: ")


@pytest.mark.parametrize("option", ["--tokens", "--prompt-tokens"])
def test_more_than_the_model_has_positions(option: str, tiny_bundle: Callable[..., Path]) -> None:
    result = run(tiny_bundle("llama"), option, POSITIONS + 1)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"has {POSITIONS} positions" in result.stderr


def test_an_unknown_kernel(tiny_bundle: Callable[..., Path]) -> None:
    result = run(tiny_bundle("llama"), "--isa", "sse9")
    assert result.exit_code == 2
    assert "expected auto, " in result.stderr
    assert "'sse9'" in result.stderr


def test_no_bundle(tmp_path: Path) -> None:
    result = run(tmp_path / "none")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'none'} does not exist; give a folder that coreinfer-compile wrote\n"


def test_torch_is_not_imported(tiny_bundle: Callable[..., Path]) -> None:
    program = (
        "import sys; from coreinfer.runtime.bench import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *SHORT, str(tiny_bundle("llama"))],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "[]"
