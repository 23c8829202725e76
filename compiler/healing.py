"""Stage `heal`: distil the dense model into the narrow one.

What all clusters share is trained: one change to the dense FFN's matrices, of which every cluster takes the rows of its
own neurons on top of its own repaired weights. Each step takes documents of one cluster; as at run time their first
halves are read dense, and the loss is KL(dense || narrow) on the second halves. AdamW (arXiv 1711.05101) with a
cosine schedule (arXiv 1608.03983).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from coreinfer.bundles.families import cache_argument, resolve
from torch.func import functional_call
from transformers import DynamicCache

from .cache import Cache
from .config import CompileConfig
from .corpus import Document, split_point
from .models import LoadedModel
from .narrowing import Bits, Labels, NarrowModel, bf16_bits, narrow_layer
from .progress import Progress

__all__ = ["HealInputs", "heal"]

_STEP_TOKENS = 2048
"""Tokens of a step's documents; half of them are decoded narrow."""
_WARM_UP = 0.05
_CHECKPOINT_STEPS = 50
_BETAS = (0.9, 0.95)

Changes = dict[str, torch.Tensor]
"""Layer and role, as "3.gate" -> (ffn_dim, hidden size) float32 that is added to a matrix, a row for each neuron."""


@dataclass(frozen=True, kw_only=True)
class HealInputs:
    """What the narrow model is trained on.

    Attributes:
        documents: calibration text.
        labels: (documents,) the cluster of each.
        narrow: the narrow model to start from.
    """

    config: CompileConfig
    loaded: LoadedModel
    documents: Sequence[Document]
    labels: Labels
    narrow: NarrowModel


def heal(inputs: HealInputs, cache: Cache, key: str, progress: Progress) -> NarrowModel:
    """Train for `config.heal_steps` steps; an interrupted training goes on from its last checkpoint."""
    arrays = cache.find_arrays(f"{key}-healed")
    if arrays is None:
        changes = _train(inputs, cache, key, progress)
        arrays = cache.arrays(f"{key}-healed", lambda: _changed_weights(inputs, changes))
    return replace(inputs.narrow, **_as_fields(inputs, arrays))


def _train(inputs: HealInputs, cache: Cache, key: str, progress: Progress) -> Changes:
    changes = _no_changes(inputs.loaded)
    for parameter in inputs.loaded.model.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(changes.values(), lr=1.0, betas=_BETAS, weight_decay=0.0)
    first = _restore(cache, key, changes, optimizer)
    num_steps = inputs.config.heal_steps
    with progress.stage("heal", num_steps) as advance:
        advance(first)
        for step in range(first, num_steps):
            for group in optimizer.param_groups:
                group["lr"] = inputs.config.heal_rate * _schedule(step, num_steps)
            _step(inputs, changes, optimizer, step)
            if (step + 1) % _CHECKPOINT_STEPS == 0 and step + 1 < num_steps:
                cache.store(f"{key}-checkpoint", _checkpoint(changes, optimizer, step + 1))
            advance()
    return changes


def _schedule(step: int, num_steps: int) -> float:
    """Share of the full learning rate: a short linear rise, then half a cosine down to nothing."""
    warm_up = max(1, round(_WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


def _no_changes(loaded: LoadedModel) -> Changes:
    shape = (loaded.record.ffn_dim, loaded.record.hidden_size)
    return {
        f"{layer}.{role}": torch.zeros(shape, device=loaded.device, requires_grad=True)
        for layer in range(loaded.record.num_layers)
        for role in loaded.family.projections
    }


def _step(inputs: HealInputs, changes: Changes, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Train on some documents of one cluster; which ones depends on the seed and the step alone."""
    cluster, token_ids = _draw(inputs, step)
    token_ids = token_ids.to(inputs.loaded.device)
    start = split_point(token_ids.shape[1])
    cache = DynamicCache()
    with torch.no_grad():
        dense = inputs.loaded.forward(token_ids, cache)[:, start:]
        log_p = dense.float().log_softmax(dim=-1)
        cache.crop(start - token_ids.shape[1])
    weights = _narrow_weights(inputs, changes, cluster)
    arguments = {"input_ids": token_ids[:, start:], "use_cache": True, **cache_argument(inputs.loaded.model, cache)}
    narrow = functional_call(inputs.loaded.model, weights, kwargs=arguments).logits
    log_q = narrow.float().log_softmax(dim=-1)
    loss = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([change for change in changes.values() if change.grad is not None], 1.0)
    optimizer.step()


def _draw(inputs: HealInputs, step: int) -> tuple[int, torch.Tensor]:
    """Draw a cluster by its tokens and documents of like length from it, cut to the shortest: (documents, length)."""
    generator = np.random.default_rng((inputs.config.seed, step))
    lengths = np.array([len(document.token_ids) for document in inputs.documents])
    long_enough = np.flatnonzero(lengths >= 4)
    first = int(generator.choice(long_enough, p=lengths[long_enough] / lengths[long_enough].sum()))
    cluster = int(inputs.labels[first])
    members = long_enough[inputs.labels[long_enough] == cluster]
    # Chance decides among documents of one length, and a little beyond.
    distance = np.abs(lengths[members] - lengths[first]) + generator.random(len(members)) * 8
    distance[members == first] = -1
    chosen = members[np.argsort(distance)][: max(1, _STEP_TOKENS // int(lengths[first]))]
    length = int(lengths[chosen].min())
    return cluster, torch.tensor([inputs.documents[index].token_ids[:length] for index in chosen])


def _narrow_weights(inputs: HealInputs, changes: Mapping[str, torch.Tensor], cluster: int) -> dict[str, torch.Tensor]:
    """Tensors of one cluster's FFN under the model's own names, differentiable in the changes."""
    loaded, weights = inputs.loaded, {}
    for layer in range(loaded.record.num_layers):
        base = narrow_layer(loaded, inputs.narrow, layer, cluster)
        index = _ids(inputs, layer, cluster)
        for role, path in loaded.family.projections.items():
            name = f"{loaded.family.layers}.{layer}.{path}"
            own = base[role]
            weights[f"{name}.weight"] = (own.float() + _oriented(changes[f"{layer}.{role}"][index], role)).to(own.dtype)
            if resolve(loaded.layers[layer], path).bias is not None:
                weights[f"{name}.bias"] = base[f"{role}_bias"]
    return weights


def _oriented(rows: torch.Tensor, role: str) -> torch.Tensor:
    """Turn rows, one a neuron, into the shape of the role's matrix."""
    return rows.T if role == "down" else rows


def _ids(inputs: HealInputs, layer: int, cluster: int) -> torch.Tensor:
    return torch.from_numpy(inputs.narrow.choice.neuron_ids[cluster][layer]).long().to(inputs.loaded.device)


def _changed_weights(inputs: HealInputs, changes: Changes) -> dict[str, Bits]:
    """Every cluster's healed matrices, a row for each neuron: "cluster.layer.role" -> (kept, hidden size) bits."""
    arrays = {}
    for cluster in range(len(inputs.narrow.choice.neuron_ids)):
        for layer in range(inputs.loaded.record.num_layers):
            base, index = narrow_layer(inputs.loaded, inputs.narrow, layer, cluster), _ids(inputs, layer, cluster)
            for role in inputs.loaded.family.projections:
                change = changes[f"{layer}.{role}"].detach()[index]
                arrays[f"{cluster}.{layer}.{role}"] = bf16_bits(_oriented(base[role], role).float() + change)
    return arrays


def _as_fields(inputs: HealInputs, arrays: Mapping[str, Bits]) -> dict[str, Any]:
    """The fields of a narrow model that healing changes."""
    clusters, layers = range(len(inputs.narrow.choice.neuron_ids)), range(inputs.loaded.record.num_layers)
    inner = [role for role in inputs.loaded.family.projections if role != "down"]
    return {
        "downs": [[arrays[f"{cluster}.{layer}.down"] for cluster in clusters] for layer in layers],
        "inner": [
            [{role: arrays[f"{cluster}.{layer}.{role}"] for role in inner} for cluster in clusters] for layer in layers
        ],
    }


def _checkpoint(changes: Changes, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    arrays: dict[str, Any] = {"step": np.array([step])}
    for name, change in changes.items():
        arrays[f"change.{name}"] = change.detach().cpu().numpy()
        for part in ("exp_avg", "exp_avg_sq", "step"):
            arrays[f"{part}.{name}"] = optimizer.state[change][part].cpu().numpy()
    return arrays


def _restore(cache: Cache, key: str, changes: Changes, optimizer: torch.optim.Optimizer) -> int:
    """Go back to the last checkpoint; returns how many steps were done."""
    arrays = cache.find_arrays(f"{key}-checkpoint")
    if arrays is None:
        return 0
    with torch.no_grad():
        for name, change in changes.items():
            change.copy_(torch.from_numpy(arrays[f"change.{name}"]))
            parts = ("exp_avg", "exp_avg_sq", "step")
            state = {part: torch.from_numpy(arrays[f"{part}.{name}"].copy()) for part in parts}
            state["step"] = state["step"].reshape(())
            optimizer.state[change] = {
                part: value if part == "step" else value.to(change.device) for part, value in state.items()
            }
    return int(arrays["step"][0])
