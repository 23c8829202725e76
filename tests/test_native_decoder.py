"""The native engine beside the torch engine: the same bundle, the same tokens."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import BundleCorrupt, ConfigError, open_bundle
from coreinfer.bundles.statistics import SELECTIONS
from coreinfer.bundles.tensors import TensorFile
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .engine_inputs import DIALOGUE, MAX_POSITIONS, PROMPT
from .model_factory import FAMILIES, SHAPES, UNLIKE, VOCABULARY

IDS = np.random.default_rng(1).integers(3, VOCABULARY, 150).tolist()
NUM_LAYERS, FFN_DIM = 3, 96


def neuron_ids(count: int = 50) -> FfnChoice:
    picked = [np.random.default_rng(layer).permutation(FFN_DIM)[:count] for layer in range(NUM_LAYERS)]
    return FfnChoice(neuron_ids=tuple(np.sort(ids).astype(np.int32) for ids in picked))


def difference(got: Any, expected: Any) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def in_steps(decoder: Decoder, start: int = 130) -> Any:
    """Logits of the tokens after `start`, read one by one after a block."""
    decoder.truncate(0)
    decoder.forward(IDS[:start])
    return np.concatenate([decoder.forward([token_id]) for token_id in IDS[start:]])


# Keys and values are kept in fp16, which the tiny models' large attention scores amplify.


@pytest.mark.parametrize("choice", [DENSE, FfnChoice(cluster=1), neuron_ids()], ids=["dense", "pack", "gathered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_are_those_of_torch(family: str, choice: FfnChoice, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family))
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    torch_decoder.use(choice)
    expected = torch_decoder.forward(IDS, all_logits=True)
    for threads in (1, 3):
        decoder = NativeDecoder(bundle, threads=threads)
        decoder.use(choice)
        assert difference(decoder.forward(IDS, all_logits=True), expected) < 2e-2
        assert difference(in_steps(decoder), expected[130:]) < 2e-2


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_torch(family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    """What differs is the rounding of activations to int8."""
    bundle = open_bundle(tiny_bundle(family, quantize=kind))
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    decoder = NativeDecoder(bundle, threads=2)
    for choice in (DENSE, FfnChoice(cluster=1), neuron_ids()):
        torch_decoder.use(choice)
        decoder.use(choice)
        torch_decoder.truncate(0)
        expected = torch_decoder.forward(IDS, all_logits=True)
        for got, reference in ((blocks(decoder), expected), (in_steps(decoder), expected[130:])):
            error = np.sqrt(np.mean(np.square(got - reference)) / np.mean(np.square(reference)))
            assert error < 0.15


def blocks(decoder: Decoder) -> Any:
    decoder.truncate(0)
    return decoder.forward(IDS, all_logits=True)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("isa", _native.available_isas())
def test_kernels_decode_alike(isa: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama", quantize=kind))
    expected = in_steps(NativeDecoder(bundle, threads=1, isa="portable"))
    got = in_steps(NativeDecoder(bundle, threads=2, isa=isa))
    assert np.sqrt(np.mean(np.square(got - expected)) / np.mean(np.square(expected))) < (
        0.05 if kind == "int4" else 2e-3
    )


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "int4") for family in SHAPES), *((family, kind) for family in UNLIKE for kind in ("bf16", "int8"))],
)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_calls_are_alike(isa: str, family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    """A prompt's tokens are to the bit the same however it is cut, where no call has one token alone."""
    decoder = NativeDecoder(open_bundle(tiny_bundle(family, quantize=kind)), threads=2, isa=isa)
    assert decoder.calls_alike
    expected = decoder.forward(IDS, all_logits=True)
    for cuts in ((2, 5, 12, 44), (40, 48, 65, 100), (64,), (31, 33, 97)):
        decoder.truncate(0)
        bounds = [0, *cuts, len(IDS)]
        pieces = [decoder.forward(IDS[a:b], all_logits=True) for a, b in itertools.pairwise(bounds)]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
    decoder.truncate(0)
    last = decoder.forward(IDS[:90])
    decoder.truncate(0)
    got, _ = decoder.prompt_statistics(IDS[:90], ("griffin",))
    np.testing.assert_array_equal(got, last)
    np.testing.assert_array_equal(decoder.forward(IDS[90:], all_logits=True), expected[90:])


def test_steps_are_the_same_every_time_and_with_any_threads(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("qwen3", quantize="int4"))
    decoder = NativeDecoder(bundle, threads=2)
    first = in_steps(decoder)
    np.testing.assert_array_equal(in_steps(decoder), first)
    np.testing.assert_array_equal(in_steps(NativeDecoder(bundle, threads=2)), first)


@pytest.mark.parametrize("family", ["llama", "opt-post-norm"])
def test_a_screened_head_gives_the_exact_heads_tokens(family: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family, quantize="int4"))
    assert bundle.manifest.quantization["head"].format == "int8-planes"
    decoder = NativeDecoder(bundle, threads=2)
    num_approximate = 0
    for number, token_id in enumerate(IDS):
        exact = decoder.forward([token_id])
        decoder.truncate(number)
        screened = decoder.forward([token_id], greedy=True)
        assert screened.argmax() == exact.argmax()
        assert screened.max() == pytest.approx(exact.max(), rel=1e-5)
        num_approximate += int((np.abs(screened - exact) > 1e-6 * np.abs(exact).max()).sum())
    assert num_approximate > 0
    assert decoder.bytes_per_token(5, greedy=True) < decoder.bytes_per_token(5)


def test_truncating_forgets(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=2)
    whole = decoder.forward(IDS[:40], all_logits=True)
    decoder.truncate(20)
    assert decoder.num_cached == 20
    np.testing.assert_allclose(decoder.forward(IDS[20:40], all_logits=True), whole[20:], atol=1e-4)


def test_prompt_statistics_are_those_of_torch(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama"))
    expected_logits, expected = TorchDecoder(bundle, device="cpu", dtype="float32").prompt_statistics(IDS, SELECTIONS)
    logits, got = NativeDecoder(bundle, threads=2).prompt_statistics(IDS, SELECTIONS)
    assert difference(logits, expected_logits) < 2e-2
    assert got.keys() == expected.keys() == set(SELECTIONS)
    for selection, statistic in got.items():
        assert difference(statistic, expected[selection]) < (0.1 if selection == "coreinfer" else 2e-2)


def test_the_native_engine_is_the_default(tiny_bundle: Callable[..., Path]) -> None:
    for kind in ("bf16", "int4"):
        engine = runtime.load(tiny_bundle("llama", quantize=kind), device="cpu")
        assert engine.decoder.name == "native"
        for mode in ("auto", "dense", "similarity", "stability", "fused"):
            got = engine.generate(DIALOGUE, mode=mode, max_new_tokens=12)
            assert got.token_ids


@pytest.mark.parametrize("mode", ["dense", "similarity", "stability", "fused"])
def test_generations_are_those_of_torch(mode: runtime.Mode, tiny_bundle: Callable[..., Path]) -> None:
    native = runtime.load(tiny_bundle("gemma3"), engine="native", threads=2)
    reference = runtime.load(tiny_bundle("gemma3"), engine="torch", device="cpu", dtype="float32")
    got = native.generate(PROMPT, raw=True, mode=mode, max_new_tokens=30)
    expected = reference.generate(PROMPT, raw=True, mode=mode, max_new_tokens=30)
    assert got.token_ids[:2] == expected.token_ids[:2]
    assert (got.cluster, got.distance) == (expected.cluster, expected.distance)


def test_bytes_a_token_are_those_of_the_weights_and_the_cache(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama"))
    decoder = NativeDecoder(bundle, threads=1)
    matrices = [tensor for tensor in bundle.base.values() if tensor.array.ndim == 2]
    assert decoder.bytes_per_token(0) == sum(t.num_bytes for t in matrices) + bundle.manifest.ffn_bytes
    # Values are padded to 16: layers x heads x (8 + 16) halves.
    assert decoder.bytes_per_token(10) - decoder.bytes_per_token(0) == 10 * 3 * 2 * (8 + 16) * 2
    decoder.use(FfnChoice(cluster=0))
    assert decoder.bytes_per_token(0) == (sum(t.num_bytes for t in matrices) + bundle.manifest.clusters[0].ffn_bytes)


# What comes from outside


def test_token_ids_and_room_are_checked(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=1)
    for wrong in ([VOCABULARY], [-1], [3, 2**40], []):
        with pytest.raises(ConfigError):
            decoder.forward(wrong)
    with pytest.raises(ConfigError, match=f"at most {MAX_POSITIONS} more in the KV cache, got {MAX_POSITIONS + 1}"):
        decoder.forward([5] * (MAX_POSITIONS + 1))
    assert decoder.num_cached == 0
    decoder.forward([5] * MAX_POSITIONS)
    with pytest.raises(ConfigError, match="KV cache"):
        decoder.forward([5])


def test_neuron_ids_are_checked(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=1)
    for wrong in ([96], [-1], []):
        with pytest.raises(ValueError, match="neuron id"):
            decoder.use(FfnChoice(neuron_ids=(np.array(wrong, dtype=np.int32),) * NUM_LAYERS))


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 1000}, {"isa": "mmx"}])
def test_wrong_options_are_refused(options: Any, tiny_bundle: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        runtime.load(tiny_bundle("llama"), engine="native", **options)


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"dtype": "float32"}])
def test_native_takes_no_device_and_no_dtype(options: Any, tiny_bundle: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="use engine torch"):
        runtime.load(tiny_bundle("llama"), engine="native", **options)


def test_the_environment_picks_the_kernels(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Callable[..., Path]) -> None:
    monkeypatch.setenv("COREINFER_ISA", "portable")
    decoder = runtime.load(tiny_bundle("llama"), engine="native").decoder
    assert isinstance(decoder, NativeDecoder)
    assert decoder.isa == "portable"
    monkeypatch.setenv("COREINFER_ISA", "z80")
    with pytest.raises(ConfigError, match="COREINFER_ISA"):
        runtime.load(tiny_bundle("llama"), engine="native")


def test_a_damaged_pack_is_found_when_it_is_used(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_bundle("llama", quantize="int4")
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", source, copy], check=True)
    pack = copy / "clusters" / "001.safetensors"
    data = bytearray(pack.read_bytes())
    data[-100] ^= 1
    pack.write_bytes(data)
    engine = runtime.load(copy, engine="native", threads=1)
    engine.decoder.use(FfnChoice(cluster=0))
    with pytest.raises(BundleCorrupt, match=r"001\.safetensors: expected sha256"):
        engine.decoder.use(FfnChoice(cluster=1))
    pack.write_bytes(data[:-64])
    with pytest.raises(BundleCorrupt, match=r"001\.safetensors: expected \d+ bytes"):
        runtime.load(copy, engine="native")


def test_two_threads_cannot_share_a_decoder(tiny_bundle: Callable[..., Path]) -> None:
    """One of them is told, and none crashes."""
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=2)
    outcomes: list[str] = []

    def work() -> None:
        for _ in range(50):
            try:
                decoder.truncate(0)
                decoder.forward(IDS)
                outcomes.append("done")
            except (runtime.CoreInferError, RuntimeError) as error:
                outcomes.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in outcomes
    # Whoever gets through may find the other's tokens in the cache.
    refused = ("the native decoder is in use by another thread", "token ids: expected at most")
    assert all(text.startswith(refused) for text in outcomes if text != "done")


def test_a_failing_watcher_is_heard(tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from coreinfer.runtime.engines import prompt_sums

    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=2)

    def broken(*_arguments: Any, **_options: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(prompt_sums, "document_statistic", broken)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        decoder.prompt_statistics(IDS, SELECTIONS)


def test_torch_is_not_imported(tiny_bundle: Callable[..., Path]) -> None:
    code = (
        "import sys; from coreinfer import runtime\n"
        f"engine = runtime.load({str(tiny_bundle('llama'))!r}, device='cpu')\n"
        f"print(engine.generate({PROMPT!r}, raw=True, max_new_tokens=3).text)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr


def test_preparing_has_a_packs_pages_read_ahead(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=1)
    expected = decoder.forward(IDS[:9])
    asked: list[str] = []
    monkeypatch.setattr(TensorFile, "prefetch", lambda file: asked.append(file.path.name))
    decoder.prepare(FfnChoice(cluster=2))
    decoder.prepare(DENSE)
    assert asked == ["002.safetensors"]
    decoder.truncate(0)
    np.testing.assert_array_equal(decoder.forward(IDS[:9]), expected)
