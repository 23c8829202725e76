"""benchmarks/gpu.py on the CPU: every contender runs, and the figures have their form."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from .model_factory import save_model
from .programs import load_program

QUICK = ("--device", "cpu", "--dtype", "float32", "--tokens", 3, "--prompt-tokens", 8, "--rounds", 2)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load_program("benchmarks/gpu.py")


def run(gpu: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(gpu.main, [str(one) for one in (*arguments, *QUICK, "--read-bytes", 1 << 20)])


def test_table_then_one_json_line(gpu: ModuleType, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    result = run(gpu, tiny_bundle("llama"), "--transformers", folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    figures: dict[str, Any] = json.loads(lines[-1])
    expected = [name for name in gpu.CONTENDERS if name not in gpu.SHARES]
    assert [run["name"] for run in figures["runs"]] == expected
    assert len(lines) == 2 + len(expected) + 1
    for one in figures["runs"]:
        assert one["decode_tok_s"] > 0
        assert one["prefill_tok_s"] > 0
        assert one["peak_mb"] is None
    by_name = {one["name"]: one for one in figures["runs"]}
    assert by_name["pack"]["bytes_per_token"] == by_name["bounded"]["bytes_per_token"]
    assert by_name["pack"]["bytes_per_token"] < by_name["dense"]["bytes_per_token"]
    assert 2 * by_name["transformers"]["bytes_per_token"] == by_name["dense"]["bytes_per_token"]
    assert figures["read_gbps"] > 0
    assert "bounded: " in result.stderr
    assert "share-0.64: left out, the bundle has no such token share" in result.stderr


def test_token_shares_are_timed(gpu: ModuleType, tiny_bundle: Callable[..., Path]) -> None:
    folder = tiny_bundle("llama", token_share=0.6, quantize="int4")
    names = ["dense", *gpu.SHARES]
    result = run(gpu, folder, *(part for name in names for part in ("--contenders", name)))
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout.splitlines()[-1])["runs"]
    assert [one["name"] for one in runs] == names
    assert [one["bytes_per_token"] is None for one in runs] == [False, True, True]


def test_what_cannot_run_is_said(gpu: ModuleType, tiny_bundle: Callable[..., Path]) -> None:
    result = run(gpu, tiny_bundle("llama", dense=False), "--contenders", "transformers", "--contenders", "dense")
    assert "transformers: left out" in result.stderr
    assert "dense: left out, the bundle has no dense FFN" in result.stderr


def test_what_does_not_fit_is_said(
    gpu: ModuleType, tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = gpu.sample

    def run_out(load: Any, options: Any) -> Any:
        if gpu.DENSE in load.args:
            raise gpu.torch.OutOfMemoryError("CUDA out of memory")
        return sample(load, options)

    monkeypatch.setattr(gpu, "sample", run_out)
    result = run(gpu, tiny_bundle("llama"), "--contenders", "dense", "--contenders", "pack")
    assert "dense: does not fit on cpu" in result.stderr
    assert [one["name"] for one in json.loads(result.stdout.splitlines()[-1])["runs"]] == ["pack"]


def test_packed_weights(gpu: ModuleType, tiny_bundle: Callable[..., Path]) -> None:
    folder = tiny_bundle("llama", quantize="int4")
    sizes = []
    for weights in ("bfloat16", "packed"):
        result = run(gpu, folder, "--contenders", "pack", "--weights", weights, "--cuda-graphs", "off")
        assert result.exit_code == 0, result.output
        sizes.append(json.loads(result.stdout.splitlines()[-1])["runs"][0]["bytes_per_token"])
    assert sizes[1] < sizes[0]


def test_a_gpu_that_is_not_there(gpu: ModuleType, tiny_bundle: Callable[..., Path]) -> None:
    if gpu.torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(gpu.main, [str(tiny_bundle("llama"))])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "torch sees no GPU here" in result.stderr


def test_it_ends_when_its_time_is_over(gpu: ModuleType, tiny_bundle: Callable[..., Path]) -> None:
    result = run(gpu, tiny_bundle("llama"), "--contenders", "pack", "--rounds", 3, "--seconds", 0)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["cut"] == "no time was left for pack of round 1 of 2"
    assert figures["runs"] == []
