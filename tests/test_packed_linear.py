"""int4 weights in torch's own product, against the same weights multiplied out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.bundles.formats import float_matrix
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch import packed_linear
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.engines.torch.packed_linear import PackedLinear, pack_matrix, packed_problem, packed_shapes

from .fake_device import FakeDevice
from .packing import pack_int4

CPU = torch.device("cpu")
TOKEN_IDS = [1, 57, 200, 300, 21, 99, 140, 7, 250, 33, 180, 77]
# float32 differs by the order of sums; bfloat16 rounds scales, offsets and products to 8 bits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.01}
SHAPES = [(64, 96), (16, 32), (33, 70), (1, 5), (96, 64), (40, 33), (48, 512)]


def packed_file(shape: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    groups = -(-shape[1] // 32)
    parts = pack_int4(
        rng.integers(0, 16, shape, dtype=np.uint8),
        (rng.random((shape[0], groups)) * 0.1).astype(np.float16),
        rng.integers(0, 241, (shape[0], groups), dtype=np.uint8),
    )
    return {f"w{suffix}": stored for suffix, stored in parts.items()}


def linear_of(role: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[PackedLinear, torch.Tensor]:
    """A packed layer, and its weights multiplied out in float32."""
    file = packed_file(shape)
    tensors = pack_matrix(file, "w", role, shape, dtype, CPU)
    module = PackedLinear(shape[0] if role == "down" else None)
    module.weight, module.grid = tensors[role], tensors[f"{role}_grid"]
    return module, torch.from_numpy(float_matrix(file, "w", shape))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_unpacked_weights(role: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    module, weights = linear_of(role, shape, dtype)
    inputs = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    got = module(inputs).float()
    expected = inputs.float() @ weights.T
    assert got.shape == (2, 3, shape[0] if role == "down" else -(-shape[0] // 32) * 32)
    assert not got[..., shape[0] :].any()
    error = (got[..., : shape[0]] - expected).norm() / expected.norm()
    assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_known_beforehand(role: str, shape: tuple[int, int]) -> None:
    tensors = pack_matrix(packed_file(shape), "w", role, shape, torch.bfloat16, CPU)
    known = packed_shapes(role, shape, torch.bfloat16, CPU)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == known


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_on_a_gpu_are_those_that_torch_says(role: str, shape: tuple[int, int]) -> None:
    """torch knows them without a GPU."""
    known, dtype = packed_shapes(role, shape, torch.bfloat16, torch.device("cuda"))[role]
    unit = 16 if role == "down" else 32
    rows, columns = -(-shape[0] // unit) * unit, -(-shape[1] // 32) * 32
    nibbles = torch.empty((rows, columns // 2), dtype=torch.uint8, device="meta")
    arranged = torch.ops.aten._convert_weight_to_int4pack(nibbles, packed_linear._inner_tiles(columns))
    assert (known, dtype) == (tuple(arranged.shape), arranged.dtype)


def test_plain_weights_are_multiplied_plainly() -> None:
    module = PackedLinear(None)
    module.weight, module.bias = torch.randn(7, 5), torch.randn(7)
    inputs = torch.randn(3, 5)
    torch.testing.assert_close(module(inputs), inputs @ module.weight.T + module.bias)


def test_the_product_is_tried_before_it_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed_problem(CPU, torch.float32) is None
    assert packed_problem(CPU, torch.bfloat16) is None
    assert packed_problem(torch.device("meta"), torch.bfloat16)
    multiply = packed_linear._multiply
    monkeypatch.setattr(packed_linear, "_multiply", lambda *arguments: multiply(*arguments) * 1.1)
    assert packed_problem(CPU, torch.float32) == "its product is wrong by 10%"


# Whole models


@pytest.mark.parametrize("limit_mb", [None, 1000.0])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "qwen3", "qwen3_moe", "gpt_oss"])
def test_a_model_decodes_packed_as_unpacked(
    family: str, limit_mb: float | None, tiny_bundle: Callable[..., Path]
) -> None:
    bundle = open_bundle(tiny_bundle(family, quantize="int4"))
    plain = TorchDecoder(bundle, device="cpu", dtype="float32")
    model = bundle.manifest.model
    options: dict[str, Any] = {} if limit_mb is None else {"gpu_memory_mb": limit_mb}
    if limit_mb is not None and model.experts is None:
        options["cuda_graphs"] = "on"
    packed = TorchDecoder(bundle, device="cpu", dtype="float32", weights="packed", **options)
    every_other = FfnChoice(neuron_ids=tuple(np.arange(start, model.ffn_dim, 2, dtype=np.int32) for start in (0, 1, 0)))
    for choice in (DENSE, FfnChoice(cluster=1), every_other, FfnChoice(cluster=0), DENSE):
        for used in (plain, packed):
            used.truncate(0)
            used.use(choice)
        np.testing.assert_allclose(packed.forward(TOKEN_IDS), plain.forward(TOKEN_IDS), atol=2e-4, rtol=1e-3)
        np.testing.assert_allclose(packed.forward([5]), plain.forward([5]), atol=2e-4, rtol=1e-3)
    assert any(isinstance(module, PackedLinear) for module in packed._model.modules()) == (model.experts is None)
    for used in (plain, packed):
        used.truncate(0)
    statistics = [used.prompt_statistics(TOKEN_IDS, ("griffin",))[1]["griffin"] for used in (plain, packed)]
    np.testing.assert_allclose(statistics[1], statistics[0], atol=1e-3, rtol=1e-3)


def test_bfloat16_is_as_near_packed_as_unpacked(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama", quantize="int4"))
    exact, plain, packed = (
        TorchDecoder(bundle, device="cpu", dtype=dtype, weights=weights).forward(TOKEN_IDS, all_logits=True)
        for dtype, weights in (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "packed"))
    )
    errors = [np.linalg.norm(logits - exact) / np.linalg.norm(exact) for logits in (plain, packed)]
    assert errors[1] < 2 * errors[0]
    assert errors[1] < 0.06


def test_packed_weights_take_a_fraction_of_the_device(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama", quantize="int4"))
    peaks = []
    for weights in ("bfloat16", "packed"):
        device = FakeDevice()
        options: dict[str, Any] = {"gpu_memory_mb": 1000.0, "weights": weights, "transfer": device}
        TorchDecoder(bundle, device="cpu", dtype="bfloat16", **options)
        peaks.append(device.peak["dense"])
    # 4 bits of codes and 32 / 32 of scale and offset a weight, against 16.
    assert peaks[1] / peaks[0] == pytest.approx(5 / 16)


def test_only_int4_is_multiplied_packed(tiny_bundle: Callable[..., Path]) -> None:
    for kind in ("int8", "bf16"):
        with pytest.raises(runtime.ConfigError, match=f"the FFN is stored as {kind}, and torch multiplies int4 only"):
            runtime.load(tiny_bundle("llama", quantize=kind), device="cpu", weights="packed")
    with pytest.raises(runtime.ConfigError, match="weights: expected auto, bfloat16, packed, got 'int4'"):
        runtime.load(tiny_bundle("llama"), device="cpu", weights="int4")  # type: ignore[arg-type]


def test_where_the_product_fails_packed_is_refused(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coreinfer.runtime.engines.torch.packed_linear.packed_problem", lambda *_: "no such operator")
    with pytest.raises(runtime.ConfigError, match="weights 'packed': no such operator; use 'bfloat16'"):
        runtime.load(tiny_bundle("llama", quantize="int4"), device="cpu", weights="packed")
