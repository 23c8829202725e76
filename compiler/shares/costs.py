"""What it costs the whole model to leave out inputs of one group: measured, one group after another."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Advance
from coreinfer.runtime.engines.torch.wanted_inputs import Groups

from .inputs import Norms, groups_of, inputs_masked
from .texts import BegunText

__all__ = ["group_costs"]

Floats = npt.NDArray[np.float32]


def group_costs(
    loaded: LoadedModel,
    texts: Sequence[BegunText],
    norms: Norms,
    thresholds: Mapping[Groups, float],
    advance: Advance,
) -> Floats:
    """Measure KL(whole || with inputs of one group left out) of each group alone, with the weights in use.

    Args:
        thresholds: of each group.
        advance: called once a text.
    Returns:
        (layers, 4) float32, nats a token.
    """
    sums, num_tokens = np.zeros(len(thresholds)), 0
    with torch.inference_mode():
        for text in texts:
            outputs: list[Any] = []
            with _outputs_kept(loaded, outputs):
                logits = loaded.head(text.states(loaded)).float()
            chances = logits.softmax(dim=-1)
            whole = _log_chances(chances, logits)
            for number, place in enumerate(groups_of(loaded)):
                masks = inputs_masked(loaded, norms, {place: thresholds[place]})
                with masks, _layers_known(loaded, outputs[: place[0]]):
                    logits = loaded.head(text.states(loaded)).float()
                sums[number] += float((whole - _log_chances(chances, logits)).sum())
            num_tokens += len(whole)
            advance()
    return (sums / max(1, num_tokens)).reshape(-1, len(INPUT_GROUPS)).astype(np.float32)


def _log_chances(chances: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean log-probability that logits give to tokens of some chances, both (tokens, vocabulary): (tokens,)."""
    # Two passes over the vocabulary instead of the five of a log-softmax and a sum.
    return ((chances * logits).sum(dim=-1) - logits.logsumexp(dim=-1)).double()


@contextmanager
def _outputs_kept(loaded: LoadedModel, outputs: list[Any]) -> Iterator[None]:
    """Keep what each layer puts out."""
    with ExitStack() as stack:
        for layer in loaded.layers:
            handle = layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
            stack.callback(handle.remove)
        yield


@contextmanager
def _layers_known(loaded: LoadedModel, outputs: Sequence[Any]) -> Iterator[None]:
    """Run the block without computing the first layers, whose outputs are known; their caches do not grow."""
    layers: list[Any] = loaded.layers[: len(outputs)]
    try:
        for layer, output in zip(layers, outputs, strict=True):
            layer.forward = _giving(output)
        yield
    finally:
        for layer in layers:
            if "forward" in vars(layer):
                del layer.forward


def _giving(output: Any) -> Any:
    return lambda *_inputs, **_arguments: output
