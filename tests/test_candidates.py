from dataclasses import replace

import numpy as np
import pytest
import torch
from coreinfer.bundles.families import family_of_config, ffn_tensors
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.prune.candidates import cut_to_candidates, layer_candidates, positions_in
from coreinfer.compiler.prune.select import Choice
from coreinfer.compiler.prune.sensitivity import RemovalCurves
from coreinfer.compiler.samples import num_candidates

from .model_factory import FAMILIES, build_model, build_tokenizer
from .test_config import make_config

CONFIG = make_config(removal="second-order", carry=True)


def load(name: str) -> LoadedModel:
    model = build_model(name)
    family = family_of_config(model.config.to_dict(), name)
    return wrap_model(model, build_tokenizer(), family=family, name=name, config=model.config)


def curves() -> RemovalCurves:
    generator = np.random.default_rng(0)
    order = np.stack([generator.permutation(1024) for _ in range(3)]).astype(np.int32)
    return RemovalCurves(costs=np.zeros((3, 33), np.float32), order=order)


def choices(scores: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> dict[str, Choice]:
    return {"a": Choice(scores=scores, neuron_ids=[])}


def test_candidates_are_what_goes_last_where_scores_say_nothing_else() -> None:
    own = curves()
    # By scores all go as they do by all text.
    scores = np.argsort(own.order, axis=1).astype(np.float32)[None]
    found = layer_candidates(CONFIG, load("llama"), own, choices(scores), {"a": [[320, 896, 32], [64, 64, 64]]})
    assert found[1] is None
    for layer, kept in ((0, 320), (2, 64)):
        ids = found[layer]
        assert ids is not None
        assert len(ids) == num_candidates(kept, 1024)
        assert ids.tolist() == sorted(own.order[layer, -len(ids) :].tolist())


def test_a_cluster_that_scores_a_neuron_high_makes_it_a_candidate() -> None:
    own, budgets = curves(), {"a": [[64] * 3] * 2}
    scores = np.tile(np.argsort(own.order, axis=1).astype(np.float32), (2, 1, 1))
    # It goes when 300 others have gone, which is too early by all text.
    wanted = own.order[1, 300]
    before = layer_candidates(CONFIG, load("llama"), own, choices(scores), budgets)[1]
    scores[1, 1, wanted] = 1e6
    after = layer_candidates(CONFIG, load("llama"), own, choices(scores), budgets)[1]
    assert before is not None
    assert after is not None
    assert wanted not in before
    assert wanted in after
    assert len(before) == len(after)


@pytest.mark.parametrize("options", [{"carry": False}, {"removal": "top-k"}])
def test_without_carrying_or_removal_there_are_none(options: dict[str, object]) -> None:
    config, given = replace(CONFIG, **options), choices(np.ones((1, 3, 1024), np.float32))  # type: ignore[arg-type]
    assert layer_candidates(config, load("llama"), curves(), given, {"a": [[32] * 3]}) == ()
    assert layer_candidates(CONFIG, load("llama"), None, given, {"a": [[32] * 3]}) == ()


def test_there_are_more_candidates_than_are_kept() -> None:
    for ffn_dim in (64, 96, 1000, 1536, 11_008):
        for kept in range(32, ffn_dim, 32):
            number = num_candidates(kept, ffn_dim)
            assert kept < number <= ffn_dim
            assert number == ffn_dim or number % 32 == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_cutting_to_candidates_is_undone(name: str) -> None:
    loaded, ids = load(name), np.array([3, 40, 90], dtype=np.int32)
    before = dict(ffn_tensors(loaded.layers[1], loaded.family))
    with cut_to_candidates(loaded, 1, ids):
        inside = dict(ffn_tensors(loaded.layers[1], loaded.family))
        assert torch.equal(inside["up"], before["up"][ids])
        assert inside["down"].data_ptr() == before["down"].data_ptr()
    after = ffn_tensors(loaded.layers[1], loaded.family)
    assert all(after[role].data_ptr() == tensor.data_ptr() for role, tensor in before.items())


def test_positions_are_those_among_candidates() -> None:
    assert positions_in(np.array([2, 5, 9], np.int32), np.array([5, 9], np.int32)).tolist() == [1, 2]
    assert positions_in(None, np.array([5, 9], np.int32)).tolist() == [5, 9]
