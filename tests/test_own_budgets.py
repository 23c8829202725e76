"""Clusters whose packs are of different widths, from the compiler to both engines."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import Bundle, open_bundle
from coreinfer.bundles.inspect import describe
from coreinfer.bundles.manifest import Manifest
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.cli import summary
from coreinfer.evaluation.subjects import BundleSubject
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder, device_needs
from coreinfer.runtime.routing.modes import largest_cluster

from .bundle_factory import written_once
from .engine_inputs import PROMPT
from .fake_device import FakeDevice
from .model_factory import SHAPES, UNLIKE

# Of 96 neurons, one, three and two blocks of 32.
KEEPS = (0.34, 1.0, 0.67)
WIDTHS = (32, 96, 64)
TOKEN_IDS = [1, 57, 200, 300, 21, 99, 140, 7, 250, 33, 180, 77]


def compile_unequal(config: CompileConfig, target: Path, **options: Any) -> Manifest:
    """Compile as if a quality had asked for `KEEPS`."""

    def fit(
        _config: CompileConfig, _keep: float, _measure: object, _dense: object, num_tokens: Sequence[int]
    ) -> tuple[float, Any]:
        return 0.67, tuple(islice(cycle(KEEPS), len(num_tokens)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coreinfer.compiler.pipeline.fit_quality", fit)
        return compile_model(replace(config, output=target, **options))


@pytest.fixture(scope="module")
def unequal(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """A function (family, **CompileConfig fields) that gives a bundle with packs of one, three and two blocks."""
    written = written_once(
        tmp_path_factory.mktemp("unequal"),
        lambda family, target, options: compile_unequal(tiny_inputs(family), target, **options),
    )
    return lambda family, **options: open_bundle(written(family, **options))


def clusters_of(bundle: Bundle) -> range:
    return range(len(bundle.manifest.clusters))


@pytest.mark.parametrize(
    ("family", "quantize"), [*((family, "bf16") for family in SHAPES), *((family, "int4") for family in UNLIKE)]
)
def test_each_pack_has_its_own_width(family: str, quantize: str, unequal: Callable[..., Bundle]) -> None:
    bundle = unequal(family, quantize=quantize)
    assert len(clusters_of(bundle)) > 2
    for cluster, record in enumerate(bundle.manifest.clusters):
        width = WIDTHS[cluster % 3]
        assert record.layer_budgets == (width,) * 3
        assert record.keep_ratio == pytest.approx(width / 96, abs=1e-5)
        ids = [bundle.pack(cluster)[f"layers.{layer}.neuron_ids"].array for layer in range(3)]
        assert [len(layer) for layer in ids] == [width] * 3
    packs = [record.ffn_bytes for record in bundle.manifest.clusters]
    assert packs[1] == bundle.manifest.ffn_bytes == pytest.approx(3 * packs[0])
    assert min(packs) < bundle.manifest.mean_pack_bytes < max(packs)
    assert bundle.manifest.has_own_budgets
    assert bundle.manifest.plan.layer_budgets == (64,) * 3


@pytest.mark.parametrize("family", SHAPES)
def test_both_engines_decode_with_each(family: str, unequal: Callable[..., Bundle]) -> None:
    bundle = unequal(family)
    native, torch_decoder = NativeDecoder(bundle, threads=1), TorchDecoder(bundle, device="cpu", dtype="float32")
    answers = []
    # To and fro, so that each width follows each other.
    for cluster in [*clusters_of(bundle), 0, 2, 1, 0]:
        found = []
        for decoder in (native, torch_decoder):
            decoder.truncate(0)
            decoder.use(FfnChoice(cluster=cluster))
            found.append(decoder.forward(TOKEN_IDS, all_logits=True))
        assert np.abs(found[0] - found[1]).max() <= 2e-2 * np.abs(found[1]).max()
        answers.append(found[1])
    np.testing.assert_array_equal(answers[0], answers[-1])
    assert not np.allclose(answers[0], answers[1], atol=1e-3)


def test_a_pack_that_keeps_all_is_the_dense_model(unequal: Callable[..., Bundle]) -> None:
    bundle = unequal("llama")
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    logits = []
    for choice in (DENSE, FfnChoice(cluster=1)):
        decoder.truncate(0)
        decoder.use(choice)
        logits.append(decoder.forward(TOKEN_IDS, all_logits=True))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_a_device_has_room_for_the_widest(unequal: Callable[..., Bundle]) -> None:
    bundle = unequal("llama")
    needs = device_needs(bundle, device="cpu", dtype="float32")
    assert needs.pack == needs.dense
    plain = TorchDecoder(bundle, device="cpu", dtype="float32")
    tight = TorchDecoder(bundle, device="cpu", dtype="float32", gpu_memory_mb=needs.least / 1e6, transfer=FakeDevice())
    for cluster in (0, 1, 2, 0, 1):
        logits = []
        for decoder in (plain, tight):
            decoder.truncate(0)
            decoder.use(FfnChoice(cluster=cluster))
            logits.append(decoder.forward(TOKEN_IDS, all_logits=True))
        np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("mode", ["similarity", "stability", "fused", "lossless", "dense"])
def test_every_mode_generates(mode: runtime.Mode, unequal: Callable[..., Bundle]) -> None:
    engine = runtime.load(unequal("llama").path)
    result = engine.generate(PROMPT, raw=True, max_new_tokens=8, mode=mode)
    assert len(result.token_ids) == 8
    if mode == "lossless":
        assert result.text == engine.generate(PROMPT, raw=True, max_new_tokens=8, mode="dense").text


def test_prompts_that_belong_nowhere_go_to_the_widest_pack(unequal: Callable[..., Bundle]) -> None:
    assert WIDTHS[largest_cluster(unequal("llama").manifest) % 3] == 96


def test_what_is_said_of_it(unequal: Callable[..., Bundle]) -> None:
    bundle = unequal("llama")
    lines = "\n".join(describe(bundle.manifest))
    assert "budgets    64 64 64 of 96, on average; clusters have their own" in lines
    assert "         budgets 32 32 32\n" in lines
    assert ", clusters 0.333 to 1.000)" in "\n".join(summary(bundle.path, bundle.manifest, Progress()))
    assert "each cluster has budgets of its own" in (bundle.path / "report.html").read_text(encoding="utf-8")


def test_bytes_a_token_are_the_mean_over_the_packs(unequal: Callable[..., Bundle]) -> None:
    bundle = unequal("llama")
    subject = BundleSubject(bundle.path, modes=("dense", "similarity", "fused"))
    decoder = NativeDecoder(bundle)
    own = []
    for cluster in clusters_of(bundle):
        decoder.use(FfnChoice(cluster=cluster))
        own.append(decoder.bytes_per_token(0))
    weights = [record.num_tokens for record in bundle.manifest.clusters]
    assert subject.bytes_per_token("similarity") == pytest.approx(np.average(own, weights=weights), abs=1)
    # Two blocks, as the third pack has.
    assert subject.bytes_per_token("fused") == own[2]
    assert subject.bytes_per_token("dense") == own[1]


def test_a_search_gives_each_cluster_its_ratio(
    tiny_inputs: Callable[[str], CompileConfig],
    tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coreinfer.compiler.quality.search.LEAST_TOKENS", 1)
    options: dict[str, Any] = {"budgets": "sensitivity", "min_layer_keep": 0.1}
    quality = open_bundle(tiny_bundle("llama", keep=0.34, **options)).manifest.quality
    assert quality is not None
    limit = quality.clusters.kl * 0.7
    found = replace(
        tiny_inputs("llama"), output=tmp_path / "b", cache_dir=tmp_path / "c", keep=None, max_kl=limit, **options
    )
    manifest = compile_model(found)
    assert manifest.quality is not None
    assert {entry.score.kl <= limit + 1e-6 for entry in manifest.quality.per_cluster} == {True}
    keeps = [record.keep_ratio for record in manifest.clusters]
    tokens = {entry.cluster: entry.score.num_tokens for entry in manifest.quality.per_cluster}
    mean = sum(keeps[cluster] * count for cluster, count in tokens.items()) / sum(tokens.values())
    # Budgets are whole blocks of 32 of 288 neurons.
    assert manifest.plan.keep == pytest.approx(mean, abs=1 / 9)
