"""The benchmarks of quality at their smallest: every row is there, and is measured as it is stored."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from coreinfer.compiler import CompileConfig

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tiny_inputs: Callable[[str], CompileConfig], cache_dir: Path, tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """A function (name of a benchmark, options) that runs it and gives its JSON line."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    # What the benchmarks set is taken back.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    num_threads = torch.get_num_threads()

    def run(name: str, *options: str) -> Any:
        config = tiny_inputs("llama")
        text = Path(config.calibration[0]).read_text(encoding="utf-8").split()
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({"text": " ".join(text[start::7][:30])}) + "\n" for start in range(2)))
        common = {"--model": config.model, "--encoder": str(config.encoder), "--calibration": config.calibration[0]}
        common |= {"--data": str(data), "--clusters": "2", "--cache": str(cache_dir), "--keep": "0.67"}
        arguments = [word for pair in common.items() for word in pair]
        result = CliRunner().invoke(importlib.import_module(name).main, [*arguments, *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout.splitlines()[-1])

    yield run
    torch.set_num_threads(num_threads)


def test_selections(run: Callable[..., Any], cache_dir: Path) -> None:
    rows = {row["name"]: row for row in run("selection", "--budgets", "uniform")["rows"]}
    assert len(rows) == 1 + 3 * 3 + 3 + 1 + 3 * 3
    assert {"dense", "griffin, prompt's own neurons", "output-aware, fused", "top-k, repaired, clusters"} <= rows.keys()
    # int4 alone costs something: the dense model is not the one that it is compared with.
    assert 0 < rows["dense"]["kl"] < rows["second-order, repaired, carried, clusters"]["kl"]
    assert {row["num_texts"] for row in rows.values()} == {2}
    assert not list(cache_dir.glob("bench-*"))


def test_quality_at_keep_ratios(run: Callable[..., Any]) -> None:
    plain, healed, wide = run("quality", "--keep", "1.0", "--heal-steps", "1", "--no-controls")["results"][:3]
    assert (plain["keep"], plain["healed"], healed["keep"], healed["healed"]) == (0.67, False, 0.67, True)
    assert plain["clusters"]["kl"] != healed["clusters"]["kl"]
    assert wide["keep"] == 1.0
    # Packs that keep all are the dense FFN, rounded alike.
    assert wide["clusters"]["kl"] == pytest.approx(wide["dense"]["kl"], rel=0.05)


def test_repairs_of_fused_choices(run: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in run("fused", "--budgets", "uniform", "--threads", "1")["rows"]}
    repaired, plain = rows["fused, repaired, cluster's mixed Gram"], rows["fused, not repaired"]
    assert repaired["kl"] != plain["kl"]
    assert 0 < rows["dense"]["kl"] < min(repaired["kl"], plain["kl"])
    assert len(rows) == 7
