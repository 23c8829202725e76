"""Inputs that are read in half: levels, energies, the format, and what compiles and the torch engine make of them."""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError, open_bundle
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.formats import float_matrix, low_halves
from coreinfer.bundles.inspect import describe
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import QuantizationRecord, read_manifest
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.tensors import StoredTensor, TensorFile
from coreinfer.bundles.token_shares import check_token_shares, token_thresholds
from coreinfer.bundles.versions import HALVES_VERSION, THIN_VERSION
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.quality.stored import StoredModel, StoredPacks, _packs_cut, base_in_use, dense_cut
from coreinfer.compiler.shares.halves import warn_of_no_halves
from coreinfer.compiler.shares.inputs import group_weights
from coreinfer.compiler.shares.measure import Part, SharedWeights, _reading
from coreinfer.compiler.shares.texts import begin_texts
from coreinfer.compiler.shares.thresholds import RATIOS
from coreinfer.compiler.text.corpus import Document
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder, device_needs
from coreinfer.runtime.engines.torch.wanted_inputs import InputCounts

from .bundle_factory import change_tensors, edit_manifest
from .half_inputs import NEXT_IDS, PROMPT_IDS, halved_matrix, logits_of, taken_by_hand
from .loading import load
from .old_readers import check_older_readers
from .packing import pack_int4

SHARE = 0.6
TEXT = Document(text="", routing_text="", token_ids=(*PROMPT_IDS, *PROMPT_IDS[::-1], *NEXT_IDS))

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def halved_bundle(tiny_bundle: Callable[..., Path]) -> Callable[..., Bundle]:
    """A function (family) that opens a bundle whose tokens read inputs in half."""
    return lambda family="llama", **options: open_bundle(
        tiny_bundle(family, token_share=SHARE, quantize="int4", **options)
    )


# What is stored


@pytest.mark.parametrize("shape", [(64, 96), (33, 70), (1, 5), (16, 32)])
def test_low_halves_are_what_other_codes_lack(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    groups = -(-shape[1] // 32)
    parts = pack_int4(
        rng.integers(0, 16, shape, dtype=np.uint8),
        (rng.random((shape[0], groups)) * 0.1).astype(np.float16),
        rng.integers(0, 241, (shape[0], groups), dtype=np.uint8),
    )
    file = {f"w{suffix}": stored for suffix, stored in parts.items()}
    lacking = float_matrix(file, "w", shape) - halved_matrix(file, "w", shape)
    np.testing.assert_allclose(low_halves(file, "w", shape), lacking, atol=1e-6)
    assert low_halves(file, "w", shape).shape == shape
    with pytest.raises(KeyError):
        low_halves({}, "w", shape)
    with pytest.raises(ValueError, match="expected U8"):
        low_halves(file, "w", (shape[0], shape[1] + 32))


def test_a_bundle_says_which_inputs_have_halves(halved_bundle: Callable[..., Bundle]) -> None:
    bundle = halved_bundle()
    found, file = bundle.manifest, bundle.token_shares
    assert found.token_shares is not None
    assert file is not None
    assert find_problems(bundle.path, found) == []
    assert found.token_shares.halves
    assert found.schema_version == HALVES_VERSION
    ratios = file["half_ratios"].array
    assert ratios.shape == (found.model.num_layers, 4)
    assert {*ratios.flatten().tolist()} <= {float(ratio) for ratio in RATIOS}
    assert (ratios > 1).sum() > ratios.size / 2
    thresholds = token_thresholds(bundle, 1, SHARE)
    np.testing.assert_array_equal(thresholds[..., 1], ratios * thresholds[..., 0])
    assert (token_thresholds(bundle, None, 1.0) == -1).all()
    assert "with a pack, some inputs in half" in "\n".join(describe(found))
    assert "reads others in half" in (bundle.path / LAYOUT.report).read_text(encoding="utf-8")
    for score in found.token_shares.scores:
        assert score.read == pytest.approx(SHARE, abs=0.1)


def test_ratios_that_cannot_be_are_named(halved_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(halved_bundle().path, tmp_path / "bundle"))
    for value, said in (
        (0.5, "half_ratios: expected numbers from 1 to 16"),
        (17.0, "half_ratios: expected numbers from 1 to 16"),
        (float("nan"), "half_ratios: expected finite numbers"),
    ):
        change_tensors(folder, LAYOUT.token_shares, partial(_set_ratio, value=value))
        with pytest.raises(BundleCorrupt, match=re.escape(said)):
            open_bundle(folder)
    change_tensors(folder, LAYOUT.token_shares, partial(_set_ratio, value=3))
    open_bundle(folder)
    change_tensors(folder, LAYOUT.token_shares, lambda tensors: tensors.pop("half_ratios"))
    with pytest.raises(BundleCorrupt, match="tensor 'half_ratios' is missing"):
        open_bundle(folder)


def _set_ratio(tensors: dict[str, StoredTensor], value: float) -> None:
    tensors["half_ratios"].array[1, 2] = value


def test_matrices_without_halves_are_named(
    halved_bundle: Callable[..., Bundle], tiny_bundle: Callable[..., Path]
) -> None:
    bundle = halved_bundle()
    file, found = bundle.token_shares, bundle.manifest
    assert file is not None
    assert check_token_shares(file, found) == []
    for name, groups in (("attention", INPUT_GROUPS[:2]), ("ffn", INPUT_GROUPS[2:])):
        other = replace(
            found, quantization={**found.quantization, name: QuantizationRecord(format="int8", group_size=32)}
        )
        expected = [f"half_ratios: expected 1 of {group}, whose matrices, in int8, have no halves" for group in groups]
        problems = check_token_shares(file, other)
        assert [problem.partition(": ")[2] for problem in problems] == expected
    experts = read_manifest(tiny_bundle("olmoe")).model.experts
    mixture = replace(found, model=replace(found.model, experts=experts))
    assert "of experts, have no halves" in check_token_shares(file, mixture)[0]


def test_older_readers_refuse_by_version(
    halved_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(halved_bundle().path, tmp_path / "bundle"))
    said = "manifest.token_shares.halves: inputs that are read in half need schema_version 6"
    check_older_readers(folder, monkeypatch, known=(2, 3, 4, 5), lower=5, said=said)
    with edit_manifest(folder) as data:
        data["schema_version"] = 6
        data["token_shares"]["halves"] = False
    with pytest.raises(BundleCorrupt, match="tensor 'half_ratios' is unknown"):
        open_bundle(folder)


# Options


def test_without_halves_a_bundle_is_as_before(halved_bundle: Callable[..., Bundle]) -> None:
    bundle = halved_bundle(half_inputs=False, packs="thin", keep=None, budgets=None, evaluate=False)
    assert bundle.manifest.schema_version == THIN_VERSION
    assert "halves" not in (bundle.path / LAYOUT.manifest).read_text(encoding="utf-8")
    assert "half_ratios" not in TensorFile(bundle.path / LAYOUT.token_shares)
    thresholds = token_thresholds(bundle, 1, SHARE)
    np.testing.assert_array_equal(thresholds[..., 0], thresholds[..., 1])


def test_halves_need_token_shares(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    given = replace(tiny_inputs("llama"), output=tmp_path / "b")
    for asked, switch in ((True, "--half-inputs"), (False, "--no-half-inputs")):
        with pytest.raises(ConfigError, match=f"{switch}: expected --token-share with it"):
            replace(given, half_inputs=asked)


@pytest.mark.parametrize(("family", "quantize"), [("llama", "int8"), ("mixtral", "int4")])
def test_what_has_no_halves_is_said_if_they_were_asked_for(
    family: str,
    quantize: Any,
    tiny_inputs: Callable[[str], CompileConfig],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = replace(tiny_inputs(family), token_share=SHARE, quantize=quantize, evaluate=False, budgets=None)
    with caplog.at_level(logging.WARNING):
        compile_model(replace(given, output=tmp_path / "asked", half_inputs=True))
    assert caplog.text.count("no input is read in half") == 1
    bundle = open_bundle(tmp_path / "asked")
    assert not bundle.manifest.has_halves
    assert bundle.manifest.schema_version == (5 if family == "mixtral" else 3)
    caplog.clear()
    loaded: Any = SimpleNamespace(record=bundle.manifest.model)
    for asked in (None, False):
        warn_of_no_halves(replace(given, half_inputs=asked), loaded)
    assert caplog.text == ""


# What is computed


@pytest.mark.parametrize(
    ("family", "weights"), [("llama", "auto"), ("phi3", "auto"), ("opt", "auto"), ("llama", "packed")]
)
def test_the_torch_engine_computes_by_the_definition(
    family: str, weights: str, halved_bundle: Callable[..., Bundle]
) -> None:
    bundle = halved_bundle(family)
    used = TorchDecoder(bundle, device="cpu", dtype="float32", weights=weights)
    plain = TorchDecoder(bundle, device="cpu", dtype="float32")
    assert bundle.dense is not None
    for choice, ffn in (
        (FfnChoice(cluster=2, token_share=0.5), bundle.pack(2)),
        (FfnChoice(token_share=0.7), bundle.dense),
        (FfnChoice(cluster=2, token_share=0.8), bundle.pack(2)),
        (FfnChoice(cluster=0, token_share=0.5), bundle.pack(0)),
    ):
        got, seen = logits_of(used, choice), [0, 0, 0]
        logits_of(plain, choice.whole)
        plain.truncate(len(PROMPT_IDS))
        thresholds = token_thresholds(bundle, choice.cluster, choice.token_share)
        with taken_by_hand(plain._layers, plain._family, bundle.base, ffn, thresholds, seen):
            expected = np.stack([plain.forward([token_id])[0] for token_id in NEXT_IDS])
        np.testing.assert_allclose(got, expected, atol=2e-4, rtol=1e-3)
        assert min(seen) > 0.05 * sum(seen)
        # As if all halves were whole, or left out, is something else.
        for changed in (thresholds[..., :1], thresholds[..., 1:]):
            plain.truncate(len(PROMPT_IDS))
            with taken_by_hand(plain._layers, plain._family, bundle.base, ffn, changed.repeat(2, axis=-1), [0, 0, 0]):
                assert not np.allclose(plain.forward([NEXT_IDS[0]])[0], expected[0], atol=1e-3)


def test_second_copies_are_made_once(halved_bundle: Callable[..., Bundle]) -> None:
    """When a share is first used, and again for an FFN that comes into use; the attention's stay."""
    bundle = halved_bundle()
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    held = decoder.masks._low._held
    assert held == {}
    decoder.use(FfnChoice(cluster=1, token_share=0.5))
    first = {key: tensor.data_ptr() for key, tensor in held.items()}
    values = {key: tensor.clone() for key, tensor in held.items()}
    assert first
    generation = decoder.masks.key
    decoder.use(FfnChoice(cluster=1, token_share=0.6))
    assert decoder.masks.key == generation
    decoder.use(FfnChoice(cluster=1))
    assert decoder.masks.key is None
    decoder.use(FfnChoice(cluster=3, token_share=0.6))
    assert {key: tensor.data_ptr() for key, tensor in held.items()} == first
    assert decoder.masks.key == generation
    assert {key[1].startswith("self_attn") for key in held if torch.equal(held[key], values[key])} == {True}
    decoder.use(FfnChoice(token_share=0.6))
    assert decoder.masks.key != generation


def test_second_copies_have_room_on_a_device(halved_bundle: Callable[..., Bundle]) -> None:
    bundle, plain = halved_bundle(), halved_bundle(half_inputs=False)
    needs, without = (device_needs(found, device="cpu", dtype="float32") for found in (bundle, plain))
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32", gpu_memory_mb=needs.least / 1e6)
    for choice in (FfnChoice(cluster=1, token_share=0.5), FfnChoice(token_share=0.5)):
        decoder.use(choice)
        held = decoder.masks._low._held.values()
        assert 0 < sum(tensor.numel() * tensor.element_size() for tensor in held) <= needs.low_bits
    assert without.low_bits == 0
    assert needs.least == without.least + needs.low_bits
    with pytest.raises(ConfigError, match=r"for halves [\d.]+ \(none with --no-half-inputs\)"):
        TorchDecoder(bundle, device="cpu", dtype="float32", gpu_memory_mb=without.least / 1e6)


def test_halves_count_half(halved_bundle: Callable[..., Bundle]) -> None:
    bundle = halved_bundle()
    decoder, seen = TorchDecoder(bundle, device="cpu", dtype="float32"), [0, 0, 0]
    decoder.masks.counts = counts = InputCounts()
    logits_of(decoder, FfnChoice(token_share=0.6))
    plain = TorchDecoder(bundle, device="cpu", dtype="float32")
    logits_of(plain, DENSE)
    plain.truncate(len(PROMPT_IDS))
    assert bundle.dense is not None
    thresholds = token_thresholds(bundle, None, 0.6)
    with taken_by_hand(plain._layers, plain._family, bundle.base, bundle.dense, thresholds, seen):
        for token_id in NEXT_IDS:
            plain.forward([token_id])
    # By hand, groups are counted once a matrix.
    num_matrices = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
    whole = sum(num_matrices[group] * count for (_, group), count in counts.num_whole.items())
    wanted = sum(num_matrices[group] * count for (_, group), count in counts.num_wanted.items())
    assert (whole, wanted - whole) == (seen[0], seen[1])
    ones = np.ones((bundle.manifest.model.num_layers, 4), dtype=np.float32)
    shares = [
        (counts.num_whole[place] + (counts.num_wanted[place] - counts.num_whole[place]) / 2) / count
        for place, count in counts.num_inputs.items()
    ]
    assert counts.share(ones) == pytest.approx(np.mean(shares))
    both = InputCounts()
    both.merge(counts)
    both.merge(counts)
    assert both.share(ones) == pytest.approx(counts.share(ones))


@pytest.mark.parametrize(("family", "cluster"), [("llama", None), ("phi3", None), ("llama", 2)])
def test_a_compile_measures_by_the_definition(
    family: str,
    cluster: int | None,
    halved_bundle: Callable[..., Bundle],
    tiny_inputs: Callable[[str], CompileConfig],
) -> None:
    bundle, loaded = halved_bundle(family), load(Path(tiny_inputs(family).model))
    nothing: Any = None
    stored = StoredModel(packer=nothing, folder=bundle.path, target=bundle.path, base_tensors={})
    packs = StoredPacks(folder=bundle.path, cut=partial(_packs_cut, stored=stored, folder=bundle.path))
    assert bundle.token_shares is not None
    assert bundle.dense is not None
    arrays = {name: bundle.token_shares[name].array for name in bundle.token_shares}
    shared = SharedWeights(stored=stored, packs=packs, arrays=arrays, labels=np.zeros(1, np.int64))
    part = Part(ffn=None, thresholds="dense", shares=shared.planned(SHARE), numbers=(0,))
    part = part if cluster is None else shared.part(cluster, (0,), shared.planned(SHARE))
    counts, seen = InputCounts(), [0, 0, 0]
    with torch.inference_mode(), base_in_use(loaded, stored):
        begun = begin_texts(loaded, dense_cut(loaded, stored), [TEXT])
        with _reading(loaded, shared)(part, counts):
            got = loaded.head(begun[0].states(loaded)).numpy()
    ids, count = list(TEXT.token_ids), begun[0].token_ids.shape[1]
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    decoder.forward(ids[:-count])
    decoder.use(FfnChoice(cluster=cluster))
    thresholds, ffn = (
        token_thresholds(bundle, cluster, SHARE),
        bundle.dense if cluster is None else bundle.pack(cluster),
    )
    with taken_by_hand(decoder._layers, decoder._family, bundle.base, ffn, thresholds, seen):
        expected = decoder.forward(ids[-count:], all_logits=True)
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=1e-3)
    assert min(seen) > 0.05 * sum(seen)
    assert 0.3 < counts.share(group_weights(loaded)) < 0.9
