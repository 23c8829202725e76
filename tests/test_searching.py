"""The keep ratio that a quality asks for: the search by itself, and what is compiled with it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer.bundles import ConfigError, read_manifest
from coreinfer.bundles.manifest import ClusterQuality, Quality, Score
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.quality.search import fewest_clusters, fit_clusters, fit_quality, least_keeps

from .test_config import make_config

LADDER = (1, 2, 4, 8, 16, 32)


def kl_of(keep: float) -> float:
    """KL of SmolLM2-135M's packs, about (docs/benchmarks/quality.md)."""
    return 1.3 * (1 - keep) + 1.0 * (1 - keep) ** 3


def least_keep(excess: Callable[[float], float], *, num_tries: int = 6) -> float:
    """The search for one cluster."""
    found = least_keeps(lambda keeps: [excess(keeps[0])], num_clusters=1, least=0.15, num_tries=num_tries)
    return found[0]


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.1, 0.3, 0.6, 1.0, 1.5])
def test_the_ratio_found_holds_and_is_near_the_limit(limit: float) -> None:
    asked: list[float] = []

    def excess(keep: float) -> float:
        asked.append(keep)
        return kl_of(keep) / limit - 1

    found = least_keep(excess)
    assert kl_of(found) <= limit
    assert kl_of(found) >= 0.95 * limit or kl_of(found - 0.016) > limit
    assert len(asked) <= 5


@pytest.mark.parametrize("limit", [0.2, 0.31, 0.5, 0.77, 0.99])
def test_a_step_is_found_too(limit: float) -> None:
    found = least_keep(lambda keep: -0.5 if keep >= limit else 3.0, num_tries=20)
    assert limit <= found <= limit + 0.015 + 1e-9


def test_the_number_of_tries_is_an_end() -> None:
    asked: list[float] = []

    def excess(keep: float) -> float:
        asked.append(keep)
        return -0.5

    assert least_keep(excess, num_tries=3) == asked[-1]
    assert len(asked) == 3


def test_where_nothing_holds_all_is_kept() -> None:
    assert least_keep(lambda _keep: 1.0) == 1.0


def test_clusters_are_searched_side_by_side_as_each_would_be_alone() -> None:
    limits = (0.05, 0.3, 1.0)
    asked: list[list[float]] = []

    def excesses(keeps: Sequence[float]) -> list[float]:
        asked.append(list(keeps))
        return [kl_of(keep) / limit - 1 for keep, limit in zip(keeps, limits, strict=True)]

    found = least_keeps(excesses, num_clusters=3, least=0.15)
    alone = [least_keep(lambda keep, limit=limit: kl_of(keep) / limit - 1) for limit in limits]  # type: ignore[misc]
    assert list(found) == alone
    assert found[0] > found[1] > found[2]
    # What is found stays while others are searched on, so that the last try is what is compiled.
    assert asked[-1] == list(found)


def score(keep: float, name: str = "clusters", num_tokens: int = 300) -> Score:
    return Score(name=name, perplexity=20.0, kl=1 - keep, top1=keep, num_texts=1, num_tokens=num_tokens)


DENSE = score(1.0, "dense")


def measured(num_tokens: Sequence[int], hardness: Sequence[float]) -> Callable[[Sequence[float]], Quality]:
    """Clusters that lose less or more than `score` says; those without text are in no list."""

    def measure(keeps: Sequence[float]) -> Quality:
        own = [1 - hard * (1 - keep) for hard, keep in zip(hardness, keeps, strict=True)]
        return Quality(
            dense=score(1.0, "dense"),
            clusters=score(float(np.average(own, weights=num_tokens))),
            controls=(),
            per_cluster=tuple(
                ClusterQuality(cluster=cluster, score=score(own[cluster], num_tokens=count))
                for cluster, count in enumerate(num_tokens)
                if count
            ),
        )

    return measure


@pytest.mark.parametrize(
    ("options", "limit"),
    [({"max_kl": 0.4}, 0.6), ({"min_top1": 0.8}, 0.8), ({"max_kl": 0.4, "min_top1": 0.8}, 0.8)],
)
def test_both_qualities_hold(options: dict[str, Any], limit: float) -> None:
    keep, keeps = fit_quality(make_config(**options), 0.7, measured([300], [1.0]), DENSE, [300])
    # Within a twentieth of what may be lost.
    assert limit <= keeps[0] <= limit + 0.05 * (1 - limit)
    assert keep == pytest.approx(keeps[0], abs=1e-4)


def test_each_cluster_keeps_what_it_needs() -> None:
    counts = [400, 200, 300]
    mean, keeps = fit_quality(make_config(max_kl=0.3), 0.7, measured(counts, [0.5, 1.0, 2.0]), DENSE, counts)
    for hard, keep in zip([0.5, 1.0, 2.0], keeps, strict=True):
        assert 0.95 * 0.3 <= hard * (1 - keep) <= 0.3
    assert mean == pytest.approx(np.average(keeps, weights=counts), abs=1e-4)


def test_a_cluster_with_little_text_goes_by_all() -> None:
    counts = [400, 50, 0]
    _, keeps = fit_quality(make_config(max_kl=0.3), 0.7, measured(counts, [1.0, 9.0, 9.0]), DENSE, counts)
    assert 0.95 * 0.3 <= 1 - keeps[0] <= 0.3
    assert keeps[1] == keeps[2]
    overall = (400 * (1 - keeps[0]) + 50 * 9 * (1 - keeps[1])) / 450
    assert overall <= 0.3


def test_without_an_aim_nothing_is_measured() -> None:
    found = fit_quality(make_config(keep=0.7), 0.4, lambda _keeps: pytest.fail("measured"), DENSE, [0, 0])
    assert found == (0.4, (0.4, 0.4))


def test_nothing_held_out_is_one_line() -> None:
    with pytest.raises(ConfigError, match="--max-kl, --min-top1: expected calibration text enough"):
        fit_quality(make_config(max_kl=0.1), 0.7, measured([1], [1.0]), DENSE, [0])
    with pytest.raises(ConfigError, match="--max-kl, --min-top1: expected calibration text enough"):
        fit_quality(make_config(max_kl=0.1), 0.7, measured([1], [1.0]), None, [0])


@pytest.mark.parametrize(
    ("kind", "way_out"), [("int4", "ask for less, or --quantize more bits$"), ("bf16", "ask for less$")]
)
def test_what_rounding_alone_breaks_is_one_line(kind: Any, way_out: str) -> None:
    config = make_config(max_kl=0.03, quantize=kind)
    message = rf"--max-kl, --min-top1: rounding to {kind} alone costs KL 0\.0400 .* top-1 0\.9600 .*; {way_out}"
    with pytest.raises(ConfigError, match=message) as caught:
        fit_quality(config, 0.7, lambda _keeps: pytest.fail("measured"), score(0.96, "dense"), [300])
    assert "\n" not in str(caught.value)


def test_the_default_names_the_option_that_ends_the_search() -> None:
    message = (
        r"^--max-kl 0\.1, the default: rounding to int4 alone costs KL 0\.2000 .*; give --keep, or --quantize more"
    )
    with pytest.raises(ConfigError, match=message):
        fit_quality(make_config(keep=None), 0.7, lambda _keeps: pytest.fail("measured"), score(0.8, "dense"), [300])


def test_what_rounding_costs_is_in_what_may_be_lost() -> None:
    def measure(keeps: Sequence[float]) -> Quality:
        found = measured([300], [1.0])(keeps)
        worse = replace(found.clusters, kl=found.clusters.kl + 0.05)
        return replace(found, clusters=worse, per_cluster=(ClusterQuality(cluster=0, score=worse),))

    _, keeps = fit_quality(make_config(max_kl=0.1), 0.7, measure, score(0.95, "dense"), [300])
    assert 0.95 <= keeps[0] <= 0.956


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.0}, "--max-kl: expected a number above 0"),
        ({"min_top1": 1.5}, "--min-top1: expected a number in"),
        ({"max_kl": 0.1, "budget_mb": 5.0}, "got both"),
        ({"max_kl": 0.1, "keep": 0.9}, "--keep and --max-kl: expected one of them, got both"),
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
    config = replace(
        tiny_inputs("llama"), output=tmp_path / "b", cache_dir=tmp_path / "c", keep=None, max_kl=limit, **options
    )
    manifest = compile_model(config, progress)
    assert manifest.quality is not None
    assert manifest.quality.clusters.kl <= limit + 1e-6
    assert 0.34 < manifest.plan.keep <= 1
    assert len(manifest.quality.controls) == 2
    assert manifest.provenance.config["max_kl"] == limit
    assert progress.stage_peak_bytes.keys() == progress.stage_seconds.keys()
    assert min(progress.stage_peak_bytes.values()) > 10**7


@pytest.mark.parametrize(
    ("kls", "expected", "num_tried"),
    [
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], 32, 6),
        ([1.0, 0.9, 0.8, 0.79, 0.785, 0.1], 4, 5),
        ([1.0, 1.1, 1.2, 0.1, 0.1, 0.1], 1, 3),
        ([1.0, 0.985, 0.97, 0.1, 0.1, 0.1], 2, 3),
    ],
)
def test_the_fewest_clusters_that_earn_their_place(kls: list[float], expected: int, num_tried: int) -> None:
    tried: list[int] = []

    def kl_of(count: int) -> float:
        tried.append(count)
        return kls[LADDER.index(count)]

    assert fewest_clusters(kl_of, LADDER) == expected
    assert tried == list(LADDER[:num_tried])


def test_few_documents_make_few_clusters() -> None:
    tried = []

    def measure(num_clusters: int) -> Score:
        tried.append(num_clusters)
        return score(num_clusters / 100)

    assert fit_clusters(make_config(clusters="auto"), measure, num_documents=40) == 4
    assert tried == [1, 2, 4]
    assert fit_clusters(make_config(clusters=7), measure, num_documents=40) == 7


def test_auto_without_held_out_text_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(clusters="auto")
    assert fit_clusters(config, lambda _count: pytest.fail("measured"), num_documents=0) == "auto"
    assert "no text is held out" in caplog.text


def test_auto_compiles_what_it_measured_best(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(tiny_inputs("llama"), output=tmp_path / "b", cache_dir=tmp_path / "c", clusters="auto")
    with caplog.at_level("INFO", logger="coreinfer"):
        manifest = compile_model(config)
    messages = [record.message for record in caplog.records]
    lines = [message for message in messages if "clusters: held-out KL" in message]
    kls = {int(line.split()[0]): float(line.split()[-1]) for line in lines}
    assert len(kls) >= 3
    (chosen,) = [int(message.split()[2]) for message in messages if message.startswith("clusters auto:")]
    # Which tiny clusters are merged depends on the CPU.
    assert 1 <= len(manifest.clusters) <= chosen
    assert manifest.quality is not None
    assert manifest.quality.clusters.kl == pytest.approx(kls[chosen], abs=1e-4)
    assert kls[chosen] <= min(kls.values()) * 1.021
