"""`--packs auto`: each cluster gets what reads the fewest bytes at a quality, and bundles mix thin clusters and packs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from coreinfer.bundles.manifest import Manifest, read_manifest
from coreinfer.bundles.reader import find_problems
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.shares import choice, search


@pytest.fixture(scope="module")
def auto_inputs(tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory) -> CompileConfig:
    """Options of a compile that chooses; what compiles have in common comes from a cache."""
    cache = tmp_path_factory.mktemp("auto-cache")
    given = replace(tiny_inputs("llama"), keep=None, packs="auto", effort="quick", max_kl=2e-3)
    return replace(given, cache_dir=cache, clusters=2)


def test_it_runs(auto_inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(search, "LEAST_TOKENS", 8)
    caplog.set_level("INFO")
    compile_model(replace(auto_inputs, output=tmp_path / "b"))
    found = read_manifest(tmp_path / "b")
    for c in found.token_shares.choices:
        print(c)
    for r in caplog.records:
        print(r.getMessage())
    assert find_problems(tmp_path / "b", found) == []
    assert 0
