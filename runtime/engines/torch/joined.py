"""Linear modules that transformers has as one, taken apart: FFNs are narrowed, and all is stored, part by part."""

from collections.abc import Mapping
from typing import Any

import torch
from coreinfer.bundles.families import Family, resolve
from torch import nn

__all__ = ["put_together", "take_apart"]


class _Joined(nn.Module):
    """Parts of any width, whose outputs lie side by side."""

    def __init__(self, parts: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) -> (..., sum of the parts' outputs)."""
        return torch.cat([part(inputs) for part in self.children()], dim=-1)


def take_apart(model: Any, family: Family) -> None:
    """Put parts in the place of a model's joined modules; their weights are views of what was one.

    Args:
        model: that transformers built, with or without memory; one that is apart already stays as it is.
    """
    for layer in resolve(model, family.layers) if family.joined else ():
        for path, names in family.joined.items():
            whole = layer.get_submodule(path)
            if isinstance(whole, nn.Linear):
                layer.set_submodule(path, _Joined(dict(zip(names, _parts(whole, names, model.config), strict=True))))


def _parts(whole: nn.Linear, names: tuple[str, ...], config: Any) -> list[nn.Linear]:
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    shares = [{"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}.get(name, 1) for name in names]
    rows = [whole.out_features * share // sum(shares) for share in shares]
    weights = whole.weight.detach().split(rows)
    biases = [None] * len(rows) if whole.bias is None else whole.bias.detach().split(rows)
    return [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def put_together(state: Mapping[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """Give a model's tensors the names and shapes that transformers knows: parts are put one after another."""
    first = {f".{path}.{names[0]}.": (path, names) for path, names in family.joined.items()}
    others = tuple(f".{path}.{name}." for path, names in family.joined.items() for name in names[1:])
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if any(other in name for other in others):
            continue
        part = next((part for part in first if part in name), None)
        if part is None:
            whole[name] = tensor
            continue
        path, names = first[part]
        joined = [state[name.replace(part, f".{path}.{other}.")] for other in names]
        whole[name.replace(part, f".{path}.")] = torch.cat(joined)
    return whole
