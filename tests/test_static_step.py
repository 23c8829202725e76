"""Steps of fixed shapes against the plain pass, and what a recording of them relies on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch import static_step
from coreinfer.runtime.engines.torch.decoder import TorchDecoder, device_needs
from torch.utils._python_dispatch import TorchDispatchMode

from .engine_inputs import PROMPT
from .fake_device import FakeDevice
from .model_factory import SHAPES

TOKEN_IDS = [1, 57, 200, 300, 21, 99, 140, 7, 250, 33, 180, 77, 310, 64, 205, 18, 91, 120, 260, 45, 150, 11]
NEXT_IDS = [9, 8, 77, 301, 12, 200, 5]
ROOMY_MB = 1000.0


@pytest.fixture
def decoders(tiny_bundle: Callable[..., Path]) -> Callable[..., tuple[TorchDecoder, TorchDecoder, FakeDevice]]:
    """Builds a decoder of fixed shapes and a plain one."""

    def build(
        family: str = "llama", limit_mb: float = ROOMY_MB, **compiled: Any
    ) -> tuple[TorchDecoder, TorchDecoder, FakeDevice]:
        bundle, device = open_bundle(tiny_bundle(family, **compiled)), FakeDevice()
        options: dict[str, Any] = {"gpu_memory_mb": limit_mb, "cuda_graphs": "on", "transfer": device}
        static = TorchDecoder(bundle, device="cpu", dtype="float32", **options)
        device.recorded_addresses = lambda: addresses(static)
        return static, TorchDecoder(bundle, device="cpu", dtype="float32"), device

    return build


def addresses(decoder: TorchDecoder) -> list[int]:
    """Where all lies that a step reads or writes."""
    static = decoder._sequences.static
    assert static is not None
    modules = [layer.get_submodule(path) for layer in decoder._layers for path in decoder._family.projections.values()]
    tensors: list[Any] = [module.weight for module in modules]
    tensors += [tensor for layer in static._kv for tensor in (layer.keys, layer.values, layer.cumulative_length)]
    if decoder.masks.key is not None:
        tensors += [decoder.masks._thresholds, *decoder.masks._norms.values(), *decoder.masks._low._held.values()]
    return [tensor.data_ptr() for tensor in (*tensors, static._token, static._position, static._logits, static._mask)]


def both(static: TorchDecoder, plain: TorchDecoder, token_ids: list[int]) -> None:
    got, expected = static.forward(token_ids, all_logits=True), plain.forward(token_ids, all_logits=True)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)
    assert static.num_cached == plain.num_cached


@pytest.mark.parametrize("family", SHAPES)
def test_the_same_logits_as_the_plain_pass(family: str, decoders: Callable[..., Any]) -> None:
    static, plain, device = decoders(family)
    for choice in (FfnChoice(cluster=2), DENSE, FfnChoice(cluster=1)):
        for used in (static, plain):
            used.truncate(0)
            used.use(choice)
        both(static, plain, TOKEN_IDS)
        for token_id in NEXT_IDS:
            both(static, plain, [token_id])
        both(static, plain, NEXT_IDS)
        for used in (static, plain):
            used.truncate(11)
        both(static, plain, [4])
    assert device.num_recorded == 2


def test_packs_swap_under_one_recording(decoders: Callable[..., Any]) -> None:
    """The fake device refuses to repeat a step whose weights or cache moved."""
    static, plain, device = decoders()
    for number in (0, 1, 3, 2, 0):
        for used in (static, plain):
            used.use(FfnChoice(cluster=number))
        both(static, plain, [number + 5])
    assert device.num_recorded == 1


def test_logits_are_the_callers_own(decoders: Callable[..., Any]) -> None:
    static, plain, _ = decoders()
    kept = [static.forward([token_id]) for token_id in NEXT_IDS]
    expected = [plain.forward([token_id]) for token_id in NEXT_IDS]
    np.testing.assert_allclose(np.concatenate(kept), np.concatenate(expected), atol=2e-5, rtol=1e-5)


def test_weights_that_move_are_recorded_anew(decoders: Callable[..., Any]) -> None:
    static, plain, device = decoders()
    own = FfnChoice(neuron_ids=tuple(np.arange(start, 96, 2, dtype=np.int32) for start in (0, 1, 0)))
    for choice in (FfnChoice(cluster=0), own, FfnChoice(cluster=0), DENSE):
        for used in (static, plain):
            used.use(choice)
        both(static, plain, [7])
    assert device.num_recorded == 4


def test_the_cache_grows_and_keeps_what_it_has(decoders: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_step, "_FIRST_CAPACITY", 8)
    static, plain, device = decoders()
    both(static, plain, TOKEN_IDS[:5])
    assert static._sequences.static.capacity == 8
    for token_id in TOKEN_IDS[:5]:
        both(static, plain, [token_id])
    assert static._sequences.static.capacity == 16
    both(static, plain, TOKEN_IDS)
    both(static, plain, [3])
    assert static._sequences.static.capacity == 64
    assert device.num_recorded == 3


def least_mb(decoder: TorchDecoder) -> float:
    return device_needs(decoder._bundle, device="cpu", dtype="float32").least / 1e6


def test_under_a_bound_the_cache_takes_no_more_than_there_is(
    decoders: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coreinfer.runtime.engines.torch.memory_plan._MIN_KV_TOKENS", 30)
    roomy, plain, _ = decoders()
    tight, _, _ = decoders(limit_mb=least_mb(plain))
    for used, capacity in ((roomy, 256), (tight, 30)):
        used.forward(TOKEN_IDS)
        assert used._sequences.static.capacity == capacity
    plain.forward(TOKEN_IDS)
    tight.use(FfnChoice(cluster=1))
    plain.use(FfnChoice(cluster=1))
    for token_id in range(3, 11):
        both(tight, plain, [token_id])
    with pytest.raises(runtime.ConfigError, match="a KV cache of 31 tokens does not fit, there is room for 30"):
        tight.forward([4])


def test_a_streamed_dense_ffn_is_not_recorded(decoders: Callable[..., Any]) -> None:
    _, plain, _ = decoders()
    tight, plain, device = decoders(limit_mb=least_mb(plain))
    assert device.peak["layer"]
    both(tight, plain, TOKEN_IDS)
    both(tight, plain, [6])
    assert device.num_recorded == 0
    for used in (tight, plain):
        used.use(FfnChoice(cluster=1))
    both(tight, plain, [6])
    assert device.num_recorded == 1


def test_a_prompt_of_one_token_is_watched(decoders: Callable[..., Any]) -> None:
    """A recorded step calls no hooks."""
    static, plain, device = decoders()
    got, expected = (used.prompt_statistics([7], ("griffin",))[1]["griffin"] for used in (static, plain))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert expected.any()
    assert device.num_recorded == 0


class HostQuestions(TorchDispatchMode):
    """Notes what would have the host wait for the device, which no recording can hold."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "lift_fresh", "equal")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operators += 1
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", SHAPES)
def test_a_step_asks_the_device_for_nothing(family: str, decoders: Callable[..., Any]) -> None:
    static, plain, _ = decoders(family)
    both(static, plain, TOKEN_IDS)
    both(static, plain, [4])
    with torch.inference_mode(), HostQuestions() as questions:
        static._sequences.static._step()
    assert questions.seen == []
    assert questions.num_operators > 50


def test_the_watch_sees_what_it_is_to_see() -> None:
    with HostQuestions() as questions:
        torch.arange(3).sum().item()
    assert questions.seen == ["_local_scalar_dense"]


def test_what_cannot_be_recorded_runs_as_it_is(
    decoders: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    static, plain, device = decoders()

    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(device, "record", refuse)
    with pytest.raises(RuntimeError, match="not permitted"):
        static.forward([4])
    static._sequences.static._required = False
    both(static, plain, [4])
    both(static, plain, [5])
    assert caplog.text.count("decoding continues without a CUDA graph") == 1


@pytest.mark.parametrize("spoiled", [1.5, float("nan")])
def test_a_recorded_step_that_differs_is_not_used(
    spoiled: float, decoders: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    static, plain, device = decoders()
    steps = static._sequences.static

    def record(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
        return lambda: (step(), steps._logits.mul_(spoiled))[0]  # type: ignore[func-returns-value]

    monkeypatch.setattr(device, "record", record)
    both(static, plain, TOKEN_IDS)
    with pytest.raises(RuntimeError, match="logits of a recorded step are off by"):
        static.forward([4])
    steps._required = False
    both(static, plain, [4])
    both(static, plain, [5])
    assert caplog.text.count("decoding continues without a CUDA graph: the logits of a recorded step are off by") == 1


def test_an_engine_says_the_same(tiny_bundle: Callable[..., Path]) -> None:
    folder = tiny_bundle("llama")
    plain = runtime.load(folder, device="cpu", dtype="float32")
    static = runtime.load(folder, device="cpu", dtype="float32", gpu_memory_mb=ROOMY_MB, cuda_graphs="on")
    modes: list[runtime.Mode] = ["similarity", "dense", "fused"]
    for mode in modes:
        expected = plain.generate(PROMPT, raw=True, mode=mode, max_new_tokens=12).token_ids
        assert static.generate(PROMPT, raw=True, mode=mode, max_new_tokens=12).token_ids == expected


def test_graphs_need_a_device(tiny_bundle: Callable[..., Path]) -> None:
    with pytest.raises(runtime.ConfigError, match="cuda_graphs: expected a CUDA device"):
        runtime.load(tiny_bundle("llama"), device="cpu", cuda_graphs="on")
    with pytest.raises(runtime.ConfigError, match="cuda_graphs: expected auto, on, off"):
        runtime.load(tiny_bundle("llama"), device="cpu", cuda_graphs="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("quantize", ["bf16", "int4"])
def test_a_recorded_step_leaves_out_what_its_choice_says(quantize: str, decoders: Callable[..., Any]) -> None:
    static, plain, device = decoders(token_share=0.6, quantize=quantize)
    assert static._bundle.manifest.has_halves is (quantize == "int4")
    for choice in (
        FfnChoice(cluster=0, token_share=0.5),
        FfnChoice(cluster=2, token_share=0.7),
        FfnChoice(cluster=2),
        FfnChoice(cluster=2, token_share=0.4),
        FfnChoice(token_share=0.4),
        FfnChoice(cluster=0, token_share=0.5),
    ):
        for used in (static, plain):
            used.truncate(0)
            used.use(choice.whole)
        both(static, plain, TOKEN_IDS)
        for used in (static, plain):
            used.use(choice)
        for token_id in NEXT_IDS:
            both(static, plain, [token_id])
    assert device.num_recorded >= 3
