"""Every family, compiled from a tiny random model and run by the torch engine."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.families import family_of_config, resolve
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice

from .model_factory import FAMILIES, build_model

TOKEN_IDS = [1, 57, 200, 300, 21, 99, 140, 7, 250, 33, 180, 77, 310, 64, 205, 18, 91, 120, 260, 45, 150, 11]
"""Longer than the sliding windows of the tiny models."""


def tolerance(family: str) -> float:
    """Of logits in float32; a bundle of gemma3n has a matrix that transformers has not, in bfloat16."""
    return 2e-3 if family == "gemma3n" else 2e-4


def reference_logits(family: str, *, keep: list[np.ndarray] | None = None) -> np.ndarray:
    """Logits of transformers' own model; with `keep`, all activations but those of the kept neurons are zeroed."""
    model = build_model(family)
    row = family_of_config(model.config.to_dict(), family)
    for layer, ids in zip(resolve(model, row.layers), keep or (), strict=keep is not None):
        mask = torch.zeros(96)
        mask[ids.tolist()] = 1
        resolve(layer, row.down).register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,))
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([TOKEN_IDS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_one_gives_the_dense_logits(family: str, tiny_bundle: Callable[..., Path]) -> None:
    engine = runtime.load(tiny_bundle(family, keep=1.0, clusters=2), device="cpu", dtype="float32")
    expected = reference_logits(family)
    engine.decoder.use(DENSE)
    got = engine.decoder.forward(TOKEN_IDS, all_logits=True)
    np.testing.assert_allclose(got, expected, atol=tolerance(family), rtol=1e-4)
    for cluster in range(len(engine.manifest.clusters)):
        engine.decoder.truncate(0)
        engine.decoder.use(FfnChoice(cluster=cluster))
        # The repair of a whole layer gives its own weights again, up to bfloat16 rounding.
        got = engine.decoder.forward(TOKEN_IDS, all_logits=True)
        np.testing.assert_allclose(got, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_packs_decode_with_their_neurons_only(family: str, tiny_bundle: Callable[..., Path]) -> None:
    engine = runtime.load(tiny_bundle(family, reconstruct=False), device="cpu", dtype="float32")
    for cluster, pack in enumerate(engine.bundle.packs):
        keep = [pack[tensor_name(layer, "neuron_ids")].array for layer in range(3)]
        assert [len(ids) for ids in keep] == [64, 64, 64]
        engine.decoder.truncate(0)
        engine.decoder.use(FfnChoice(cluster=cluster))
        got = engine.decoder.forward(TOKEN_IDS, all_logits=True)
        expected = reference_logits(family, keep=keep)
        np.testing.assert_allclose(got, expected, atol=tolerance(family), rtol=1e-4)
        assert np.abs(expected - reference_logits(family)).max() > 0.1
        engine.decoder.truncate(0)
        engine.decoder.use(FfnChoice(neuron_ids=tuple(keep)))
        np.testing.assert_allclose(engine.decoder.forward(TOKEN_IDS, all_logits=True), got, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_equals_all_at_once(family: str, tiny_bundle: Callable[..., Path]) -> None:
    engine = runtime.load(tiny_bundle(family), device="cpu", dtype="float32")
    engine.decoder.use(FfnChoice(cluster=0))
    at_once = engine.decoder.forward(TOKEN_IDS, all_logits=True)
    engine.decoder.truncate(5)
    assert engine.decoder.num_cached == 5
    rows = [engine.decoder.forward([token_id])[0] for token_id in TOKEN_IDS[5:]]
    np.testing.assert_allclose(np.stack(rows), at_once[5:], atol=2e-4, rtol=1e-4)
