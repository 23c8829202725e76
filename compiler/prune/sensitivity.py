"""Stage `sensitivity`: what an error in an FFN's output costs the model, and so how many neurons each layer needs.

To second order, an error d_t in a layer's FFN output at token t costs KL = 1/2 d_t^T F d_t with the Fisher matrix
F = E[g g^T], g the gradient of -log p(y) with respect to that output, y drawn from the model itself. Gradients
count what an error does to later tokens through attention too. As in K-FAC (arXiv 1503.05671) and LLM Surgeon
(arXiv 2312.17244), F is averaged apart from the errors; unlike energies it compares one layer with another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.efforts import weighs_errors
from coreinfer.compiler.models.layerwise import (
    Batch,
    document_starts,
    head_logits,
    prepare_batches,
    run_layer,
    walk_layers,
)
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.samples import CURVE_TOKENS, FISHER_TOKENS
from coreinfer.compiler.text.corpus import SAMPLING, Document, spread_sample

from .products import gram_matrix
from .removal import BLOCK, System, remove_neurons

__all__ = ["fisher_matrices", "output_metrics", "removal_curves"]

Floats = npt.NDArray[np.float32]

_BATCH_TOKENS = 1024
"""Of which the hidden states between all layers are in memory."""
_CURVE_RIDGE = 1e-2
# A share of the mean diagonal, so that no direction of the output counts for nothing.
_DAMPING = 0.05


def fisher_matrices(
    loaded: LoadedModel, documents: Sequence[Document], cache: Cache, key: str, progress: Progress, *, seed: int
) -> torch.Tensor:
    """Fisher matrices of the FFN outputs, damped.

    Args:
        documents: calibration text, of which a sample is run forward and backward.
        seed: of the tokens that are drawn.
    Returns:
        (layers, hidden size, hidden size) float32 on the CPU.
    """
    sample = spread_sample(documents, FISHER_TOKENS)

    def compute() -> dict[str, Any]:
        return {"fisher": _fisher_sums(loaded, sample, progress, seed=seed).cpu().numpy()}

    fisher = torch.from_numpy(cache.arrays(key, compute)["fisher"])
    damping = _DAMPING * fisher.diagonal(dim1=1, dim2=2).mean(dim=1)
    return fisher + damping.clamp_min(1e-20)[:, None, None] * torch.eye(fisher.shape[1])


def output_metrics(
    config: CompileConfig,
    keep: float,
    loaded: LoadedModel,
    documents: Sequence[Document],
    cache: Cache,
    key: str,
    progress: Progress,
) -> torch.Tensor:
    """What errors in the FFN outputs cost: Fisher matrices where anything asks for them, else identities."""
    if keep < 1 and weighs_errors(config):
        fisher_key = stage_key("fisher", upstream=key, sampling=SAMPLING, draw="sums")
        return fisher_matrices(loaded, documents, cache, fisher_key, progress, seed=config.seed)
    return torch.eye(loaded.record.hidden_size).expand(loaded.record.num_layers, -1, -1)


def _fisher_sums(loaded: LoadedModel, documents: Sequence[Document], progress: Progress, *, seed: int) -> torch.Tensor:
    size = loaded.record.hidden_size
    sums = torch.zeros((loaded.record.num_layers, size, size), device=loaded.device)
    generator = torch.Generator(device=loaded.device).manual_seed(seed)
    starts, num_tokens = document_starts(documents), 0
    with progress.stage("sensitivity", len(documents)) as advance, _parameters_fixed(loaded), torch.no_grad():
        for batch in prepare_batches(loaded, documents, starts, batch_tokens=_BATCH_TOKENS):
            # The first token, which often only serves as an attention sink, would hide all others.
            counted = batch.mask.clone()
            counted[:, 0] = False
            for layer, gradient in _output_gradients(loaded, batch, generator):
                gradients = gradient[counted].float()
                sums[layer] += gradients.T @ gradients
            num_tokens += int(counted.sum())
            advance(len(batch.mask))
    return sums / max(1, num_tokens)


def _output_gradients(
    loaded: LoadedModel, batch: Batch, generator: torch.Generator
) -> Iterator[tuple[int, torch.Tensor]]:
    """Go back through the layers one at a time, so that no more than one layer's weights are wanted at once.

    Yields:
        Each layer, the last first, and the gradient of its FFN output: (batch, length, hidden size).
    """
    entering = [batch.hidden]
    for layer in range(loaded.record.num_layers):
        entering.append(run_layer(loaded, layer, batch, entering[-1]).output)
    gradient = _head_gradient(loaded, batch, entering.pop(), generator)
    for layer in reversed(range(loaded.record.num_layers)):
        of_output, gradient = _layer_gradients(loaded, layer, batch, entering.pop(), gradient)
        yield layer, of_output


def _head_gradient(loaded: LoadedModel, batch: Batch, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of -log p(y), y drawn from the model, by what leaves the layers; one document after another."""
    gradient = torch.zeros_like(hidden)
    for row, length in enumerate(batch.mask.sum(dim=1).tolist()):
        leaf = hidden[row : row + 1, :length].detach().requires_grad_()
        with torch.enable_grad():
            log_p = head_logits(loaded, batch.token_ids[row : row + 1, :length], leaf)[0].float().log_softmax(dim=-1)
            drawn = _draw(log_p.detach(), generator)
            (gradient[row : row + 1, :length],) = torch.autograd.grad(-log_p.gather(1, drawn).sum(), leaf)
    return gradient


def _draw(log_p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a token of each of (tokens, vocabulary) distributions: (tokens, 1).

    By one random number a distribution; `torch.multinomial` takes one for each entry of the vocabulary.
    """
    sums = log_p.exp().cumsum(dim=-1)
    chances = torch.rand((len(sums), 1), generator=generator, device=sums.device) * sums[:, -1:]
    # Rounding could put a chance on the last sum itself.
    return torch.searchsorted(sums, chances, right=True).clamp_max(sums.shape[1] - 1)


def _layer_gradients(
    loaded: LoadedModel, layer: int, batch: Batch, entering: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by the FFN's output and by what enters the layer, of the gradient by what leaves it."""
    outputs: list[torch.Tensor] = []
    hook = loaded.projection(layer, "down").register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    try:
        with torch.enable_grad():
            leaf = entering.detach().requires_grad_()
            leaving = run_layer(loaded, layer, batch, leaf).output
            of_output, of_entering = torch.autograd.grad(leaving, (outputs[0], leaf), gradient)
    finally:
        hook.remove()
    return of_output.reshape(entering.shape), of_entering


@contextmanager
def _parameters_fixed(loaded: LoadedModel) -> Iterator[None]:
    """Parameters need no gradients meanwhile."""
    needs = [(parameter, parameter.requires_grad) for parameter in loaded.model.parameters()]
    try:
        for parameter, _ in needs:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in needs:
            parameter.requires_grad_(needed)


def removal_curves(
    loaded: LoadedModel,
    documents: Sequence[Document],
    fisher: torch.Tensor,
    cache: Cache,
    key: str,
    progress: Progress,
) -> Floats:
    """Estimate what it costs to remove more and more neurons from each layer, with repair.

    Returns:
        (layers, removed blocks of 32 neurons + 1) nats per token, from no block removed to all but one.
    """
    sample = spread_sample(documents, CURVE_TOKENS)

    def compute() -> dict[str, Any]:
        curves = []
        with progress.stage("curves", loaded.record.num_layers) as advance:
            for layer in walk_layers(loaded, sample, advance):
                weights = loaded.projection(layer.layer, "down").weight.detach().float().T.contiguous()
                gram = gram_matrix(layer.activations) / max(1, len(layer.activations))
                system = System(gram=gram, cross=gram @ weights, own=weights, ridge=_CURVE_RIDGE)
                metric = fisher[layer.layer].to(weights.device)
                curves.append(0.5 * remove_neurons(system, metric, keep=min(BLOCK, len(gram)), step=BLOCK).losses)
        return {"curves": np.stack(curves).astype(np.float32)}

    return cache.arrays(key, compute)["curves"]
