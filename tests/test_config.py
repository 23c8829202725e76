from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler import CompileConfig
from coreinfer.compiler.config import DEFAULT_MAX_KL


def make_config(**options: Any) -> CompileConfig:
    return CompileConfig(**{"model": "model", "output": Path("bundle"), **options})


WRONG: list[tuple[str, Any, str]] = [
    ("model", "", "--model"),
    ("calibration", (), "--calibration"),
    ("calibration", "a.jsonl", "--calibration"),
    ("output", "bundle", "--output"),
    ("encoder", "", "--encoder"),
    ("text_field", 3, "--text-field"),
    ("cache_dir", "cache", "--cache"),
    ("carry", "no", "--carry"),
    ("clusters", True, "--clusters"),
    ("clusters", "Auto", "--clusters"),
    ("keep", "0.5", "--keep"),
    ("keep", True, "--keep"),
    ("max_kl", "0.1", "--max-kl"),
    ("heal_steps", 1.5, "--heal-steps"),
    ("seed", None, "--seed"),
    ("clusters", 0, "--clusters"),
    ("clusters", "many", "--clusters"),
    ("clusters", 1.5, "--clusters"),
    ("keep", 0.0, "--keep"),
    ("keep", 1.0001, "--keep"),
    ("keep", float("nan"), "--keep"),
    ("keep", float("-inf"), "--keep"),
    ("alpha", 0.0, "--alpha"),
    ("beta", -1.0, "--beta"),
    ("cluster_weight", -0.1, "--cluster-weight"),
    ("cluster_weight", 1.5, "--cluster-weight"),
    ("cluster_weight", float("nan"), "--cluster-weight"),
    ("cluster_weight", "most", "--cluster-weight"),
    ("min_layer_keep", float("inf"), "--min-layer-keep"),
    ("selection", "magnitude", "--selection"),
    ("budgets", "fair", "--budgets"),
    ("dtype", "float16", "--dtype"),
    ("ridge", 0.0, "--ridge"),
    ("ridge", float("nan"), "--ridge"),
    ("ridge", "best", "--ridge"),
    ("budget_mb", 0.0, "--budget-mb"),
    ("budget_mb", float("nan"), "--budget-mb"),
    ("removal", "magic", "--removal"),
    ("heal_steps", -1, "--heal-steps"),
    ("heal_cluster_steps", -1, "--heal-cluster-steps"),
    ("report_sentences", -1, "--report-sentences"),
    ("heal_rate", 0.0, "--heal-rate"),
    ("heal_optimizer", "sgd", "--heal-optimizer"),
    ("calibration_tokens", 0, "--calibration-tokens"),
    ("document_tokens", 15, "--document-tokens"),
    ("seed", -1, "--seed"),
    ("seed", 2**31 - 1, "--seed"),
    ("threads", 0, "--threads"),
]


@pytest.mark.parametrize(("field", "value", "option"), WRONG)
def test_a_wrong_option_is_named_with_what_it_got(field: str, value: Any, option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{option}: expected ")
    assert message.endswith(f"got {value!r}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"clusters": "auto", "ridge": "auto"},
        {"clusters": 1, "keep": 1.0, "alpha": 1.0, "beta": 1.0},
        {"cluster_weight": 0.0, "min_layer_keep": 0.0, "seed": 0},
        {"cluster_weight": 1.0, "min_layer_keep": 1.0, "budgets": "uniform", "seed": 2**31 - 2, "document_tokens": 16},
        {"keep": 1e-9, "min_layer_keep": 0.0, "ridge": 1e-12, "calibration_tokens": 1, "threads": 1},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(options: dict[str, Any]) -> None:
    config = make_config(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(keep=0.0, clusters=0, threads=-1, dtype="int8")
    message = str(caught.value)
    assert message.startswith("4 problems: (1) ")
    assert all(option in message for option in ("--keep", "--clusters", "--threads", "--dtype"))


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="--keep"):
        replace(make_config(), keep=2.0)


@pytest.mark.parametrize(
    ("selection", "given", "effective"),
    [
        ("output-aware", None, 0.3),
        ("griffin", None, 1.0),
        ("coreinfer", None, 1.0),
        ("output-aware", 0.0, 0.0),
        ("griffin", 0.5, 0.5),
        ("output-aware", "auto", 0.3),
        ("griffin", "auto", 1.0),
    ],
)
def test_effective_cluster_weight(selection: str, given: float | str | None, effective: float) -> None:
    assert make_config(selection=selection, cluster_weight=given).effective_cluster_weight == effective


def test_the_cache_is_no_part_of_what_is_compiled() -> None:
    assert make_config(cache_dir=Path("a")) == make_config(cache_dir=None)
    assert make_config(seed=1) != make_config(seed=2)


def test_a_chosen_cluster_weight_needs_the_repair_that_it_is_chosen_for() -> None:
    with pytest.raises(ConfigError, match="--cluster-weight auto: expected --reconstruct"):
        make_config(cluster_weight="auto", reconstruct=False)


def test_second_order_removal_needs_the_repair_that_it_counts_on() -> None:
    with pytest.raises(ConfigError, match="--removal second-order: expected --reconstruct"):
        make_config(removal="second-order", reconstruct=False)
    assert make_config(reconstruct=False).effective_removal == "top-k"
    assert make_config(selection="griffin").effective_removal == "top-k"
    assert make_config().effective_removal == "second-order"


def test_little_is_lost_where_nothing_is_said() -> None:
    config = make_config()
    assert (config.effective_max_kl, config.effective_keep) == (DEFAULT_MAX_KL, 0.7)
    for options in ({"keep": 0.9}, {"budget_mb": 80.0}, {"min_top1": 0.9}):
        assert make_config(**options).effective_max_kl is None
    assert make_config(max_kl=0.2).effective_max_kl == 0.2
    assert make_config(keep=0.9).effective_keep == 0.9


def test_an_effort_is_the_default_of_its_options() -> None:
    quick, normal, best = (make_config(effort=effort) for effort in ("quick", "normal", "best"))
    assert (quick.effective_removal, normal.effective_removal) == ("top-k", "second-order")
    assert (quick.effective_carry, normal.effective_carry, best.effective_carry) == (False, True, True)
    assert (quick.effective_controls, normal.effective_controls) == (False, True)
    assert (quick.effective_ridge, normal.effective_ridge) == (1e-2, "auto")
    assert (quick.effective_budgets, normal.effective_budgets) == ("energy", "sensitivity")
    assert (quick.heals, normal.heals, best.heals) == (False, False, True)
    assert (normal.chooses_cluster_weight, best.chooses_cluster_weight) == (False, True)
    asked: dict[str, Any] = {
        "carry": True,
        "controls": True,
        "ridge": 0.1,
        "budgets": "uniform",
        "removal": "second-order",
    }
    config = make_config(effort="quick", **asked)
    found = {name: getattr(config, f"effective_{name}") for name in asked}
    assert found == asked
    assert make_config(effort="best", heal_steps=0).heals is False
