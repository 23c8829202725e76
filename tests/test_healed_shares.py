"""Healing of packs whose tokens leave inputs out: what it trains on, when it is kept, and what it leaves as it was."""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.bundles.families import resolve
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.heal import HealInputs, heal
from coreinfer.compiler.prune.narrow import NarrowModel, narrow_layer
from coreinfer.compiler.shares.healing import Divergence, gains
from coreinfer.compiler.shares.inputs import groups_of, inputs_seen, inputs_taken
from coreinfer.compiler.text.corpus import split_point
from torch.nn.functional import kl_div
from transformers import DynamicCache

from .model_factory import UNLIKE
from .test_carrying import CLUSTERS, documents, load
from .test_config import make_config
from .test_healing import bits, heal_inputs, interrupt_after

SHARE = 0.5
SHARED: dict[str, Any] = {"token_share": SHARE, "heal_steps": 6, "controls": False}

Reading = Callable[[int], AbstractContextManager[None]]


def half_read(loaded: LoadedModel) -> Reading:
    """A reading that leaves out about half of what enters each group of the dense model."""
    norms, scores = {}, dict[Any, torch.Tensor]()
    for layer, group in groups_of(loaded):
        modules = [resolve(loaded.layers[layer], path) for path in loaded.family.input_groups[group]]
        norms[layer, group] = torch.cat([module.weight.detach() for module in modules]).norm(dim=0)

    def see(layer: int, group: str, entering: Any) -> None:
        scores[layer, group] = entering.scores(norms[layer, group])

    with inputs_seen(loaded, see), torch.no_grad():
        loaded.read(torch.tensor([documents()[1].token_ids]), DynamicCache())
    limits = {place: (float(found.median()),) * 2 for place, found in scores.items()}

    def reading(cluster: int) -> AbstractContextManager[None]:
        # Packs have other neurons: their down projections read all.
        del cluster
        own = {place: pair for place, pair in limits.items() if place[1] != "down"}
        return inputs_taken(loaded, norms, own, {})

    return reading


@torch.no_grad()
def shared_kl(inputs: HealInputs, narrow: NarrowModel, reading: Reading) -> float:
    """Mean KL of second halves that are read with fewer inputs, after first halves of the dense model."""
    loaded, found = inputs.loaded, []
    for document, cluster in zip(inputs.documents, inputs.labels.tolist(), strict=False):
        ids, cache = torch.tensor([document.token_ids]), DynamicCache()
        start = split_point(ids.shape[1])
        loaded.read(ids[:, :start], cache)
        dense = loaded.head(loaded.states(ids[:, start:], cache))[0].log_softmax(-1)
        cache.crop(start - ids.shape[1])
        with ffn_in_use(loaded, partial(narrow_layer, loaded, narrow), cluster), reading(cluster):
            own = loaded.head(loaded.states(ids[:, start:], cache))[0].log_softmax(-1)
        found.append(float(kl_div(own, dense, log_target=True, reduction="batchmean")))
    return float(np.mean(found))


@pytest.mark.parametrize("name", UNLIKE)
def test_healing_with_inputs_left_out_lowers_what_their_tokens_lose(name: str) -> None:
    inputs = heal_inputs(load(name), heal_steps=80)
    reading = half_read(inputs.loaded)
    before = shared_kl(inputs, inputs.narrow, reading)
    knowing = heal(replace(inputs, reading=reading), Cache(None), "key", Progress())
    unknowing = heal(inputs, Cache(None), "key", Progress())
    after = shared_kl(inputs, knowing, reading)
    assert after < 0.9 * before
    # It is better at what it was trained for than what was trained with all inputs.
    assert after < shared_kl(inputs, unknowing, reading)


def test_gradients_pass_what_is_read_alone() -> None:
    inputs = heal_inputs(load("llama"), heal_steps=3)
    cut_off = {place: (np.inf, np.inf) for place in groups_of(inputs.loaded) if place == (1, "gate_up")}
    norms = {(1, "gate_up"): torch.ones(inputs.loaded.record.hidden_size)}
    nothing = replace(inputs, reading=lambda _: inputs_taken(inputs.loaded, norms, cut_off, {}))
    healed = heal(nothing, Cache(None), "key", Progress())
    for cluster in (0, 1):
        for layer in range(inputs.loaded.record.num_layers):
            before, after = (narrow_layer(inputs.loaded, each, layer, cluster) for each in (inputs.narrow, healed))
            # A down projection after gates of 0 has nothing to learn from either.
            for role in ("gate", "up", "down"):
                assert torch.equal(before[role].bfloat16(), after[role].bfloat16()) == (layer == 1)


@pytest.mark.parametrize(
    ("before", "after", "is_kept"),
    [
        ((0.20, 0.10), (0.15, 0.08), True),
        ((0.20, 0.10), (0.15, 0.14), True),
        ((0.20, 0.10), (0.15, 0.16), False),
        ((0.20, 0.10), (0.20, 0.08), False),
        ((0.20, 0.10), (0.25, 0.05), False),
        ((0.20, 0.10), (np.nan, np.nan), False),
    ],
)
def test_what_is_healed_is_kept_only_if_validation_text_gains(
    before: tuple[float, float], after: tuple[float, float], is_kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    found = gains(*(Divergence(shared=shared, whole=whole) for shared, whole in (before, after)))
    assert found is is_kept
    assert ("healing is left out: KL on validation text" in caplog.text) is not is_kept


def tensors_of(file: Mapping[str, StoredTensor]) -> dict[str, Any]:
    return {name: file[name].array for name in file}


def changed(first: Mapping[str, StoredTensor] | None, second: Mapping[str, StoredTensor] | None) -> set[str]:
    """Names of tensors that differ."""
    assert first is not None
    assert second is not None
    own, other = tensors_of(first), tensors_of(second)
    assert own.keys() == other.keys()
    return {name for name in own if not np.array_equal(own[name], other[name])}


@pytest.mark.parametrize("options", [{}, {"quantize": "int4"}])
def test_a_bundle_has_healed_packs_and_their_thresholds(
    options: dict[str, Any], tiny_bundle: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    healed = open_bundle(tiny_bundle("llama", **{**SHARED, "heal_steps": 60, "heal_rate": 0.004, **options}))
    plain = open_bundle(tiny_bundle("llama", **{**SHARED, "heal_steps": 0, **options}))
    found = re.findall(r"KL on validation text ([\d.]+) before, ([\d.]+) after, at share 1", caplog.text)
    if found:  # Else another test has compiled it.
        assert float(found[0][1]) < float(found[0][0])
    for cluster in range(len(plain.packs)):
        roles = {name.rsplit(".", 1)[-1] for name in changed(plain.pack(cluster), healed.pack(cluster))}
        assert roles & {"gate", "q4"}
    # What is of the dense FFN, or of all, stays.
    clusters = {f"thresholds.{cluster}" for cluster in range(len(plain.packs))}
    assert changed(plain.token_shares, healed.token_shares) == clusters
    for file in ("base", "dense"):
        assert not changed(getattr(plain, file), getattr(healed, file))


def test_healing_that_other_text_rejects_leaves_packs_and_thresholds(
    tiny_bundle: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    plain = open_bundle(tiny_bundle("llama", **{**SHARED, "heal_steps": 0}))
    rejected = open_bundle(tiny_bundle("llama", **{**SHARED, "heal_rate": 30.0}))
    assert "healing is left out: KL on validation text" in caplog.text
    assert not changed(plain.token_shares, rejected.token_shares)
    for cluster in range(len(plain.packs)):
        assert not changed(plain.pack(cluster), rejected.pack(cluster))


class Interrupted(Progress):
    """Gives up after some steps of healing."""

    def bar(self, name: str, num_steps: int) -> Any:
        return interrupt_after(5) if name == "heal" else super().bar(name, num_steps)


def test_an_interrupted_compile_heals_on_from_its_checkpoint(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coreinfer.compiler.prune.heal._CHECKPOINT_STEPS", 4)
    config = replace(tiny_inputs("llama"), **SHARED)
    for name, progress in (("whole", Progress()), ("resumed", Interrupted())):
        own = replace(config, cache_dir=tmp_path / f"{name}-cache", output=tmp_path / name)
        if name == "resumed":
            with pytest.raises(KeyboardInterrupt):
                compile_model(own, progress)
            progress = Progress()
        compile_model(own, progress)
    # Neither packs nor thresholds that came before are made again.
    assert "reconstruct" not in progress.stage_seconds
    whole, resumed = (read_manifest(tmp_path / name) for name in ("whole", "resumed"))
    assert {name: file.sha256 for name, file in whole.files.items() if "report" not in name} == {
        name: file.sha256 for name, file in resumed.files.items() if "report" not in name
    }


def test_another_share_is_another_healing(tmp_path: Path, tiny_inputs: Callable[[str], CompileConfig]) -> None:
    config = replace(tiny_inputs("llama"), **SHARED, cache_dir=tmp_path / "cache")
    # The last one is another bundle, whose packs were healed before.
    for share, evaluate, heals in ((SHARE, False, True), (0.8, False, True), (SHARE, True, False)):
        progress, output = Progress(), tmp_path / f"{share}-{evaluate}"
        compile_model(replace(config, token_share=share, evaluate=evaluate, output=output), progress)
        assert ("heal" in progress.stage_seconds) is heals
        assert ("shares" in progress.stage_seconds) is heals


def test_a_share_that_is_found_is_found_again_for_healed_packs(tiny_bundle: Callable[..., Path]) -> None:
    options = {**SHARED, "token_share": "auto", "max_kl": 2.0, "heal_steps": 20, "heal_rate": 0.012}
    plain, healed = (read_manifest(tiny_bundle("llama", **{**options, **own})) for own in ({"heal_steps": 0}, {}))
    assert plain.token_shares is not None
    assert healed.token_shares is not None
    assert np.mean(healed.token_shares.clusters) <= np.mean(plain.token_shares.clusters)
    assert healed.token_shares.default == plain.token_shares.default


def test_best_effort_heals_with_token_shares() -> None:
    assert make_config(effort="best", token_share=SHARE).heals
    assert not make_config(effort="best", token_share=SHARE, packs="thin").heals


@pytest.mark.parametrize("name", ["heal_steps", "heal_cluster_steps"])
def test_thin_clusters_are_not_healed(name: str) -> None:
    switch = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"{switch}: thin clusters decode with the weights of prompts"):
        make_config(token_share=SHARE, packs="thin", **{name: 3})


def test_healed_weights_are_the_same_each_time() -> None:
    inputs = heal_inputs(load("llama"), heal_steps=4)
    inputs = replace(inputs, reading=half_read(inputs.loaded), labels=CLUSTERS)
    first, second = (heal(inputs, Cache(None), "key", Progress()) for _ in range(2))
    for one, other in zip(bits(first), bits(second), strict=True):
        np.testing.assert_array_equal(one, other)
