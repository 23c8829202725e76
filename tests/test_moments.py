"""Second moments of the inputs of linear layers, against hooks on a whole pass."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from coreinfer.bundles.families import family_of_config
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.quantize.moments import input_moments
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document, spread_sample

from .model_factory import SHAPES, VOCABULARY, build_model, build_tokenizer


def load(name: str) -> LoadedModel:
    model = build_model(name)
    row = family_of_config(model.config.to_dict(), name)
    return wrap_model(model, build_tokenizer(), family=row, name=name, config=model.config)


def documents_of(lengths: Sequence[int]) -> list[Document]:
    generator = np.random.default_rng(0)
    ids = [tuple(generator.integers(3, VOCABULARY, length).tolist()) for length in lengths]
    return [Document(text="", routing_text="", token_ids=token_ids) for token_ids in ids]


@pytest.mark.parametrize("family", SHAPES)
def test_moments_are_means_over_all_tokens(family: str) -> None:
    loaded, documents = load(family), documents_of([9, 30, 4])
    got = input_moments(Alone(loaded), documents, Cache(None), "key", Progress())
    projections = loaded.family.projections.values()
    expected = {f"{loaded.family.layers}.{layer}.{path}" for layer in range(3) for path in projections}
    assert expected < set(got)
    assert any("self_attn" in path for path in got)
    down = f"{loaded.family.layers}.2.{loaded.family.down}"
    inputs: list[torch.Tensor] = []
    module = loaded.projection(2, "down")
    with torch.inference_mode():
        handle = module.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
        for document in documents:
            loaded.model(torch.tensor([document.token_ids]))
        handle.remove()
    flat = torch.cat([batch.reshape(-1, 96) for batch in inputs])
    assert len(flat) == 43
    torch.testing.assert_close(got[down], flat.square().mean(dim=0))
    assert not any(part._forward_pre_hooks for part in loaded.model.modules())


def test_moments_are_kept(tmp_path: Path) -> None:
    loaded, progress = load("llama"), Progress()
    first = input_moments(Alone(loaded), documents_of([20]), Cache(tmp_path), "key", Progress())
    again = input_moments(Alone(loaded), documents_of([20]), Cache(tmp_path), "key", progress)
    assert not progress.stage_seconds
    assert first.keys() == again.keys()
    assert all(torch.equal(first[path], again[path]) for path in first)


@pytest.mark.parametrize("num_documents", [6, 9, 19, 30])
def test_as_much_text_is_taken_as_was_asked_for_and_from_all_of_it(num_documents: int) -> None:
    documents = documents_of([20] * num_documents)
    taken = spread_sample(documents, 100)
    assert sum(len(document.token_ids) for document in taken) == 100
    assert taken[0] is documents[0]
    steps = np.diff([documents.index(document) for document in taken])
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1


def test_all_text_is_taken_where_there_is_less_than_asked_for() -> None:
    documents = documents_of([20] * 3)
    assert spread_sample(documents, 100) == documents
