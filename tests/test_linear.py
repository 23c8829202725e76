"""Linear modules that multiply by oneDNN give what torch's own do."""

import copy

import pytest
import torch
from coreinfer.compiler.models import linear
from torch import nn


class Special(nn.Linear):
    """Of which nothing is known."""


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Sequential, nn.Sequential]:
    """Plain, and the same by oneDNN."""
    monkeypatch.setattr(linear, "is_amd", lambda: True)
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 7, bias=False), Special(7, 5))
    fast = copy.deepcopy(plain)
    linear.multiply_fast(fast)
    assert [type(module) is type(own) for module, own in zip(plain, fast, strict=True)] == [False, True, False, True]
    return plain, fast


@pytest.mark.parametrize("shape", [(1, 24), (33, 24), (3, 11, 24), (0, 24), (2, 0, 24), (24,)])
@torch.inference_mode()
def test_products_are_equal(shape: tuple[int, ...], models: tuple[nn.Sequential, nn.Sequential]) -> None:
    plain, fast = models
    inputs = torch.randn(shape)
    torch.testing.assert_close(fast(inputs), plain(inputs), atol=1e-5, rtol=1e-5)
    turned = torch.randn((*shape[:-1], 24, 2)).transpose(-1, -2)
    torch.testing.assert_close(fast(turned), plain(turned), atol=1e-5, rtol=1e-5)


def test_gradients_and_other_dtypes_are_torchs(models: tuple[nn.Sequential, nn.Sequential]) -> None:
    for model in models:
        model(torch.ones(2, 24)).sum().backward()
    for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert own.grad is not None
        assert torch.equal(own.grad, other.grad if other.grad is not None else torch.empty(0))
    plain, fast = (model.double() for model in models)
    with torch.inference_mode():
        assert torch.equal(plain(torch.ones(2, 24).double()), fast(torch.ones(2, 24).double()))


def test_weights_may_be_replaced(models: tuple[nn.Sequential, nn.Sequential]) -> None:
    _, fast = models
    fast[0].weight = nn.Parameter(torch.zeros(40, 24), requires_grad=False)
    fast[0].bias = nn.Parameter(torch.ones(40), requires_grad=False)
    with torch.inference_mode():
        assert torch.equal(fast[0](torch.ones(1, 24)), torch.ones(1, 40))


def test_other_cpus_keep_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_amd", lambda: False)
    model = nn.Sequential(nn.Linear(4, 4))
    linear.multiply_fast(model)
    assert type(model[0]) is nn.Linear
