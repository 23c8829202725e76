"""What layers do between products, in one pass each: as torch does it, and only where it is the same."""

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles.families import FAMILIES, family_by_name
from coreinfer.compiler.models import _elementwise
from coreinfer.compiler.models.quick_layers import quicken
from torch import nn
from transformers.models.llama import modeling_llama

from .model_factory import build_model

ISAS = _elementwise.available_isas()
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 0.004}
GATES = {"silu": nn.functional.silu, "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh")}
NOT_QUICK = ("opt", "gpt_neox", "gpt2")
"""Families without anything that is taken: LayerNorm, ungated FFNs, queries and keys in one matrix."""


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def array(tensor: torch.Tensor) -> Any:
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy().view(np.uint16)


def is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the last place of the dtype, beside the largest number of a row for sums that nearly vanish."""
    slack = 1e-6 * expected.abs().amax(dim=-1, keepdim=True)
    return bool(((found.double() - expected).abs() <= ROUNDING[found.dtype] * expected.abs() + slack).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 16, 37, 576])
def test_norms(isa: str, dtype: torch.dtype, size: int) -> None:
    x, weight = 3 * values((301, size), dtype), values((size,), dtype, 1)
    out = torch.full_like(x, torch.nan)
    _elementwise.norm(array(x), array(weight), array(out), eps=1e-3, offset=1.0, num_threads=2, isa=isa)
    wide = x.double()
    assert is_near(out, wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-3).rsqrt() * (1 + weight.double()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [1, 15, 70_001])
def test_gates(isa: str, dtype: torch.dtype, act: Any, size: int) -> None:
    gate, up = 8 * values((size,), dtype), values((size,), dtype, 1)
    expected = GATES[act](gate.double()) * up.double()
    _elementwise.gate(array(gate), array(up), act=act, num_threads=3, isa=isa)
    assert is_near(gate, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_gates_of_extreme_numbers(isa: str) -> None:
    gate = torch.tensor([0.0, 1e4, -1e4, 1e30, torch.inf, torch.nan])
    _elementwise.gate(array(gate), array(torch.ones(6)), act="silu", num_threads=1, isa=isa)
    np.testing.assert_allclose(gate.numpy(), [0, 1e4, 0, 1e30, np.inf, np.nan], atol=1e-30)
    bits = torch.tensor([torch.nan, -torch.inf, 3e38, 1.0]).to(torch.bfloat16)
    out = torch.empty_like(bits)
    _elementwise.gate(array(bits), array(torch.ones(4).to(torch.bfloat16)), act="gelu_tanh", num_threads=1, isa=isa)
    assert out.shape == bits.shape
    assert bits.isnan().tolist()[0]
    assert bits[2:].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "angles"), [(3, 1), (3, 3)])
@pytest.mark.parametrize("size", [2, 10, 64])
def test_rotations(isa: str, dtype: torch.dtype, batch: int, angles: int, size: int) -> None:
    x, (cos, sin) = values((batch, 33, 3, size), dtype), values((2, angles, 33, size), dtype, 1)
    expected, _ = modeling_llama.apply_rotary_pos_emb(
        x.double().transpose(1, 2), x.double().transpose(1, 2), cos.double(), sin.double()
    )
    turned = [array(part.reshape(-1, size)) for part in (cos, sin)]
    _elementwise.turn(array(x.view(-1, 3, size)), *turned, num_threads=2, isa=isa)
    assert is_near(x, expected.transpose(1, 2))


def test_wrong_arrays_are_refused() -> None:
    x: npt.NDArray[np.float32] = np.zeros((4, 6), dtype=np.float32)
    for weight in (np.zeros(5, dtype=np.float32), np.zeros(6, dtype=np.uint16), np.zeros((6, 1), dtype=np.float32)):
        with pytest.raises(ValueError, match="weight: expected"):
            _elementwise.norm(x, weight, x.copy(), eps=0.0, offset=0.0, num_threads=1)
    with pytest.raises(ValueError, match="out: expected a C-contiguous array"):
        _elementwise.norm(x, x[0].copy(), x[::-1], eps=0.0, offset=0.0, num_threads=1)
    with pytest.raises(ValueError, match="up: expected a shape"):
        _elementwise.gate(x.ravel(), x.ravel()[:3].copy(), act="silu", num_threads=1)
    with pytest.raises(ValueError, match="act: expected silu or gelu_tanh, got relu"):
        _elementwise.gate(x.ravel(), x.ravel().copy(), act="relu", num_threads=1)  # type: ignore[arg-type]
    heads = np.zeros((4, 2, 6), dtype=np.float32)
    with pytest.raises(ValueError, match="cos: expected angles for each token"):
        _elementwise.turn(heads, np.zeros((3, 6), np.float32), np.zeros((3, 6), np.float32), num_threads=1)
    with pytest.raises(ValueError, match="sin: expected"):
        _elementwise.turn(heads, np.zeros((4, 6), np.float32), np.zeros((2, 6), np.float32), num_threads=1)
    with pytest.raises(ValueError, match="isa: expected auto"):
        _elementwise.gate(x.ravel(), x.ravel().copy(), act="silu", num_threads=1, isa="none")


def quick_modules(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if "forward" in vars(module)]


def activation_of(name: str, model: Any) -> str:
    family = family_by_name(name)
    return family.activation or str(getattr(model.config, family.activation_field))


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_quick_models_compute_what_they_computed(name: str) -> None:
    model: Any = build_model(name).eval()
    ids = torch.randint(0, model.config.vocab_size, (3, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids).logits
        assert quicken(model, activation_of(name, model)) == len(quick_modules(model))
        assert bool(quick_modules(model)) == (name not in NOT_QUICK)
        found = model(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 5e-6


def test_gates_that_are_cut_off_are_left_alone() -> None:
    model = build_model("gemma3n", activation_sparsity_pattern=[0.6, 0.0, 0.75]).eval()
    quicken(model, "gelu_pytorch_tanh")
    assert quick_modules(model).count("Gemma3nTextMLP") == 1


def test_bfloat16_is_no_further_from_the_truth() -> None:
    exact: Any = build_model("llama").eval()
    model: Any = build_model("llama").eval().to(torch.bfloat16)
    ids = torch.randint(0, model.config.vocab_size, (3, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        truth, plain = exact(ids).logits, model(ids).logits.float()
        quicken(model, "silu")
        quick = model(ids).logits.float()
    assert float((quick - truth).norm()) < 1.05 * float((plain - truth).norm())
    assert not torch.equal(quick, plain)


def test_gradients_go_through_the_modules_own_code() -> None:
    ids = torch.arange(1, 40)[None]
    found = []
    for is_quick in (False, True):
        model: Any = build_model("qwen3").eval()
        if is_quick:
            quicken(model, "silu")
        model(ids, labels=ids).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, quick) for plain, quick in zip(*found, strict=True))


class OddRMSNorm(nn.Module):
    """Named as others are, and not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(values((24,), torch.float32)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.abs().mean(dim=-1, keepdim=True) * self.weight


def test_what_computes_something_else_is_left_alone() -> None:
    norm = OddRMSNorm()
    assert quicken(norm, "silu") == 0
    # The gate of a model whose config says otherwise than its code.
    model = build_model("llama").eval()
    quicken(model, "gelu_pytorch_tanh")
    assert "LlamaMLP" not in quick_modules(model)
    assert "LlamaRMSNorm" in quick_modules(model)


def test_the_library_is_as_it_was_after_a_failure() -> None:
    own = sys.modules[modeling_llama.__name__].apply_rotary_pos_emb
    model: Any = build_model("llama").eval()
    quicken(model, "silu")
    with torch.inference_mode(), pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    attention = model.model.layers[0].self_attn
    with torch.inference_mode(), pytest.raises((TypeError, RuntimeError)):
        attention(torch.zeros(1, 3, 5), position_embeddings=(torch.zeros(1), torch.zeros(1)))
    assert modeling_llama.apply_rotary_pos_emb is own
