"""The keep ratio that a quality asks for: the search by itself, and what is compiled with it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles import ConfigError, read_manifest
from coreinfer.bundles.manifest import Score
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.searching import fit_quality, least_keep

from .test_config import make_config


@pytest.mark.parametrize("limit", [0.2, 0.31, 0.5, 0.77, 0.999])
def test_the_ratio_found_holds_and_is_near_the_limit(limit: float) -> None:
    asked: list[float] = []

    def holds(keep: float) -> bool:
        asked.append(keep)
        return keep >= limit

    found = least_keep(holds, least=0.15)
    assert found >= limit
    assert found - limit <= 0.85 / 2**6 + 1e-3
    assert len(asked) == 6


def test_where_nothing_holds_all_is_kept() -> None:
    assert least_keep(lambda _keep: False, least=0.15) == 1.0


def score(keep: float) -> Score:
    return Score(name="clusters", perplexity=20.0, kl=1 - keep, top1=keep, num_texts=1, num_tokens=1)


@pytest.mark.parametrize(
    ("options", "limit"),
    [({"max_kl": 0.4}, 0.6), ({"min_top1": 0.8}, 0.8), ({"max_kl": 0.4, "min_top1": 0.8}, 0.8)],
)
def test_both_qualities_hold(options: dict[str, Any], limit: float) -> None:
    config = fit_quality(make_config(**options), lambda config: score(config.keep), has_held_out=True)
    assert limit <= config.keep <= limit + 0.015


def test_without_an_aim_nothing_is_measured() -> None:
    config = make_config(keep=0.4)
    assert fit_quality(config, lambda _config: pytest.fail("measured"), has_held_out=False) is config


def test_nothing_held_out_is_one_line() -> None:
    with pytest.raises(ConfigError, match="--max-kl, --min-top1: expected calibration text enough"):
        fit_quality(make_config(max_kl=0.1), lambda config: score(config.keep), has_held_out=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.0}, "--max-kl: expected a number above 0"),
        ({"min_top1": 1.5}, "--min-top1: expected a number in"),
        ({"max_kl": 0.1, "budget_mb": 5.0}, "got both"),
        ({"max_kl": 0.1, "keep": 1.0}, "expected a keep ratio below 1"),
    ],
)
def test_aims_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**options)


@pytest.mark.parametrize("budgets", ["uniform", "sensitivity"])
def test_a_compiled_bundle_holds_its_quality(
    budgets: Any,
    tiny_inputs: Callable[[str], CompileConfig],
    tiny_bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Between the KL of two known ratios lies a limit that neither everything nor anything holds."""
    options: dict[str, Any] = {"budgets": budgets, "min_layer_keep": 0.1}
    narrow = read_manifest(tiny_bundle("llama", keep=0.34, **options)).quality
    assert narrow is not None
    limit = narrow.clusters.kl * 0.7
    progress = Progress()
    config = replace(tiny_inputs("llama"), output=tmp_path / "b", cache_dir=tmp_path / "c", max_kl=limit, **options)
    manifest = compile_model(config, progress)
    assert manifest.quality is not None
    assert manifest.quality.clusters.kl <= limit + 1e-6
    assert 0.34 < manifest.plan.keep <= 1
    assert len(manifest.quality.controls) == 2
    assert manifest.provenance.config["max_kl"] == limit
    assert progress.stage_peak_bytes.keys() == progress.stage_seconds.keys()
    assert min(progress.stage_peak_bytes.values()) > 10**7
