from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from coreinfer.bundles.families import family_of_config
from coreinfer.compiler.models import layerwise
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.models.walking import walk_layers
from coreinfer.compiler.text.corpus import Document

from .model_factory import FAMILIES, VOCABULARY, build_model, build_tokenizer

LENGTHS = (8, 40, 23, 40, 9, 64, 31)
"""Documents of like and of unlike lengths, shorter and longer than the sliding windows of the tiny models."""


@pytest.fixture(scope="module")
def load() -> Callable[[str], LoadedModel]:
    loaded: dict[str, LoadedModel] = {}

    def load_family(name: str) -> LoadedModel:
        if name not in loaded:
            model = build_model(name)
            row = family_of_config(model.config.to_dict(), name)
            loaded[name] = wrap_model(model, build_tokenizer(), family=row, name=name, config=model.config)
        return loaded[name]

    return load_family


def documents_of(lengths: Sequence[int]) -> list[Document]:
    generator = np.random.default_rng(0)
    ids = [tuple(generator.integers(3, VOCABULARY, length).tolist()) for length in lengths]
    return [Document(text="", routing_text="", token_ids=token_ids) for token_ids in ids]


@contextmanager
def recorded(loaded: LoadedModel, layer: int) -> Iterator[dict[str, torch.Tensor]]:
    """What hooks see of a layer while the whole model runs."""
    seen: dict[str, torch.Tensor] = {}

    def keep_input(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        seen["activations"] = inputs[0].reshape(-1, inputs[0].shape[-1])

    def keep_output(module: object, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # Of several streams the first is the one that layers compute with.
        hidden = hidden[0] if hidden.ndim == 4 else hidden
        seen["energies"] = hidden.reshape(-1, hidden.shape[-1]).square().sum(dim=-1)

    with ExitStack() as stack:
        stack.callback(loaded.projection(layer, "down").register_forward_pre_hook(keep_input).remove)
        stack.callback(loaded.layers[layer].register_forward_hook(keep_output).remove)
        yield seen


def check_all_layers(loaded: LoadedModel, documents: list[Document]) -> None:
    steps: list[int] = []
    layers = 0
    for layer in walk_layers(loaded, documents, lambda steps_done=1: steps.append(steps_done)):
        assert layer.layer == layers == len(steps)
        layers += 1
        assert np.diff(layer.starts).tolist() == [len(document.token_ids) for document in documents]
        for index, document in enumerate(documents):
            with recorded(loaded, layer.layer) as seen, torch.inference_mode():
                loaded.model(torch.tensor([document.token_ids]))
            tokens = slice(layer.starts[index], layer.starts[index + 1])
            torch.testing.assert_close(layer.document(index), seen["activations"], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(layer.stream_energies[tokens], seen["energies"], atol=1e-3, rtol=1e-4)
    assert layers == len(steps) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_see_what_hooks_on_the_whole_model_see(family: str, load: Callable[[str], LoadedModel]) -> None:
    loaded = load(family)
    tokens = torch.arange(3, 43)[None]
    names = [name for name, _ in loaded.model.named_modules()]
    with torch.inference_mode():
        before = loaded.model(tokens).logits
        check_all_layers(loaded, documents_of(LENGTHS))
        assert torch.equal(loaded.model(tokens).logits, before)
    assert [name for name, _ in loaded.model.named_modules()] == names
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


@pytest.mark.parametrize("batch_tokens", [1, 70, 100])
def test_batches_do_not_matter(
    batch_tokens: int, load: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_BATCH_TOKENS", batch_tokens)
    check_all_layers(load("mistral"), documents_of(LENGTHS))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_exception_leaves_the_model_as_it_was(family: str, load: Callable[[str], LoadedModel]) -> None:
    loaded, names = load(family), [name for name, _ in load(family).model.named_modules()]
    too_large = [Document(text="", routing_text="", token_ids=(VOCABULARY,) * 8)]
    with pytest.raises(IndexError):
        next(walk_layers(loaded, too_large, lambda steps=1: None))
    assert [name for name, _ in loaded.model.named_modules()] == names
    check_all_layers(loaded, documents_of((8, 10)))
