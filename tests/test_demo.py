"""benchmarks/demo.py: the table that the demo ends with."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.token_bytes import token_bytes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_row_each_and_first_lines(tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    demo, folder = importlib.import_module("demo"), tiny_bundle("llama", quantize="int4")
    result = CliRunner().invoke(demo.main, [str(folder), "-n", "8", "A first prompt", "Another one"])
    assert result.exit_code == 0, result.output
    lines, manifest = result.stdout.splitlines(), read_manifest(folder)
    assert lines[0].split() == ["MB", "a", "token", "tokens/s", "KL"]
    assert manifest.quality is not None
    for line, name, num_bytes, score in (
        (lines[1], "dense", token_bytes(manifest).dense, manifest.quality.dense),
        (lines[2], "pack", token_bytes(manifest).pack, manifest.quality.clusters),
    ):
        cells = line.split()
        assert (cells[0], cells[1], cells[3]) == (name, f"{num_bytes / 1e6:.1f}", f"{score.kl:.3f}")
        assert float(cells[2]) > 0
    for prompt in ("A first prompt", "Another one"):
        start = lines.index(prompt)
        assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["dense", "pack"]


def test_fences_are_no_first_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    first_line = importlib.import_module("demo")._first_line
    assert first_line("\n```python\ndef f():\n    pass") == "def f():"
    assert first_line("") == ""
    assert len(first_line("x" * 200)) == 100


def test_a_folder_that_is_no_bundle_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    result = CliRunner().invoke(importlib.import_module("demo").main, [str(tmp_path / "none"), "x"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
