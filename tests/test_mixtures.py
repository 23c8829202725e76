"""Mixtures of experts: compiled from tiny random models, and run by both engines beside transformers' own."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.bundles.contract import kept_experts
from coreinfer.bundles.families import family_of_config, resolve
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .model_factory import MIXTURES, VOCABULARY, build_model

IDS = np.random.default_rng(1).integers(3, VOCABULARY, 150).tolist()
"""Longer than the sliding windows of the tiny models."""


def reference_logits(family: str, *, keep: list[list[int]] | None = None) -> np.ndarray:
    """Logits of transformers' own model; with `keep`, router logits of all other experts are minus infinity."""
    model = build_model(family)
    row = family_of_config(model.config.to_dict(), family)
    assert row.experts is not None
    for layer, kept in zip(resolve(model, row.layers), keep or (), strict=keep is not None):
        router = resolve(layer, f"{row.experts.module}.{row.experts.router}")
        weight, absent = router.weight.data, [number for number in range(6) if number not in kept]
        # One more input, which is 1, so that the router's own code makes use of it.
        bias = torch.zeros(6).index_fill(0, torch.tensor(absent, dtype=torch.long), -1e9)
        router.weight.data, router.hidden_dim = torch.cat([weight, bias[:, None]], dim=1), weight.shape[1] + 1
        router.register_forward_pre_hook(
            lambda _, inputs: (torch.nn.functional.pad(inputs[0].reshape(-1, inputs[0].shape[-1]), (0, 1), value=1.0),)
        )
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


def close(got: Any, expected: Any, most: float) -> bool:
    """Whether tokens have the expected logits, but for a few in which rounding made another expert the better one."""
    errors = np.sqrt(np.square(got - expected).mean(axis=1) / np.square(expected).mean())
    return float(np.quantile(errors, 0.8)) < most and float(np.median(errors)) < most / 2


def blocks(decoder: Decoder) -> Any:
    decoder.truncate(0)
    return decoder.forward(IDS, all_logits=True)


def in_steps(decoder: Decoder, start: int = 130) -> Any:
    """Logits of the tokens after `start`, read one by one after a block."""
    decoder.truncate(0)
    decoder.forward(IDS[:start])
    return np.concatenate([decoder.forward([token_id]) for token_id in IDS[start:]])


@pytest.mark.parametrize("family", MIXTURES)
def test_torch_computes_what_transformers_does(family: str, tiny_bundle: Callable[..., Path]) -> None:
    engine = runtime.load(tiny_bundle(family), device="cpu", dtype="float32", engine="torch")
    engine.decoder.use(DENSE)
    expected = reference_logits(family)
    np.testing.assert_allclose(blocks(engine.decoder), expected, atol=2e-4, rtol=1e-4)
    for cluster, pack in enumerate(engine.bundle.packs):
        keep = kept_experts(pack, engine.manifest)
        assert [len(experts) for experts in keep] == [4, 4, 4]
        engine.decoder.use(FfnChoice(cluster=cluster))
        narrow = reference_logits(family, keep=keep)
        np.testing.assert_allclose(blocks(engine.decoder), narrow, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(in_steps(engine.decoder), narrow[130:], atol=2e-4, rtol=1e-4)
        assert np.abs(narrow - expected).max() > 0.1


@pytest.mark.parametrize("choice", [DENSE, FfnChoice(cluster=1)], ids=["dense", "pack"])
@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_logits_are_those_of_torch(family: str, choice: FfnChoice, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family))
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    torch_decoder.use(choice)
    expected = blocks(torch_decoder)
    for threads in (1, 3):
        decoder = NativeDecoder(bundle, threads=threads)
        decoder.use(choice)
        assert close(blocks(decoder), expected, 4e-3)
        assert close(in_steps(decoder), expected[130:], 4e-3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", MIXTURES)
def test_packed_logits_are_those_of_torch(family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    """What differs is the rounding of activations to int8."""
    bundle = open_bundle(tiny_bundle(family, quantize=kind))
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    decoder = NativeDecoder(bundle, threads=2)
    for choice in (DENSE, FfnChoice(cluster=1)):
        torch_decoder.use(choice)
        decoder.use(choice)
        expected = blocks(torch_decoder)
        for got, reference in ((blocks(decoder), expected), (in_steps(decoder), expected[130:])):
            assert close(got, reference, 0.15)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_calls_are_alike(isa: str, family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    """A prompt's tokens are to the bit the same however it is cut, whichever experts the others use."""
    decoder = NativeDecoder(open_bundle(tiny_bundle(family, quantize=kind)), threads=2, isa=isa)
    expected = blocks(decoder)
    for cuts in ((2, 5, 12, 44), (40, 48, 65, 100), (64,)):
        decoder.truncate(0)
        bounds = [0, *cuts, len(IDS)]
        pieces = [decoder.forward(IDS[a:b], all_logits=True) for a, b in itertools.pairwise(bounds)]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_rows_are_those_of_tokens_alone(isa: str, family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    """To the bit: neither the others' experts nor a prompt that is read beside them change a token."""
    decoder = NativeDecoder(open_bundle(tiny_bundle(family, quantize=kind)), threads=2, isa=isa)
    decoder.use(FfnChoice(cluster=1))
    starts = (20, 33, 41, 70, 71)
    alone = []
    for start in starts:
        decoder.truncate(0)
        decoder.forward(IDS[:start])
        alone.append([decoder.forward([token_id])[0] for token_id in IDS[start : start + 4]])
    decoder.truncate(0)
    block = decoder.forward(IDS[:50])
    sequences = [decoder.add_sequence() for _ in starts]
    for sequence, start in zip(sequences, starts, strict=True):
        decoder.select(sequence)
        decoder.forward(IDS[:start])
    decoder.select(0)
    decoder.truncate(0)
    for step in range(4):
        ids = [IDS[start + step] for start in starts]
        if step == 2:
            got = decoder.forward_beside(IDS[:50], sequences, ids, last_logits=True)
            np.testing.assert_array_equal(got[:1], block)
            got = got[1:]
        else:
            got = decoder.forward_rows(sequences, ids)
        np.testing.assert_array_equal(got, np.stack([rows[step] for rows in alone]))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_reads_the_chosen_experts_alone(family: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family, quantize="int4"))
    decoder, manifest = NativeDecoder(bundle, threads=1), bundle.manifest
    counted = token_bytes(manifest)
    assert manifest.model.unit_neurons == manifest.model.ffn_dim // 6
    assert counted.pack_ffn == counted.dense_ffn
    for choice in (DENSE, FfnChoice(cluster=0)):
        decoder.use(choice)
        assert decoder.bytes_per_token(0, greedy=True) == counted.pack


def test_another_run_and_other_threads_change_no_bit(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("qwen3_moe", quantize="int4"))
    first = in_steps(NativeDecoder(bundle, threads=2))
    np.testing.assert_array_equal(in_steps(NativeDecoder(bundle, threads=2)), first)
    whole = blocks(NativeDecoder(bundle, threads=1))
    np.testing.assert_array_equal(blocks(NativeDecoder(bundle, threads=3)), whole)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_texts_of_all_modes(engine: str, tiny_bundle: Callable[..., Path]) -> None:
    made = runtime.load(tiny_bundle("olmoe"), engine=engine)
    prompt = "The kitchen text number 3 speaks of"
    alone = made.generate(prompt, mode="similarity", max_new_tokens=12)
    together = made.generate([prompt, "court judge clause", prompt], mode="similarity", max_new_tokens=12)
    assert [together[0].text, together[2].text] == [alone.text, alone.text]
    dense = made.generate(prompt, mode="dense", max_new_tokens=12)
    assert made.generate(prompt, mode="lossless", max_new_tokens=12).text == dense.text
    # However long a prompt is, it does not choose neurons of its own.
    assert made.generate(prompt * 12, mode="auto", max_new_tokens=2).mode in ("similarity", "dense")
    for mode in ("stability", "fused"):
        with pytest.raises(ConfigError, match=f"mode '{mode}': a prompt cannot choose its own neurons of a mixture"):
            made.generate(prompt, mode=mode, max_new_tokens=2)
    ids = tuple(np.arange(32, dtype=np.int32) for _ in range(3))
    with pytest.raises(ConfigError, match="of a mixture of experts"):
        made.decoder.use(FfnChoice(neuron_ids=ids))
    with pytest.raises(ConfigError, match="of a mixture of experts"):
        made.decoder.prompt_statistics(IDS, ("griffin",))
