import copy
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles.families import cache_argument, family_of_config, ffn_tensors
from coreinfer.bundles.manifest import Quality
from coreinfer.compiler import Progress
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.prune.narrow import Cut, NarrowModel, bf16_bits, narrow_layer
from coreinfer.compiler.prune.select import Choice
from coreinfer.compiler.quality.reference import read_reference
from coreinfer.compiler.quality.score import evaluate
from coreinfer.compiler.quality.tally import Tally, compare_logits
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import split_point
from transformers import DynamicCache

from .model_factory import VOCABULARY, build_model, build_tokenizer

LENGTHS = (20, 9, 33, 16, 41)
FFN_DIM = 96
FAMILIES = ["llama", "opt", "mistral", "gemma3"]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return load(request.param)


def load(name: str) -> LoadedModel:
    model = build_model(name)
    family = family_of_config(model.config.to_dict(), name)
    return wrap_model(model, build_tokenizer(), family=family, name=name, config=model.config)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    generator = np.random.default_rng(2)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]


def narrow_model(kept: Sequence[Sequence[int]], *, repaired: bool = False) -> NarrowModel:
    """One cluster for each list of kept neurons, the same in all three layers."""
    ids = [[np.array(neurons, dtype=np.int32)] * 3 for neurons in kept]
    generator = torch.Generator().manual_seed(5)
    downs = [
        [bf16_bits(0.25 * torch.randn(len(neurons), 32, generator=generator)) if repaired else None for neurons in kept]
        for _ in range(3)
    ]
    scores = np.ones((len(kept), 3, FFN_DIM), dtype=np.float32)
    return NarrowModel(
        choice=Choice(scores=scores, neuron_ids=ids), downs=downs, biases=[[None] * len(kept)] * 3, ridges=(None,) * 3
    )


def _cut(loaded: LoadedModel, narrow: NarrowModel) -> Cut:
    return partial(narrow_layer, loaded, narrow)


def run(
    loaded: LoadedModel, texts: list[list[int]], narrow: NarrowModel, labels: Sequence[int], **controls: NarrowModel
) -> Quality:
    clusters: npt.NDArray[np.int64] = np.array(labels)
    models = {name: (partial(_cut, narrow=model), clusters) for name, model in {"clusters": narrow, **controls}.items()}
    team = Alone(loaded)
    with read_reference(team, texts, Progress()) as reference:
        return evaluate(team, reference, models, Progress())


def test_a_place_reads_texts_of_its_own_clusters_where_these_are_known(texts: list[list[int]]) -> None:
    labels = np.arange(len(texts)) % 3
    team = Alone(load("llama"), 3)
    with read_reference(team, texts, Progress(), None, labels) as reference:
        clusters = [{int(labels[number]) for number in numbers} for numbers in reference.numbers.values()]
    assert sorted(number for numbers in reference.numbers.values() for number in numbers) == [*range(len(texts))]
    # Each cut between two places is through one cluster at most.
    assert sum(map(len, clusters)) <= 3 + len(clusters) - 1


def naive_narrow(loaded: LoadedModel, narrow: NarrowModel, cluster: int) -> torch.nn.Module:
    """A copy of the model whose dropped neurons are silent, and whose down projection is the repaired one."""
    model = copy.deepcopy(loaded.model)
    twin = wrap_model(
        model,
        loaded.tokenizer,
        family=loaded.family,
        name="twin",
        config=model.config,  # type: ignore[arg-type]
    )
    for layer in range(3):
        ids = narrow.choice.neuron_ids[cluster][layer].tolist()
        weight = torch.zeros(32, FFN_DIM)
        bits = narrow.downs[layer][cluster]
        down = twin.projection(layer, "down").weight.data
        weight[:, ids] = (
            down[:, ids] if bits is None else torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).T.float()
        )
        twin.projection(layer, "down").weight.data = weight
    return model


def naive_tally(loaded: LoadedModel, texts: list[list[int]], narrow: NarrowModel, labels: Sequence[int]) -> Tally:
    """Dense prefill of the first half into a fresh cache, then the narrow model on the second half."""
    total = Tally()
    for number, (ids, label) in enumerate(zip(texts, labels, strict=True)):
        half = len(ids) // 2
        with torch.inference_mode():
            dense = loaded.model(torch.tensor([ids]), use_cache=False).logits[0].double()
            cache = DynamicCache()
            loaded.model(torch.tensor([ids[:half]]), **cache_argument(loaded.model, cache), use_cache=True)
            model = naive_narrow(loaded, narrow, label)
            decoded = (
                model(torch.tensor([ids[half:]]), **cache_argument(model, cache), use_cache=True).logits[0].double()
            )
        for position in range(half, len(ids) - 1):
            p, q = dense[position].softmax(-1), decoded[position - half].softmax(-1)
            total.kl += float((p * (p.log() - q.log())).sum())
            total.nll -= float(q[ids[position + 1]].log())
            total.agreements += int(p.argmax() == q.argmax())
            total.num_tokens += 1
        total.texts.add(number)
    return total


def test_all_neurons_cost_nothing(loaded: LoadedModel, texts: list[list[int]]) -> None:
    quality = run(loaded, texts, narrow_model([range(FFN_DIM)]), [0] * len(texts))
    assert quality.clusters.kl == pytest.approx(0, abs=2e-5)
    assert quality.clusters.top1 == 1
    assert quality.clusters.perplexity == pytest.approx(quality.dense.perplexity, rel=1e-4)


@pytest.mark.parametrize("repaired", [False, True])
def test_the_protocol_equals_a_naive_one(repaired: bool, loaded: LoadedModel, texts: list[list[int]]) -> None:
    labels = [0, 1, 1, 0, 1]
    narrow = narrow_model([range(0, 96, 2), range(10, 74)], repaired=repaired)
    # The control decodes after the clusters, from the same dense first halves.
    control = narrow_model([range(50), range(1, 96, 2)])
    quality = run(loaded, texts, narrow, labels, control=control)
    for score, model in ((quality.clusters, narrow), (quality.controls[0], control)):
        expected = naive_tally(loaded, texts, model, labels).score(score.name)
        assert score.kl == pytest.approx(expected.kl, rel=1e-3)
        assert score.perplexity == pytest.approx(expected.perplexity, rel=1e-3)
        assert score.top1 == expected.top1
        assert (score.num_texts, score.num_tokens) == (expected.num_texts, expected.num_tokens)
        assert score.kl > 0.1


def test_each_cluster_and_control_counts_its_own_texts(texts: list[list[int]]) -> None:
    loaded, labels = load("llama"), [0, 2, 2, 0, 2]
    narrow = narrow_model([range(64), range(32), range(32, 96)])
    quality = run(loaded, texts, narrow, labels, random=narrow_model([range(5), range(5), range(5)]))
    assert [entry.cluster for entry in quality.per_cluster] == [0, 2]
    for entry in quality.per_cluster:
        own = [text for text, label in zip(texts, labels, strict=True) if label == entry.cluster]
        alone = naive_tally(loaded, own, narrow, [entry.cluster] * len(own)).score(f"cluster {entry.cluster}")
        assert entry.score.kl == pytest.approx(alone.kl, rel=1e-3)
        assert (entry.score.num_texts, entry.score.num_tokens) == (len(own), alone.num_tokens)
    assert [score.name for score in quality.controls] == ["random"]
    assert quality.controls[0].kl != quality.clusters.kl


def test_dense_perplexity_equals_a_direct_computation(loaded: LoadedModel, texts: list[list[int]]) -> None:
    quality = run(loaded, texts, narrow_model([range(32)]), [0] * len(texts))
    losses: list[float] = []
    for ids in texts:
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([ids])).logits[0, :-1]
        per_token = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        losses += per_token[split_point(len(ids)) :].tolist()
    assert quality.dense.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert quality.dense.num_tokens == len(losses)
    assert (quality.dense.kl, quality.dense.top1) == (0, 1)


def weights_of(loaded: LoadedModel) -> list[torch.Tensor]:
    return [tensor for layer in loaded.layers for tensor in ffn_tensors(layer, loaded.family).values()]


def test_weights_come_back(loaded: LoadedModel, texts: list[list[int]]) -> None:
    before = weights_of(loaded)
    copies = [tensor.clone() for tensor in before]
    run(loaded, texts, narrow_model([range(40)], repaired=True), [0] * len(texts))
    after = weights_of(loaded)
    assert [tensor.data_ptr() for tensor in after] == [tensor.data_ptr() for tensor in before]
    assert all(torch.equal(old, new) for old, new in zip(copies, after, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_weights_come_back_after_an_exception(error: type[BaseException], loaded: LoadedModel) -> None:
    before = [tensor.clone() for tensor in weights_of(loaded)]

    def fail(module: torch.nn.Linear, _inputs: object) -> None:
        assert module.weight.shape == (32, 40)
        raise error

    handle = loaded.projection(2, "down").register_forward_pre_hook(fail)
    with pytest.raises(error), ffn_in_use(loaded, partial(narrow_layer, loaded, narrow_model([range(40)])), 0):
        loaded.model(torch.tensor([[5, 6]]))
    handle.remove()
    assert all(torch.equal(old, new) for old, new in zip(before, weights_of(loaded), strict=True))


def test_weights_come_back_when_narrowing_itself_fails(loaded: LoadedModel) -> None:
    narrow = narrow_model([range(40)])
    narrow.choice.neuron_ids[0][2] = np.array([FFN_DIM], dtype=np.int32)
    before = [tensor.clone() for tensor in weights_of(loaded)]
    # Layer 2 has no such neuron.
    with pytest.raises(IndexError), ffn_in_use(loaded, partial(narrow_layer, loaded, narrow), 0):
        loaded.model(torch.tensor([[5, 6]]))
    assert all(torch.equal(old, new) for old, new in zip(before, weights_of(loaded), strict=True))


def test_compared_logits() -> None:
    dense = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]])
    narrow = torch.zeros(2, 2)
    tally = compare_logits(dense, narrow, torch.tensor([0, 0]), text=7)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert tally.kl == pytest.approx(2 * kl)
    assert tally.nll == pytest.approx(2 * math.log(2))
    assert (tally.agreements, tally.num_tokens, tally.texts) == (1, 2, {7})
    other = compare_logits(dense, dense, torch.tensor([1, 1]), text=8)
    assert other.nll == pytest.approx(-math.log(0.75) - math.log(0.25))
    tally.add(other)
    score = tally.score("both")
    assert score.kl == pytest.approx(kl / 2, abs=1e-5)
    assert (score.top1, score.num_texts, score.num_tokens) == (0.75, 2, 4)
    assert score.perplexity == pytest.approx(math.exp(tally.nll / 4), abs=1e-4)


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    logits = torch.tensor([[0.0, 5000.0]])
    score = compare_logits(logits, logits, torch.tensor([0]), text=0).score("hopeless")
    assert math.isfinite(score.perplexity)
