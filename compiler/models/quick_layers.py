"""Layers on a CPU: what lies between their matrix products takes one pass over memory each, in C++.

transformers writes norms, rotations and gates as five to eight operations of torch, each of which reads and writes all
hidden states; with bfloat16 products they take twice the products' time. Modules keep their own code wherever gradients
are wanted, on other devices and dtypes, and where a trial shows that they compute something else.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from . import _elementwise

__all__ = ["quicken"]

Module = Callable[..., Any]
Activation = Literal["silu", "gelu_tanh"]
_ROTATE = "apply_rotary_pos_emb"
_DTYPES = (torch.float32, torch.bfloat16)
_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
_ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_tanh"}
_PARTS = ("gate_proj", "up_proj", "down_proj")
_TRIED_ROWS, _TRIED_SIZE, _TRIED_NEURONS = 5, 8, 150
_MAX_THREADS = 256


def quicken(model: nn.Module, activation: str) -> int:
    """Have a model's norms, gates and rotations computed in one pass each, as far as a trial finds them to be the same.

    Args:
        model: on its device, in the dtype that it computes in.
        activation: of its FFNs, as the manifest names it.
    Returns:
        Number of modules that are computed so.
    """
    found = 0
    for module in model.modules():
        dtype = _dtype_of(module)
        if dtype is None:
            continue
        quick = _quick_norm(module, dtype) or _quick_gate(module, activation, dtype) or _quick_attention(module, dtype)
        if quick is not None:
            module.forward = quick
            found += 1
    return found


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """That of a module's parameters, where they are on a CPU and all are of one that there are kernels for."""
    kinds = {(parameter.device.type, parameter.dtype) for parameter in module.parameters()}
    device, dtype = kinds.pop() if len(kinds) == 1 else ("", None)
    return dtype if device == "cpu" and dtype in _DTYPES else None


def _applies(values: torch.Tensor, like: torch.Tensor | None = None) -> bool:
    """Whether kernels may take the place of torch's operations."""
    same = like is None or like.dtype == values.dtype
    return same and values.device.type == "cpu" and values.dtype in _DTYPES and not torch.is_grad_enabled()


def _threads() -> int:
    return min(_MAX_THREADS, torch.get_num_threads())


def _array(values: torch.Tensor) -> npt.NDArray[np.uint16] | npt.NDArray[np.float32]:
    """A contiguous tensor's numbers in place, of bfloat16 its bits."""
    if values.dtype == torch.float32:
        return cast("npt.NDArray[np.float32]", values.detach().numpy())
    return cast("npt.NDArray[np.uint16]", values.detach().view(torch.int16).numpy().view(np.uint16))


def _quick_norm(module: nn.Module, dtype: torch.dtype) -> Module | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or eps is None or weight is None or weight.ndim != 1:
        return None
    x = _numbers((_TRIED_ROWS, len(weight)), dtype)
    for offset in (0.0, 1.0):
        quick = partial(_norm, module, module.forward, float(eps), offset)
        if _same(partial(quick, x), partial(module.forward, x)):
            return quick
    return None


def _norm(module: nn.Module, plain: Module, eps: float, offset: float, x: torch.Tensor) -> torch.Tensor:
    weight = cast("torch.Tensor", module.weight)
    if not _applies(x, weight):
        return cast("torch.Tensor", plain(x))
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    arrays = _array(x.view(-1, size)), _array(weight.contiguous()), _array(out.view(-1, size))
    _elementwise.norm(*arrays, eps=eps, offset=offset, num_threads=_threads())
    return out


def _quick_gate(module: nn.Module, activation: str, dtype: torch.dtype) -> Module | None:
    act = _ACTIVATION_NAMES.get(activation, activation)
    if act not in _ACTIVATIONS or not all(isinstance(getattr(module, name, None), nn.Linear) for name in _PARTS):
        return None
    quick, x = partial(_gate, module, module.forward, act), _numbers((_TRIED_ROWS, _TRIED_SIZE), dtype)
    with _small_parts(module, dtype):
        return quick if _same(partial(quick, x), partial(module.forward, x)) else None


@contextmanager
def _small_parts(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Put small matrices in the place of a gated FFN's own: a trial must not read all weights of a large model."""
    own, sizes = {name: module._modules[name] for name in _PARTS}, (_TRIED_SIZE, _TRIED_NEURONS)
    try:
        for name in _PARTS:
            num_inputs, num_outputs = reversed(sizes) if name == "down_proj" else sizes
            matrix = nn.Linear(num_inputs, num_outputs, bias=False, dtype=dtype)
            matrix.weight = nn.Parameter(_numbers((num_outputs, num_inputs), dtype), requires_grad=False)
            module._modules[name] = matrix
        yield
    finally:
        module._modules.update(own)


def _gate(module: Any, plain: Module, act: Activation, x: torch.Tensor) -> torch.Tensor:
    if not _applies(x):
        return cast("torch.Tensor", plain(x))
    gate, up = module.gate_proj(x), module.up_proj(x)
    if not (gate.is_contiguous() and up.is_contiguous() and _applies(gate, up)):
        return cast("torch.Tensor", plain(x))
    _elementwise.gate(_array(gate.view(-1)), _array(up.view(-1)), act=act, num_threads=_threads())
    return cast("torch.Tensor", module.down_proj(gate))


def _quick_attention(module: nn.Module, dtype: torch.dtype) -> Module | None:
    """Attention whose module rotates queries and keys by a function that does what ours does."""
    code = sys.modules[type(module).__module__]
    head_dim, rotate = getattr(module, "head_dim", None), getattr(code, _ROTATE, None)
    if not type(module).__name__.endswith("Attention") or not isinstance(head_dim, int) or rotate is None:
        return None
    query, key = (_numbers((1, _TRIED_ROWS, heads, head_dim), dtype).transpose(1, 2) for heads in (2, 1))
    cos, sin = _numbers((2, 1, _TRIED_ROWS, head_dim), dtype)
    try:
        plain = rotate(query, key, cos, sin)
    except (TypeError, RuntimeError):
        # Another function of that name.
        return None
    if not isinstance(plain, tuple) or [part.shape for part in plain] != [query.shape, key.shape]:
        return None
    # What is rotated is turned in place.
    same = _same(lambda: _rotate(rotate, query.clone(), key.clone(), cos, sin), lambda: plain)
    return partial(_attend, code, module.forward) if same else None


def _attend(code: ModuleType, plain: Module, *args: Any, **kwargs: Any) -> Any:
    """Run attention; its code finds the function by name."""
    if torch.is_grad_enabled():
        return plain(*args, **kwargs)
    with _rotating(code):
        return plain(*args, **kwargs)


@contextmanager
def _rotating(code: ModuleType) -> Iterator[None]:
    original = getattr(code, _ROTATE)
    setattr(code, _ROTATE, partial(_rotate, original))
    try:
        yield
    finally:
        setattr(code, _ROTATE, original)


def _rotate(
    plain: Module, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kw: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate (batch, heads, length, head size) queries and keys in place, which nobody else looks at."""
    turned = [query.transpose(1, 2), key.transpose(1, 2)]
    fits = all(values.is_contiguous() and _turns(values, cos, sin) for values in turned)
    if args or kw or not fits:
        return cast("tuple[torch.Tensor, torch.Tensor]", plain(query, key, cos, sin, *args, **kw))
    angles = [_array(values.contiguous().view(-1, values.shape[-1])) for values in (cos, sin)]
    for values in turned:
        _elementwise.turn(_array(values.view(-1, *values.shape[2:])), *angles, num_threads=_threads())
    return query, key


def _turns(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether (batch, length, heads, head size) can be turned by (1 or batch, length, head size) angles."""
    batch, length, _, size = values.shape
    shapes = ((1, length, size), (batch, length, size))
    return _applies(values, cos) and cos.shape in shapes and sin.shape == cos.shape and sin.dtype == cos.dtype


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Numbers to try a module on, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype)


def _same(quick: Callable[[], Any], plain: Callable[[], Any]) -> bool:
    """Whether two computations agree but for rounding."""
    with torch.inference_mode():
        found, expected = quick(), plain()
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    return all(_near(own.float(), other.float(), own.dtype) for own, other in pairs)


def _near(values: torch.Tensor, others: torch.Tensor, dtype: torch.dtype) -> bool:
    """Relative to the largest number of each row: sums of a down projection have rounding of their own."""
    largest = others.abs().amax(dim=-1, keepdim=True)
    return bool(((values - others).abs() <= (1e-5 if dtype == torch.float32 else 0.03) * largest + 1e-30).all())
