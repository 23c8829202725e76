"""Token shares of a compile: costs, the plan, what is refused, kept and shown."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.bundles.families import resolve
from coreinfer.bundles.inspect import describe
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.token_shares import token_thresholds
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.expert_options import check_expert_options
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.shares.costs import group_costs
from coreinfer.compiler.shares.inputs import Norms, groups_of, inputs_taken
from coreinfer.compiler.shares.plan import TARGETS, plan_shares
from coreinfer.compiler.shares.texts import BegunText, begin_texts
from coreinfer.compiler.shares.thresholds import LEVELS, sample_scores
from coreinfer.compiler.text.corpus import Document
from coreinfer.runtime.engines.torch.wanted_inputs import Groups, InputCounts

from .engine_inputs import PROMPT
from .loading import load

SHARE = 0.6
TOKEN_IDS = (1, 57, 200, 300, 21, 99, 140, 7, 9, 8, 77, 301)


@pytest.fixture(scope="module")
def shared_bundle(tiny_bundle: Callable[..., Path]) -> Callable[..., Path]:
    return lambda family="llama", **options: tiny_bundle(family, token_share=SHARE, **options)


def test_what_cannot_have_token_shares_is_refused(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    given = replace(tiny_inputs("llama"), output=tmp_path / "b", token_share=0.5)
    for options, named in (
        ({"by_neuron": True, "quantize": "int4"}, "--token-share: expected a FFN that is not stored neuron by neuron"),
        ({"max_memory": 4.0}, "--token-share: gradients go through all of its weights at once"),
        ({"token_share": 0.2}, "token-share: expected auto or a number in [0.3, 1], got 0.2"),
    ):
        with pytest.raises(ConfigError, match=re.escape(named)):
            replace(given, **options)
    check_expert_options(replace(given, budgets=None), "olmoe")


def test_layers_that_cost_more_read_more() -> None:
    rng = np.random.default_rng(3)
    levels = len(LEVELS)
    scores = np.sort(rng.gamma(1.0, size=(3, 4, 4000)), axis=-1)
    sums = np.concatenate([np.zeros((3, 4, 1)), np.cumsum(scores**2, axis=-1)], axis=-1)
    energies = (sums / sums[..., -1:])[..., np.round((1 - LEVELS.astype(float)) * 4000).astype(int)]
    assert energies.shape == (3, 4, levels)
    weights = rng.integers(1, 9, (3, 4)).astype(np.float32) * 1000
    costs = rng.gamma(1.0, size=(3, 4)).astype(np.float32)
    plan = plan_shares(costs, energies.astype(np.float32), weights, measured_at=0.5)

    def loss(shares: npt.NDArray[Any]) -> float:
        at = [[np.interp(shares[i, j], LEVELS, energies[i, j]) for j in range(4)] for i in range(3)]
        half = [[np.interp(0.5, LEVELS, energies[i, j]) for j in range(4)] for i in range(3)]
        return float((costs * np.array(at) / np.array(half)).sum())

    for target, shares in zip(TARGETS, plan, strict=True):
        assert np.average(shares, weights=weights) == pytest.approx(float(target), abs=1e-4)
        assert loss(shares) <= 0.9 * loss(np.full((3, 4), target))
        for _ in range(20):
            # Nothing is won by moving bytes from one group to another.
            moved, (i, j), (k, m) = shares.astype(float), rng.integers([3, 4]), rng.integers([3, 4])
            moved[i, j] += 0.02 / weights[i, j] * weights.min()
            moved[k, m] -= 0.02 / weights[k, m] * weights.min()
            if moved.min() > 0.15 and moved.max() < 1:
                assert loss(moved) >= loss(shares) * (1 - 1e-2)
    assert (plan[-1] == 1).all()
    ones = np.ones((3, 4), dtype=np.float32)
    even = plan_shares(ones, np.tile(energies[:1, :1], (3, 4, 1)), ones, measured_at=0.5)
    np.testing.assert_allclose(even, np.broadcast_to(TARGETS[:, None, None], even.shape), atol=1e-3)


@pytest.mark.parametrize(
    ("family", "halves"),
    [(family, False) for family in ("llama", "gemma2", "opt", "mixtral", "gpt_oss")]
    + [(family, True) for family in ("llama", "gemma2", "opt")],
)
def test_costs_are_what_the_model_loses(family: str, halves: bool, tiny_inputs: Callable[[str], CompileConfig]) -> None:
    """Of one token, of which the gradients' second order is all there is where little is left out."""
    loaded = load(Path(tiny_inputs(family).model))
    norms = {(layer, group): _ones(loaded, group) for layer, group in groups_of(loaded)}
    texts = begin_texts(loaded, None, [Document(text="", routing_text="", token_ids=(1, 57))])
    thresholds = _low_scores(loaded, texts, norms, 0.5 if halves else 0.1)
    low = _rounding(loaded) if halves else {}
    fixed = [parameter.requires_grad for parameter in loaded.model.parameters()]
    drawn = [group_costs(loaded, texts, norms, thresholds, low, lambda steps=1: None, seed=seed) for seed in range(300)]
    lost = []
    with torch.inference_mode():
        expected = loaded.head(texts[0].states(loaded)).log_softmax(-1)
        for place in norms:
            with inputs_taken(loaded, norms, {place: thresholds[place]}, low):
                got = loaded.head(texts[0].states(loaded)).log_softmax(-1)
            lost.append(float((expected.exp() * (expected - got)).sum()))
    costs = np.mean(drawn, axis=0).reshape(-1)
    assert sum(lost) > 1e-4
    assert costs.sum() == pytest.approx(sum(lost), rel=0.3)
    assert np.corrcoef(np.sqrt(costs), np.sqrt(np.maximum(lost, 0)))[0, 1] > 0.9
    assert [parameter.requires_grad for parameter in loaded.model.parameters()] == fixed


def _ones(loaded: LoadedModel, group: str) -> torch.Tensor:
    experts = loaded.record.experts
    inner = loaded.record.ffn_dim if experts is None else loaded.record.expert_neurons
    size = {"down": inner, "o": loaded.record.num_heads * loaded.record.head_dim}.get(group, loaded.record.hidden_size)
    return torch.ones(size) if experts is None or group in ("qkv", "o") else torch.ones(experts.num_experts, size)


def _low_scores(
    loaded: LoadedModel, texts: list[BegunText], norms: Norms, not_whole: float
) -> dict[Groups, tuple[float, float]]:
    """Thresholds that leave out a tenth of the inputs; not whole are as many as said."""
    found = sample_scores(loaded, texts, norms, seed=0)
    return {place: (float(np.quantile(s, 0.1)), float(np.quantile(s, not_whole))) for place, s in found.items()}


def _rounding(loaded: LoadedModel) -> dict[tuple[int, str], torch.Tensor]:
    """What halves lose of the weights of each matrix."""
    generator = torch.Generator().manual_seed(3)
    low = {}
    for layer, group in groups_of(loaded):
        for path in loaded.family.input_groups[group]:
            weight = resolve(loaded.layers[layer], path).weight.detach()
            low[layer, path] = 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    return low


def test_the_same_compile_takes_its_shares_from_the_cache(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    given = replace(tiny_inputs("llama"), token_share=0.6, cache_dir=tmp_path / "cache", keep=1.0, evaluate=False)
    seen = []
    for share in (0.6, 0.8):
        progress = Progress()
        compile_model(replace(given, output=tmp_path / f"{share}", token_share=share), progress)
        seen.append("shares" in progress.stage_seconds)
    assert seen == [True, False]
    first, second = ((tmp_path / f"{share}" / LAYOUT.token_shares).read_bytes() for share in (0.6, 0.8))
    assert first == second
    assert read_manifest(tmp_path / "0.8").token_shares.default == 0.8  # type: ignore[union-attr]
    assert_reads_less(tmp_path / "0.8")


def assert_reads_less(folder: Path) -> None:
    """Of packs that keep everything, too, with the prompt read by another pack's dense half."""
    engine = runtime.load(folder, engine="torch", device="cpu", dtype="float32")
    decoder: Any = engine.decoder
    decoder.masks.counts = InputCounts()
    got = engine.generate(PROMPT, raw=True, max_new_tokens=8, mode="similarity")
    counts = decoder.masks.counts
    assert got.token_share == 0.8
    read = sum(counts.num_wanted.values()) / sum(counts.num_inputs.values())
    assert 0.6 < read < 0.95


def test_packs_alone_have_shares(shared_bundle: Callable[..., Path]) -> None:
    folder = shared_bundle(dense=False, evaluate=False)
    bundle = open_bundle(folder)
    assert find_problems(folder, bundle.manifest) == []
    engine = runtime.load(folder, engine="torch", device="cpu", dtype="float32")
    assert engine.generate(PROMPT, raw=True, max_new_tokens=4).token_share == SHARE
    with pytest.raises(ConfigError, match="no dense FFN"):
        token_thresholds(bundle, None, 0.5)


def test_scores_are_shown(shared_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(shared_bundle())
    record = bundle.manifest.token_shares
    assert record is not None
    names = [(found.weights, found.shares) for found in record.scores]
    assert names == [("dense", "planned"), ("dense", "equal"), ("clusters", "planned"), ("clusters", "equal")]
    for found in record.scores:
        assert found.asked == SHARE
        assert found.read == pytest.approx(SHARE, abs=0.1)
        assert found.score.kl > 0
    lines = "\n".join(describe(bundle.manifest))
    assert "token      reads 0.6 of the layers' weights dense, 0.6 with a pack" in lines
    report = (bundle.path / LAYOUT.report).read_text(encoding="utf-8")
    assert "dense, equal shares 0.6" in lines
    assert "dense, equal shares 0.6" in report
