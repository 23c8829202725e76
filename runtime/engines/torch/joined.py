"""Linear modules as all families have them: what transformers has as one is taken apart, what it has turned is turned.

FFNs are narrowed, and all is stored, part by part, each a matrix (outputs, inputs).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from coreinfer.bundles.families import Family, resolve
from torch import nn

__all__ = ["put_together", "take_apart"]


class _Joined(nn.Module):
    """Parts of any width, whose outputs lie side by side.

    Args:
        num_heads: the outputs lie head by head, so many; None where they lie part by part.
    """

    def __init__(self, parts: Mapping[str, nn.Linear], num_heads: int | None) -> None:
        super().__init__()
        self._num_heads = num_heads
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) -> (..., sum of the parts' outputs)."""
        return _joined([part(inputs) for part in self.children()], self._num_heads, dim=-1)


def take_apart(model: Any, family: Family) -> None:
    """Turn a model's turned modules, and put parts in the place of its joined ones.

    Their weights are views of what was there, but for parts that lay head by head, which are copied.

    Args:
        model: that transformers built, with or without memory; one that is apart already stays as it is.
    """
    for layer in resolve(model, family.layers) if family.joined or family.transposed else ():
        for path in family.transposed:
            module = layer.get_submodule(path)
            if not isinstance(module, nn.Linear | _Joined):
                layer.set_submodule(path, _linear(module.weight.detach().T, module.bias.detach()))
        for path, names in family.joined.items():
            whole = layer.get_submodule(path)
            if isinstance(whole, nn.Linear):
                parts = dict(zip(names, _parts(whole, names, family, model.config), strict=True))
                layer.set_submodule(path, _Joined(parts, _heads_of(family, model.config)))


def _heads_of(family: Family, config: Any) -> int | None:
    return int(config.num_attention_heads) if family.joined_by_head else None


def _parts(whole: nn.Linear, names: tuple[str, ...], family: Family, config: Any) -> list[nn.Linear]:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    shares = [{"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}.get(name, 1) for name in names]
    rows = [whole.out_features * share // sum(shares) for share in shares]
    by_head = _heads_of(family, config)
    weights = _apart(whole.weight.detach(), rows, by_head)
    biases: Sequence[torch.Tensor | None] = [None] * len(rows)
    if whole.bias is not None:
        biases = _apart(whole.bias.detach(), rows, by_head)
    return [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _apart(whole: torch.Tensor, rows: list[int], num_heads: int | None) -> Sequence[torch.Tensor]:
    """Parts of (rows, ...)."""
    if num_heads is None:
        parts: Sequence[torch.Tensor] = whole.split(rows)
        return parts
    heads = whole.unflatten(0, (num_heads, -1)).split([count // num_heads for count in rows], dim=1)
    return [part.flatten(0, 1) for part in heads]


def _joined(parts: Sequence[torch.Tensor], num_heads: int | None, *, dim: int) -> torch.Tensor:
    if num_heads is None:
        return torch.cat(list(parts), dim=dim)
    dim %= parts[0].ndim
    heads = [part.unflatten(dim, (num_heads, -1)) for part in parts]
    return torch.cat(heads, dim=dim + 1).flatten(dim, dim + 1)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def put_together(state: Mapping[str, torch.Tensor], family: Family, config: Any) -> dict[str, torch.Tensor]:
    """Give a model's tensors the names and shapes that transformers knows: the opposite of `take_apart`."""
    first = {f".{path}.{names[0]}.": (path, names) for path, names in family.joined.items()}
    others = tuple(f".{path}.{name}." for path, names in family.joined.items() for name in names[1:])
    turned = tuple(f".{path}.weight" for path in family.transposed)
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if any(other in name for other in others):
            continue
        part = next((part for part in first if part in name), None)
        if part is None:
            whole[name] = tensor
            continue
        path, names = first[part]
        parts = [state[name.replace(part, f".{path}.{other}.")] for other in names]
        whole[name.replace(part, f".{path}.")] = _joined(parts, _heads_of(family, config), dim=0)
    return {name: tensor.T.contiguous() if name.endswith(turned) else tensor for name, tensor in whole.items()}
