from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from coreinfer.bundles import open_bundle
from coreinfer.bundles.families import ffn_tensors
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.clusters.route import Routing
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune import heal as healing
from coreinfer.compiler.prune.heal import HealInputs, heal, healing_text
from coreinfer.compiler.prune.narrow import NarrowModel, narrow_layer
from coreinfer.compiler.quality.reference import read_reference
from coreinfer.compiler.quality.score import evaluate
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Corpus
from torch.nn.functional import kl_div
from transformers import DynamicCache

from .model_factory import SHAPES, UNLIKE
from .test_carrying import CLUSTERS, documents, inputs_of, load, run
from .test_config import make_config


def heal_inputs(loaded: LoadedModel, **options: Any) -> HealInputs:
    inputs = inputs_of(loaded)
    return HealInputs(
        config=make_config(**{"heal_steps": 60, "heal_rate": 0.012, **options}),
        loaded=loaded,
        documents=inputs.calibration,
        labels=CLUSTERS,
        narrow=run(inputs)["clusters"],
    )


def kl(loaded: LoadedModel, narrow: NarrowModel) -> float:
    texts = [document.token_ids for document in documents()[:6]]
    team, cut = Alone(loaded), partial(narrow_layer, loaded, narrow)
    with read_reference(team, texts, Progress()) as reference:
        return evaluate(team, reference, {"clusters": (lambda _: cut, CLUSTERS)}, Progress()).clusters.kl


def bits(narrow: NarrowModel) -> list[np.ndarray[Any, Any]]:
    assert narrow.inner is not None
    inner = [array for layer in narrow.inner for roles in layer for array in roles.values()]
    return inner + [down for layer in narrow.downs for down in layer if down is not None]


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "adamw") for name in SHAPES), *((name, "muon") for name in UNLIKE)]
)
def test_healing_lowers_the_divergence_on_its_own_text(name: str, optimizer: str) -> None:
    inputs = heal_inputs(load(name), heal_optimizer=optimizer, heal_steps=80)
    before = kl(inputs.loaded, inputs.narrow)
    healed = heal(inputs, Cache(None), "key", Progress())
    assert kl(inputs.loaded, healed) < 0.8 * before
    assert healed.choice is inputs.narrow.choice
    shapes = {role: tuple(t.shape) for role, t in narrow_layer(inputs.loaded, healed, 0, 1).items()}
    assert shapes == {role: tuple(t.shape) for role, t in narrow_layer(inputs.loaded, inputs.narrow, 0, 1).items()}


@pytest.mark.parametrize("name", SHAPES)
def test_states_and_head_are_the_forward_pass(name: str) -> None:
    loaded, token_ids = load(name), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        expected = loaded.forward(token_ids, DynamicCache())
        torch.testing.assert_close(loaded.head(loaded.states(token_ids, DynamicCache())), expected)


@pytest.mark.parametrize("num_tokens", [1, 128, 129, 300])
def test_the_gradient_is_that_of_the_divergence(num_tokens: int) -> None:
    loaded = load("llama")
    narrow, dense = (torch.randn(num_tokens, loaded.record.hidden_size) for _ in range(2))
    got = healing._gradient(loaded, narrow, dense)
    leaf = narrow.requires_grad_()
    logs = [loaded.head(states).log_softmax(dim=-1) for states in (leaf, dense)]
    kl_div(logs[0], logs[1].detach(), log_target=True, reduction="batchmean").backward()
    torch.testing.assert_close(got, leaf.grad)


@pytest.mark.parametrize("name", UNLIKE)
def test_steps_of_each_clusters_own_lower_it_too(name: str) -> None:
    inputs = heal_inputs(load(name), heal_steps=0, heal_cluster_steps=40)
    progress = Progress()
    healed = heal(inputs, Cache(None), "key", progress)
    assert kl(inputs.loaded, healed) < 0.8 * kl(inputs.loaded, inputs.narrow)
    assert list(progress.stage_seconds) == ["heal clusters"]


def test_a_step_is_as_large_as_the_rate_says_beside_each_matrix() -> None:
    loaded = load("llama")
    with torch.no_grad():
        loaded.projection(1, "gate").weight.mul_(20)
    inputs = heal_inputs(loaded, heal_steps=1, heal_rate=0.01)
    course = healing._Course(inputs=inputs, cluster=None, num_steps=1, key="key")
    for name, change in healing._train(course, Cache(None), lambda *_: None).items():
        layer, role = name.split(".")
        rms = loaded.projection(int(layer), role).weight.square().mean().sqrt()
        # AdamW's first step is of one size in every direction.
        assert float(change.detach().abs().max()) == pytest.approx(0.01 * float(rms), rel=0.01)


def healing_corpus(num_spare: int) -> Corpus:
    calibration = tuple(documents())
    spare = tuple(replace(calibration[0], text=f"spare {index}", token_ids=(1,) * 1024) for index in range(num_spare))
    return Corpus(calibration=calibration, validation=(), held_out=(), sha256="", spare=spare)


def healing_routing() -> Routing:
    """Routes spare text to cluster 1, whatever it says."""
    encoder = SimpleNamespace(embed=lambda texts: np.ones((len(texts), 2), dtype=np.float32))
    return cast(
        "Routing",
        SimpleNamespace(
            encoder=encoder,
            centroids=np.array([[0.0, 0.0], [1.0, 1.0]], dtype=np.float32),
            clustering=SimpleNamespace(num_clusters=2),
            assignment=SimpleNamespace(calibration=CLUSTERS),
        ),
    )


@pytest.mark.parametrize(
    ("options", "num_used"), [({"heal_steps": 1}, 32), ({"heal_steps": 2, "heal_cluster_steps": 1}, 128)]
)
def test_healing_draws_from_some_times_the_spare_text_that_its_steps_read(
    options: dict[str, int], num_used: int
) -> None:
    corpus = healing_corpus(200)
    found, labels = healing_text(make_config(**options), corpus, healing_routing())
    assert found == list(corpus.spare[:num_used])
    assert labels.tolist() == [1] * num_used


def test_calibration_text_is_left_out_where_spare_text_is_enough() -> None:
    corpus = healing_corpus(4)
    found, _ = healing_text(make_config(heal_steps=2), corpus, healing_routing())
    assert found == list(corpus.spare)


@pytest.mark.parametrize("num_spare", [0, 3])
def test_calibration_text_is_trained_on_where_spare_text_runs_out(num_spare: int) -> None:
    corpus = healing_corpus(num_spare)
    found, labels = healing_text(make_config(heal_steps=50), corpus, healing_routing())
    assert found == [*corpus.spare, *corpus.calibration]
    assert labels.tolist() == [1] * num_spare + CLUSTERS.tolist()


def test_own_steps_alone_leave_other_clusters_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    inputs = heal_inputs(load("llama"), heal_steps=0, heal_cluster_steps=5)
    # A cluster without text has nothing to learn from.
    inputs = replace(inputs, labels=np.zeros_like(inputs.labels))
    healed = heal(inputs, Cache(None), "key", Progress())
    assert "healing: cluster 1 has no text to train on" in caplog.text
    assert "cluster 0" not in caplog.text
    for layer in range(inputs.loaded.record.num_layers):
        for cluster, equal in ((0, False), (1, True)):
            before, after = (narrow_layer(inputs.loaded, each, layer, cluster) for each in (inputs.narrow, healed))
            assert all(torch.equal(before[role], after[role].to(before[role])) == equal for role in ("gate", "up"))


@pytest.mark.parametrize("fast", [True, False])
def test_muon_warns_where_bfloat16_is_emulated(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("coreinfer.compiler.prune.heal.cpu_multiplies_bf16", lambda: fast)
    heal(heal_inputs(load("llama"), heal_steps=1, heal_optimizer="muon"), Cache(None), "key", Progress())
    assert ("this CPU emulates bfloat16" in caplog.text) is not fast


def test_the_dense_model_is_left_alone() -> None:
    inputs = heal_inputs(load("llama"), heal_steps=3, heal_cluster_steps=1)
    before = [
        {role: t.clone() for role, t in ffn_tensors(layer, inputs.loaded.family).items()}
        for layer in inputs.loaded.layers
    ]
    heal(inputs, Cache(None), "key", Progress())
    for layer, tensors in zip(inputs.loaded.layers, before, strict=True):
        assert all(torch.equal(t, tensors[role]) for role, t in ffn_tensors(layer, inputs.loaded.family).items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("stage", "num_steps"), [("heal", 7), ("heal clusters", 11)])
def test_an_interrupted_healing_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, num_steps: int, optimizer: str
) -> None:
    monkeypatch.setattr("coreinfer.compiler.prune.heal._CHECKPOINT_STEPS", 4)
    # The second stage is interrupted when its first cluster is done, behind a checkpoint of the second.
    inputs = heal_inputs(load("llama"), heal_steps=10, heal_cluster_steps=6, heal_optimizer=optimizer)
    whole = heal(inputs, Cache(None), "key", Progress())

    class Interrupted(Progress):
        def bar(self, name: str, num_steps_in_all: int) -> Any:
            return interrupt_after(num_steps if name == stage else num_steps_in_all + 1)

    with pytest.raises(KeyboardInterrupt):
        heal(inputs, Cache(tmp_path), "key", Interrupted())
    resumed = heal(inputs, Cache(tmp_path), "key", Progress())
    for first, second in zip(bits(whole), bits(resumed), strict=True):
        np.testing.assert_array_equal(first, second)
    # A finished healing is not done again.
    again = Progress()
    heal(inputs, Cache(tmp_path), "key", again)
    assert not again.stage_seconds


class interrupt_after:  # noqa: N801
    """A bar that gives up after some steps."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def __enter__(self) -> Callable[..., None]:
        return self.advance

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left <= 0:
            raise KeyboardInterrupt


def test_a_healed_bundle_says_so(tiny_bundle: Callable[..., Path]) -> None:
    plain, healed = (open_bundle(tiny_bundle("llama", heal_steps=steps)) for steps in (0, 2))
    assert healed.manifest.provenance.config["heal_steps"] == 2
    quality = healed.manifest.quality
    assert quality is not None
    assert [score.name for score in quality.controls] == [
        "one static mask, not healed",
        "random assignment, not healed",
    ]
    first, second = plain.pack(0), healed.pack(0)
    gates = [name for name in first if ".gate" in name]
    assert gates
    assert any(not np.array_equal(first[name].array, second[name].array) for name in gates)


def test_healing_that_other_text_rejects_is_left_out(
    tiny_bundle: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    plain = open_bundle(tiny_bundle("llama", heal_steps=0))
    rejected = open_bundle(tiny_bundle("llama", heal_steps=3, heal_rate=30.0))
    assert "healing is left out: KL on validation text rises from" in caplog.text
    quality = rejected.manifest.quality
    assert quality is not None
    assert [score.name for score in quality.controls] == ["one static mask", "random assignment"]
    for cluster in range(len(plain.packs)):
        for name in plain.pack(cluster):
            np.testing.assert_array_equal(plain.pack(cluster)[name].array, rejected.pack(cluster)[name].array)
