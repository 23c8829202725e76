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
from coreinfer.runtime.commands.bench import BenchOptions, bench, main
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder

from .engine_inputs import MAX_POSITIONS
from .model_factory import VOCABULARY

QUICK = ("--tokens", 4, "--prompt-tokens", 20, "--rounds", 2, "--threads", 1, "--starts", 0)


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """A command installs handlers of signals and of the log, which outlive a call within this process."""
    handler, handlers = signal.getsignal(signal.SIGTERM), list(logging.root.handlers)
    level = logging.getLogger("coreinfer").level
    yield
    logging.getLogger("coreinfer").setLevel(level)
    signal.signal(signal.SIGTERM, handler)
    logging.root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def small_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a gigabyte a round tells nothing here."""
    monkeypatch.setattr("coreinfer.runtime.commands.bench._READ_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("llama", quantize="int4")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def figures(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_table_then_one_json_line(bundle: Path) -> None:
    result = run(bundle, *QUICK, "--json")
    got = figures(result)
    assert [run["ffn"] for run in got["runs"]] == ["dense", "pack"]
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + 2 + 1
    assert f"plain read {got['read_gbps']:.1f} GB/s" in lines[0]
    assert "1 threads" in lines[0]


def test_without_json_the_table_only(bundle: Path) -> None:
    result = run(bundle, *QUICK)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 4
    assert "{" not in result.stdout


def test_figures_follow_from_each_other(bundle: Path) -> None:
    got = figures(run(bundle, *QUICK, "--json"))
    dense, pack = got["runs"]
    assert pack["bytes_per_token"] < dense["bytes_per_token"]
    for row in got["runs"]:
        assert row["gbps"] == pytest.approx(row["bytes_per_token"] * row["decode_tok_s"] / 1e9)
        assert row["share_of_read"] == pytest.approx(row["gbps"] / got["read_gbps"])
        assert row["prefill_tok_s"] > 0
        assert row["own_read_gbps"] > 0


def test_own_reads_are_of_as_many_bytes_as_a_token_reads(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def read(_threads: int, num_bytes: int) -> float:
        sizes.append(num_bytes)
        return 40.0 if num_bytes == 1 << 20 else 50.0

    monkeypatch.setattr("coreinfer.runtime.commands.bench._native.read_bandwidth", read)
    got = figures(run(bundle, *QUICK, "--json"))
    assert got["read_gbps"] == 40.0
    assert {row["bytes_per_token"] for row in got["runs"]} <= set(sizes)
    assert {row["own_read_gbps"] for row in got["runs"]} == {50.0}


def test_starts_are_timed_and_their_memory_taken(bundle: Path) -> None:
    result = run(bundle, *QUICK, "--starts", 2, "--json")
    assert "first s" in result.stdout.splitlines()[1]
    for row in figures(result)["runs"]:
        assert 0.05 < row["ttft_s"] < 60
        # Not this process's own, which has torch.
        assert 30 < row["peak_rss_mb"] < 200
    assert {row["ttft_s"] for row in figures(run(bundle, *QUICK, "--json"))["runs"]} == {None}


def test_a_start_that_fails_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coreinfer.runtime.commands.starts._PROGRAM", "raise SystemExit(3)")
    result = run(bundle, *QUICK, "--starts", 1)
    assert result.exit_code == 2
    assert "coreinfer-run printed no token (exit 3)" in result.stderr


def test_all_kernels_in_turn(bundle: Path) -> None:
    got = figures(run(bundle, *QUICK, "--isa", "all", "--json"))
    isas = _native.available_isas()
    assert [(row["isa"], row["ffn"]) for row in got["runs"]] == [(i, f) for i in isas for f in ("dense", "pack")]


def test_one_kernel(bundle: Path) -> None:
    got = figures(run(bundle, *QUICK, "--isa", "portable", "--json"))
    assert {row["isa"] for row in got["runs"]} == {"portable"}


def test_no_dense_row_where_the_bundle_has_none(tiny_bundle: Callable[..., Path]) -> None:
    got = figures(run(tiny_bundle("llama", dense=False), *QUICK, "--json"))
    assert [row["ffn"] for row in got["runs"]] == ["pack"]


def test_a_round_is_the_prompt_then_a_short_start_and_the_tokens(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    forward = NativeDecoder.forward

    def counted(self: NativeDecoder, token_ids: Any, *, all_logits: bool = False, greedy: bool = False) -> Any:
        assert all(0 <= token_id < VOCABULARY for token_id in token_ids)
        lengths.append(len(token_ids))
        return forward(self, token_ids, all_logits=all_logits, greedy=greedy)

    monkeypatch.setattr(NativeDecoder, "forward", counted)
    bench(bundle, BenchOptions(threads=1, num_tokens=3, num_prompt_tokens=20, num_rounds=2))
    # Dense and pack in turn: once to warm up, then twice.
    assert lengths == [20, 16, 1, 1, 1] * 2 * 3


@pytest.mark.parametrize("option", ["--tokens", "--prompt-tokens", "--rounds"])
def test_numbers_must_be_positive(option: str, bundle: Path) -> None:
    result = run(bundle, *QUICK, option, 0)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {option}: expected a whole number of at least 1, got 0\n"


@pytest.mark.parametrize("option", ["--tokens", "--prompt-tokens"])
def test_what_does_not_fit_the_model_is_one_line(option: str, bundle: Path) -> None:
    result = run(bundle, *QUICK, option, MAX_POSITIONS + 1)
    assert result.exit_code == 2
    assert f"has {MAX_POSITIONS} positions" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (("--isa", "abacus"), "error: isa (or COREINFER_ISA): expected auto, "),
        (("--threads", 0), "error: threads: expected 1 to "),
    ],
)
def test_wrong_options_are_one_line(arguments: tuple[object, ...], start: str, bundle: Path) -> None:
    result = run(bundle, *QUICK, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(start)
    assert f"got {arguments[1]!r}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_no_bundle(tmp_path: Path) -> None:
    result = run(tmp_path / "none", *QUICK)
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'none'} does not exist; give a folder that coreinfer-compile wrote\n"


def test_torch_is_not_imported(bundle: Path) -> None:
    code = (
        "import sys; from coreinfer.runtime.commands.bench import main; main(standalone_mode=False); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(bundle), *map(str, QUICK)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(bundle.name)
