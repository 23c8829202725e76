"""What is resident on a device, proven with a fake one that counts, and that nothing is used before it is there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import Bundle, open_bundle
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .engine_inputs import PROMPT
from .fake_device import FakeDevice
from .model_factory import SHAPES, corpus_texts

TOKEN_IDS = [1, 57, 200, 300, 21, 99, 140, 7, 250, 33, 180, 77, 310, 64, 205, 18, 91, 120, 260, 45, 150, 11]
NEURON_IDS = tuple(np.arange(start, 96, 2, dtype=np.int32) for start in (0, 1, 0))
PACKS = [FfnChoice(cluster=number) for number in range(4)]
ROOMY_MB = 1000.0
NUM_LAYERS = 3


class Sizes:
    """Bytes of a bundle's parts in float32, counted from its tensors rather than from the code under test."""

    def __init__(self, bundle: Bundle) -> None:
        decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
        ffn = {module for layer in decoder._layers for module in map(layer.get_submodule, projections(decoder))}
        own = {id(parameter) for module in ffn for parameter in module.parameters()}
        self.base = sum(4 * p.numel() for p in decoder._model.parameters() if id(p) not in own)
        self.buffers = sum(buffer.nbytes for buffer in decoder._model.buffers())
        self.dense = sum(p.nbytes for module in ffn for p in module.parameters())
        self.layer = self.dense // NUM_LAYERS
        decoder.use(PACKS[0])
        self.pack = sum(p.nbytes for module in ffn for p in module.parameters())
        model = bundle.manifest.model
        self.kv_token = 2 * NUM_LAYERS * model.num_kv_heads * model.head_dim * 4

    def least_mb(self, *, num_tokens: int = 256) -> float:
        return (self.base + self.buffers + self.pack + 2 * self.layer + num_tokens * self.kv_token) / 1e6


def projections(decoder: TorchDecoder) -> list[str]:
    return list(decoder._family.projections.values())


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Callable[..., Bundle]:
    return lambda family="llama", **options: open_bundle(tiny_bundle(family, **options))


def on_device(bundle: Bundle, device: FakeDevice, limit_mb: float, **options: Any) -> TorchDecoder:
    return TorchDecoder(
        bundle, **{"device": "cpu", "dtype": "float32", "gpu_memory_mb": limit_mb, "transfer": device, **options}
    )


def answer(decoder: TorchDecoder, prompt: FfnChoice, choice: FfnChoice) -> npt.NDArray[np.float32]:
    """Read a prompt with some weights, decode with others; gives all logits."""
    decoder.truncate(0)
    decoder.use(prompt)
    decoder.prepare(choice)
    logits = [decoder.forward(TOKEN_IDS, all_logits=True)]
    decoder.use(choice)
    return np.concatenate([*logits, *(decoder.forward([token_id]) for token_id in (9, 8, 77))])


CHOICES = [DENSE, *PACKS, FfnChoice(neuron_ids=NEURON_IDS), PACKS[2], DENSE, PACKS[1]]


# What is resident


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_under_a_bound_base_one_pack_and_two_layer_buffers(family: str, bundle: Callable[..., Bundle]) -> None:
    opened, device = bundle(family), FakeDevice()
    sizes = Sizes(opened)
    decoder = on_device(opened, device, sizes.least_mb())
    for choice in [*PACKS, DENSE, *reversed(PACKS)]:
        answer(decoder, DENSE, choice)
    assert dict(device.peak) == {"base": sizes.base, "pack": sizes.pack, "layer": 2 * sizes.layer}
    assert dict(device.now) == dict(device.peak)
    assert device.peak_bytes <= sizes.least_mb() * 1e6


def test_with_room_the_dense_ffn_stays(bundle: Callable[..., Bundle]) -> None:
    opened, device = bundle(), FakeDevice()
    sizes = Sizes(opened)
    decoder = on_device(opened, device, ROOMY_MB)
    for choice in PACKS:
        answer(decoder, DENSE, choice)
    assert dict(device.peak) == {"base": sizes.base, "pack": sizes.pack, "dense": sizes.dense}
    assert device.log.count(("copy", "dense")) == 1
    assert device.log.count(("copy", "pack")) == len(PACKS)


def test_without_a_bound_the_free_memory_decides(bundle: Callable[..., Bundle]) -> None:
    opened = bundle()
    sizes = Sizes(opened)
    for free_bytes, kind in ((10**12, "dense"), (256_000_000 + int(sizes.least_mb() * 1e6) + 1, "layer")):
        device = FakeDevice(free_bytes)
        TorchDecoder(opened, device="cpu", dtype="float32", transfer=device)
        assert device.peak[kind]
        assert not device.peak["layer" if kind == "dense" else "dense"]


def test_a_bundle_without_the_dense_ffn_has_base_and_pack(bundle: Callable[..., Bundle]) -> None:
    opened, device = bundle(dense=False), FakeDevice()
    plain = TorchDecoder(opened, device="cpu", dtype="float32")
    decoder = on_device(opened, device, ROOMY_MB)
    for choice in PACKS:
        np.testing.assert_array_equal(answer(decoder, choice, choice), answer(plain, choice, choice))
    assert set(device.peak) == {"base", "pack"}
    with pytest.raises(runtime.ConfigError, match=r"has no dense FFN.*--dense"):
        decoder.use(DENSE)


def test_neurons_take_the_place_of_a_pack(bundle: Callable[..., Bundle]) -> None:
    """Packs of other shapes need other memory; the old one is given back before the new one is taken."""
    opened, device = bundle(), FakeDevice()
    sizes = Sizes(opened)
    decoder = on_device(opened, device, sizes.least_mb())
    for choice in (
        PACKS[0],
        FfnChoice(neuron_ids=NEURON_IDS),
        PACKS[1],
        DENSE,
        FfnChoice(neuron_ids=NEURON_IDS),
        DENSE,
    ):
        answer(decoder, DENSE, choice)
        answer(decoder, DENSE, PACKS[3])
    assert device.peak["pack"] == sizes.pack
    assert device.peak_bytes <= sizes.least_mb() * 1e6


# Outputs


@pytest.mark.parametrize("family", SHAPES)
def test_streamed_or_resident_the_logits_are_those_of_weights_in_place(
    family: str, bundle: Callable[..., Bundle]
) -> None:
    opened = bundle(family)
    plain = TorchDecoder(opened, device="cpu", dtype="float32")
    for limit_mb in (Sizes(opened).least_mb(), ROOMY_MB):
        decoder = on_device(opened, FakeDevice(), limit_mb)
        for choice in CHOICES:
            np.testing.assert_array_equal(answer(decoder, DENSE, choice), answer(plain, DENSE, choice))


@pytest.mark.parametrize("quantize", ["bf16", "int4", "int8"])
def test_every_format_and_dtype(quantize: str, bundle: Callable[..., Bundle]) -> None:
    opened = bundle("llama", quantize=quantize)
    for dtype in ("float32", "bfloat16"):
        plain = TorchDecoder(opened, device="cpu", dtype=dtype)
        decoder = on_device(opened, FakeDevice(), Sizes(opened).least_mb(), dtype=dtype)
        for choice in CHOICES[:6]:
            np.testing.assert_array_equal(answer(decoder, DENSE, choice), answer(plain, DENSE, choice))


def test_statistics_are_those_of_weights_in_place(bundle: Callable[..., Bundle]) -> None:
    opened = bundle()
    plain = TorchDecoder(opened, device="cpu", dtype="float32")
    decoder = on_device(opened, FakeDevice(), Sizes(opened).least_mb())
    logits, statistics = decoder.prompt_statistics(TOKEN_IDS, ("griffin",))
    expected_logits, expected = plain.prompt_statistics(TOKEN_IDS, ("griffin",))
    np.testing.assert_array_equal(logits, expected_logits)
    np.testing.assert_array_equal(statistics["griffin"], expected["griffin"])


@pytest.mark.parametrize("mode", ["similarity", "dense", "stability", "fused"])
def test_a_bounded_engine_says_what_an_unbounded_one_says(
    mode: runtime.Mode, tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bundle("llama")
    plain = runtime.load(folder, device="cpu", dtype="float32")
    bounded = runtime.load(folder, device="cpu", dtype="float32", gpu_memory_mb=Sizes(plain.bundle).least_mb())
    device = FakeDevice()
    counted = runtime.Engine(plain.bundle, on_device(plain.bundle, device, Sizes(plain.bundle).least_mb()))
    for prompt in (corpus_texts()[0], corpus_texts()[1], corpus_texts()[2], corpus_texts()[3]):
        expected = plain.generate(prompt, raw=True, mode=mode, max_new_tokens=12).token_ids
        assert bounded.generate(prompt, raw=True, mode=mode, max_new_tokens=12).token_ids == expected
        assert counted.generate(prompt, raw=True, mode=mode, max_new_tokens=12).token_ids == expected
    assert not device.peak["dense"]


# Copies and waits


@pytest.mark.parametrize(("kind", "limit_mb"), [("pack", ROOMY_MB), ("dense", ROOMY_MB), ("layer", None)])
def test_a_missing_wait_shows(kind: str, limit_mb: float | None, bundle: Callable[..., Bundle]) -> None:
    opened, device = bundle(), FakeDevice()
    device.never_waited.add(kind)
    decoder = on_device(opened, device, limit_mb or Sizes(opened).least_mb())
    logits = answer(decoder, DENSE, PACKS[1])
    first_wrong = 0 if kind != "pack" else len(TOKEN_IDS)
    assert np.isfinite(logits[:first_wrong]).all()
    assert np.isnan(logits[first_wrong:]).all()


def test_the_pack_comes_while_the_prompt_is_read(bundle: Callable[..., Bundle]) -> None:
    opened, device = bundle(), FakeDevice()
    engine = runtime.Engine(opened, on_device(opened, device, Sizes(opened).least_mb()))
    engine.generate(PROMPT, raw=True, mode="similarity", max_new_tokens=2)
    device.log.clear()
    other = next(
        text for text in corpus_texts() if engine.router.route(text).cluster != engine.router.route(PROMPT).cluster
    )
    engine.generate(other, raw=True, mode="similarity", max_new_tokens=3)
    layers = [("copy", "layer"), *[("wait", "layer"), ("copy", "layer")] * (NUM_LAYERS - 1), ("wait", "layer")]
    assert device.log == [("copy", "pack"), *layers, ("wait", "pack")]


def test_a_layer_is_copied_while_the_one_before_computes(bundle: Callable[..., Bundle]) -> None:
    opened, device = bundle(), FakeDevice()
    decoder = on_device(opened, device, Sizes(opened).least_mb())
    order = []
    for number, layer in enumerate(decoder._layers):
        layer.register_forward_hook(lambda *_, number=number: order.append(device.log.count(("copy", "layer"))))
    decoder.forward(TOKEN_IDS)
    assert order == [2, 3, 3]


def test_preparing_leaves_the_weights_in_use_alone(bundle: Callable[..., Bundle]) -> None:
    opened, device = bundle(), FakeDevice()
    plain, decoder = TorchDecoder(opened, device="cpu", dtype="float32"), on_device(opened, device, ROOMY_MB)
    for used in (plain, decoder):
        used.use(PACKS[0])
        used.forward(TOKEN_IDS)
        used.prepare(PACKS[1])
    np.testing.assert_array_equal(decoder.forward([5]), plain.forward([5]))
    for used in (plain, decoder):
        used.use(PACKS[1])
    np.testing.assert_array_equal(decoder.forward([6]), plain.forward([6]))


def test_what_was_prepared_need_not_be_used(bundle: Callable[..., Bundle]) -> None:
    opened, device = bundle(), FakeDevice()
    plain, decoder = TorchDecoder(opened, device="cpu", dtype="float32"), on_device(opened, device, ROOMY_MB)
    decoder.prepare(PACKS[3])
    decoder.prepare(PACKS[2])
    np.testing.assert_array_equal(answer(decoder, DENSE, PACKS[2]), answer(plain, DENSE, PACKS[2]))
    decoder.use(DENSE)
    decoder.prepare(PACKS[3])
    decoder.use(PACKS[0])
    np.testing.assert_array_equal(answer(decoder, PACKS[0], PACKS[0]), answer(plain, PACKS[0], PACKS[0]))


def test_a_pack_that_is_there_is_not_copied_again(bundle: Callable[..., Bundle]) -> None:
    device = FakeDevice()
    decoder = on_device(bundle(), device, ROOMY_MB)
    for choice in (PACKS[0], DENSE, PACKS[0], DENSE, PACKS[0]):
        decoder.prepare(choice)
        decoder.use(choice)
    assert device.log.count(("copy", "pack")) == 1


def test_a_pass_that_was_interrupted_does_no_harm(bundle: Callable[..., Bundle]) -> None:
    opened = bundle()
    plain, decoder = (
        TorchDecoder(opened, device="cpu", dtype="float32"),
        on_device(opened, FakeDevice(), Sizes(opened).least_mb()),
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = decoder._layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoder.forward(TOKEN_IDS)
    handle.remove()
    np.testing.assert_array_equal(answer(decoder, DENSE, DENSE), answer(plain, DENSE, DENSE))


# Too little memory


def test_a_bound_that_is_too_small_is_refused_with_the_numbers(bundle: Callable[..., Bundle]) -> None:
    opened = bundle()
    least = Sizes(opened).least_mb()
    on_device(opened, FakeDevice(), least)
    expected = (
        rf"gpu_memory_mb: expected at least {least:.4g} MB \(base .*, pack .*, two layer buffers .*, KV cache .*\)"
    )
    device = FakeDevice()
    with pytest.raises(runtime.ConfigError, match=expected):
        on_device(opened, device, least - 0.002)
    assert not device.peak


@pytest.mark.parametrize("limit_mb", [0, -1.0, float("nan")])
def test_a_bound_that_is_none(limit_mb: float, bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(runtime.ConfigError, match="gpu_memory_mb: expected more than 0"):
        on_device(bundle(), FakeDevice(), limit_mb)


def test_the_kv_cache_counts(bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coreinfer.runtime.engines.torch.memory_plan._MIN_KV_TOKENS", 24)
    opened = bundle()
    decoder = on_device(opened, FakeDevice(), Sizes(opened).least_mb(num_tokens=24))
    decoder.forward(TOKEN_IDS)
    decoder.forward([4, 5])
    with pytest.raises(runtime.ConfigError, match="a KV cache of 25 tokens does not fit, there is room for 24"):
        decoder.forward([6])
    decoder.truncate(0)
    decoder.forward(TOKEN_IDS)


def test_neurons_that_do_not_fit_are_refused(bundle: Callable[..., Bundle]) -> None:
    opened = bundle()
    plain = TorchDecoder(opened, device="cpu", dtype="float32")
    decoder = on_device(opened, FakeDevice(), Sizes(opened).least_mb())
    every = FfnChoice(neuron_ids=tuple(np.arange(96, dtype=np.int32) for _ in range(NUM_LAYERS)))
    decoder.use(PACKS[0])
    decoder.forward(TOKEN_IDS)
    decoder._placement.hold_kv(256 * Sizes(opened).kv_token)
    with pytest.raises(runtime.ConfigError, match="these FFN weights take"):
        decoder.use(every)
    np.testing.assert_array_equal(answer(decoder, PACKS[0], PACKS[0]), answer(plain, PACKS[0], PACKS[0]))


# Options


def test_the_native_engine_has_no_gpu(tiny_bundle: Callable[..., Path]) -> None:
    options: list[dict[str, Any]] = [{"gpu_memory_mb": 5.0}, {"cuda_graphs": "on"}, {"weights": "packed"}]
    for option in options:
        with pytest.raises(runtime.ConfigError, match="engine native: it runs on the CPU"):
            runtime.load(tiny_bundle("llama"), engine="native", **option)


def test_options_of_a_gpu_ask_for_the_torch_engine(tiny_bundle: Callable[..., Path]) -> None:
    assert runtime.load(tiny_bundle("llama"), device="cpu", gpu_memory_mb=100).decoder.name == "torch"


def test_a_bound_on_a_gpu_that_is_not_there(tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(runtime.ConfigError, match="gpu_memory_mb: torch sees no GPU here"):
        runtime.load(tiny_bundle("llama"), gpu_memory_mb=1000)


def test_the_cpu_is_used_in_place_unless_bounded(bundle: Callable[..., Bundle]) -> None:
    assert TorchDecoder(bundle(), device="cpu", dtype="float32")._placement.kv_room_bytes is None
