"""Keys and values that fp16 does not hold are kept in float32, and only those."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer.bundles import Bundle, open_bundle
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import StoredTensor, bf16_to_float32
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .bundle_factory import change_tensors, float32_to_bf16
from .model_factory import FAMILIES, VOCABULARY

IDS = np.random.default_rng(11).integers(3, VOCABULARY, 150).tolist()
NUM_READ = 130


def divergence(expected: Any, got: Any) -> float:
    """Mean KL(expected || got) in nats."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in np.stack([expected, got]).astype(float))
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


@pytest.fixture
def changed(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Callable[..., Bundle]:
    """A function (family, suffix, change) that gives a bundle whose layers' tensors of a name are others."""

    def change_all(family: str, suffix: str, change: Callable[[Any], Any], **options: Any) -> Bundle:
        copy = tmp_path / f"{family}{suffix}"
        shutil.copytree(tiny_bundle(family, **options), copy)

        def put(tensors: dict[str, StoredTensor]) -> None:
            names = [name for name in tensors if name.endswith(suffix)]
            assert names
            for name in names:
                stored = tensors[name]
                is_bf16 = stored.dtype == "BF16"
                values = change(bf16_to_float32(stored.array) if is_bf16 else stored.array)
                values = float32_to_bf16(values) if is_bf16 else values.astype(stored.array.dtype)
                tensors[name] = StoredTensor(stored.dtype, values)

        change_tensors(copy, LAYOUT.base, put)
        return open_bundle(copy)

    return change_all


def check(bundle: Bundle, isa: str, most: float) -> None:
    """Blocks and single tokens are those of torch in float32."""
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    expected = torch_decoder.forward(IDS, all_logits=True)
    decoder = NativeDecoder(bundle, threads=2, isa=isa)
    assert divergence(expected, decoder.forward(IDS, all_logits=True)) < most
    decoder.truncate(NUM_READ)
    steps = np.concatenate([decoder.forward([token_id]) for token_id in IDS[NUM_READ:]])
    assert divergence(expected[NUM_READ:], steps) < most
    decoder.truncate(NUM_READ)
    np.testing.assert_array_equal(decoder.forward_rows([0] * len(steps), IDS[NUM_READ:]), steps)


def of_size(size: float) -> Callable[[Any], Any]:
    return lambda values: np.float32(size) * np.sign(values)


def times(factor: float) -> Callable[[Any], Any]:
    return lambda values: np.float32(factor) * values


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("size", [300, 3_000, 100_000])
def test_large_key_biases_are_those_of_torch(size: float, isa: str, changed: Callable[..., Bundle]) -> None:
    bundle = changed("qwen2", "k_proj.bias", of_size(size))
    check(bundle, isa, 1e-5)
    assert NativeDecoder(bundle, threads=1, isa=isa).wide_layers == [0, 1, 2]


@pytest.mark.parametrize(
    ("family", "suffix", "change"),
    [
        ("opt", "k_proj.bias", of_size(3_000)),
        ("llama", "k_proj.weight", times(1_000)),
        ("qwen3", "k_norm.weight", times(1_000)),
        ("qwen2", "v_proj.bias", of_size(100_000)),
        ("llama", "v_proj.weight", times(200_000)),
    ],
    ids=["bias-without-rotation", "key-weights", "key-norm", "value-bias", "value-weights"],
)
def test_whatever_makes_keys_or_values_large(
    family: str, suffix: str, change: Callable[[Any], Any], changed: Callable[..., Bundle]
) -> None:
    check(changed(family, suffix, change), "auto", 1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_are_bounded_too(kind: str, changed: Callable[..., Bundle]) -> None:
    ordinary = changed("qwen2", "q_proj.bias", times(1), quantize=kind)
    assert NativeDecoder(ordinary, threads=1).wide_layers == []
    large = changed("qwen2", "k_proj.weight.scale", times(1_000), quantize=kind)
    assert NativeDecoder(large, threads=1).wide_layers == [0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_layers_stay_in_halves(family: str, tiny_bundle: Callable[..., Path]) -> None:
    """OPT without a norm before its first layer has nothing that bounds what comes in there."""
    expected = [0] if family == "opt-post-norm" else []
    assert NativeDecoder(open_bundle(tiny_bundle(family)), threads=1).wide_layers == expected


def test_a_wide_layer_takes_twice_the_bytes(tiny_bundle: Callable[..., Path], changed: Callable[..., Bundle]) -> None:
    ordinary = NativeDecoder(open_bundle(tiny_bundle("qwen2")), threads=1)
    wide = NativeDecoder(changed("qwen2", "k_proj.bias", of_size(3_000)), threads=1)
    assert wide.bytes_per_token(9) - wide.bytes_per_token(0) == 2 * (
        ordinary.bytes_per_token(9) - ordinary.bytes_per_token(0)
    )


def test_a_fork_of_wide_pages_goes_on(changed: Callable[..., Bundle]) -> None:
    decoder = NativeDecoder(changed("qwen2", "k_proj.bias", of_size(3_000)), threads=2)
    decoder.forward(IDS[:100])
    fork = decoder.fork_sequence(0, 90)
    expected = decoder.forward(IDS[100:110])
    decoder.select(fork)
    decoder.forward(IDS[90:100])
    np.testing.assert_array_equal(decoder.forward(IDS[100:110]), expected)
