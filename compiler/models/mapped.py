"""Weights that stay in their file: a model larger than memory is run one layer at a time.

transformers maps safetensors files, so that weights in their stored dtype take no memory of their own: the system reads
pages as they are wanted and drops them as it likes. What is computed in another dtype is converted while a layer runs.
"""

from functools import partial

import torch
from coreinfer.bundles.families import Family, resolve
from torch import nn

__all__ = ["convert_on_use"]

_HEAD_ROWS = 8192
"""Rows of the output head that are converted at once."""

Stored = list[tuple[nn.Module, str, nn.Parameter]]


def convert_on_use(model: nn.Module, family: Family, dtype: torch.dtype) -> None:
    """Have each layer's parameters converted to `dtype` while the layer runs, and put back after it."""
    layers = list(resolve(model, family.layers))
    embedding, head = resolve(model, family.embedding), model.get_output_embeddings()  # type: ignore[operator]
    elsewhere = {id(part) for layer in layers for part in layer.modules()} | {id(embedding), id(head)}
    others = [module for module in model.modules() if id(module) not in elsewhere]
    for layer in layers:
        _convert(layer, list(layer.modules()), dtype)
    for module in others:
        if next(module.parameters(recurse=False), None) is not None:
            _convert(module, [module], dtype)
    embedding.forward = partial(_embedded, embedding, dtype)
    head.forward = partial(_blocked, head, dtype)


def _embedded(embedding: nn.Embedding, dtype: torch.dtype, token_ids: torch.Tensor) -> torch.Tensor:
    """Convert the rows that are looked up; Gemma scales them, by a number that the stored dtype would round."""
    scale: float = getattr(embedding, "scalar_embed_scale", 1.0)
    return nn.functional.embedding(token_ids, embedding.weight).to(dtype) * scale


def _blocked(head: nn.Linear, dtype: torch.dtype, hidden: torch.Tensor) -> torch.Tensor:
    """Multiply by the output head some rows at a time."""
    parts = [nn.functional.linear(hidden, rows.to(dtype)) for rows in head.weight.split(_HEAD_ROWS)]
    logits = torch.cat(parts, dim=-1)
    return logits if head.bias is None else logits + head.bias.to(dtype)


def _convert(module: nn.Module, parts: list[nn.Module], dtype: torch.dtype) -> None:
    stored: Stored = []

    def enter(_module: nn.Module, _inputs: object) -> None:
        for part in parts:
            for name, parameter in part.named_parameters(recurse=False):
                stored.append((part, name, parameter))
                # A new parameter, not new data: what autograd keeps of the layer must stay as it was.
                _set(part, name, _fixed(parameter.detach().to(dtype)))

    def leave(*_: object) -> None:
        while stored:
            _set(*stored.pop())

    # What is assigned to a layer as it is entered must be there first.
    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def _fixed(values: torch.Tensor) -> nn.Parameter:
    with torch.inference_mode(False):
        return nn.Parameter(values, requires_grad=False)


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module._parameters[name] = parameter
