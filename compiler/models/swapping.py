"""Other weights in a model for a while: each layer has them only while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial

import torch
from coreinfer.bundles.families import assign_ffn, ffn_tensors
from coreinfer.compiler.prune.narrow import Cut
from torch import nn

from .load import LoadedModel

__all__ = ["Parameters", "assign_values", "ffn_in_use", "parameters_in_use", "values_of"]

Weights = Mapping[str, torch.Tensor]
Parameters = Mapping[str, nn.Parameter]


@contextmanager
def ffn_in_use(loaded: LoadedModel, cut: Cut, cluster: int) -> Iterator[None]:
    """Run the block with one cluster's FFN in the model."""
    with ExitStack() as stack:
        for index, layer in enumerate(loaded.layers):
            own = partial(ffn_tensors, layer, loaded.family)
            assign = partial(assign_ffn, layer, loaded.family)
            stack.enter_context(_in_use(loaded, layer, partial(cut, index, cluster), own, assign))
        yield


@contextmanager
def parameters_in_use(
    loaded: LoadedModel, layer: nn.Module, parameters: Parameters, weights: Callable[[], Weights]
) -> Iterator[None]:
    """Run the block with other values of some of a layer's parameters."""
    with _in_use(loaded, layer, weights, partial(values_of, parameters), partial(assign_values, parameters)):
        yield


def values_of(parameters: Parameters) -> Weights:
    """Return what parameters hold, by the same names."""
    return {name: parameter.data for name, parameter in parameters.items()}


def assign_values(parameters: Parameters, values: Weights) -> None:
    """Have parameters hold other values."""
    for name, value in values.items():
        parameters[name].data = value


@contextmanager
def _in_use(
    loaded: LoadedModel,
    layer: nn.Module,
    weights: Callable[[], Weights],
    own: Callable[[], Weights],
    assign: Callable[[Weights], None],
) -> Iterator[None]:
    """Assign what `weights` returns when the layer is entered, and what `own` returned before that when it is left.

    The weights are made once, but each time where a model's stay in their file: all layers' together would be too
    much then.
    """
    make = weights if loaded.mapped else cache(weights)
    before: dict[str, torch.Tensor] = {}

    def enter(_layer: nn.Module, _inputs: object) -> None:
        before.update(own())
        assign(make())

    def leave(*_: object) -> None:
        if before:
            # A mixture keeps what it is given, which must not be emptied with this.
            assign(dict(before))
            before.clear()

    # First of all that is done to a layer as it is entered, and last as it is left.
    handles = [layer.register_forward_pre_hook(enter, prepend=True), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        leave()
        for handle in handles:
            handle.remove()
