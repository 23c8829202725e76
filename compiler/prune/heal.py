"""Stage `heal`: distil the dense model into the narrow one.

First what all clusters share is trained: one change to the dense FFN's matrices, of which every cluster takes the rows
of its own neurons on top of its own repaired weights. Then each cluster's own matrices, for a few steps on its text.
What is trained on is first of all text that no weight was fitted to: on the calibration text itself the narrow model is
better than it really is, and has less to learn. Each step takes documents of one cluster; their beginnings are read
dense, as prompts are at run time, and the loss is KL(dense || narrow) on what follows. AdamW (arXiv 1711.05101) or Muon
(https://kellerjordan.github.io/posts/muon/) with a cosine schedule (arXiv 1608.03983). Rates are relative to each
matrix's root mean square, as Adafactor has them (arXiv 1804.04235): that of one model is fifteen times that of another,
and so are the steps that help and that harm.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.families import resolve
from coreinfer.bundles.shared.machine import cpu_multiplies_bf16
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.clusters.route import Routing, route
from coreinfer.compiler.config import CompileConfig, HealOptimizer
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.text.corpus import Corpus, Document, first_documents
from transformers import DynamicCache

from .narrow import Bits, Labels, NarrowModel, bf16_bits, narrow_layer

__all__ = ["HealInputs", "Reading", "heal", "healing_text"]

_log = logging.getLogger(__name__)
_STEP_TOKENS = 2048
"""Tokens of a step's documents."""
_POOL_SIZE = 16
"""Most spare text to draw from, in multiples of what the steps read: with little, the same documents meet again."""
_DENSE_SHARES = (0.125, 0.5)
"""Minimum and maximum share of a document that is read dense: short prompts have long answers."""
_MIN_DOCUMENT_TOKENS = 4
_HEAD_TOKENS = 128
"""Tokens whose logits are in memory at once."""
_WARM_UP = 0.05
_CHECKPOINT_STEPS = 50
_BETAS = (0.9, 0.95)

Reading = Callable[[int], AbstractContextManager[None]]
"""From a cluster to a block in which tokens take of their inputs what they take with that cluster's pack."""
Changes = dict[str, torch.Tensor]
"""Layer and role, as "3.gate" -> (neurons, hidden size) float32 that is added to a matrix, a row for each neuron."""


@dataclass(frozen=True, kw_only=True)
class HealInputs:
    """What the narrow model is trained on.

    Attributes:
        documents: of `healing_text`.
        labels: (documents,) the cluster of each.
        narrow: the narrow model to start from.
        reading: what its tokens read of their inputs; gradients are those of what is read.
    """

    config: CompileConfig
    loaded: LoadedModel
    documents: Sequence[Document]
    labels: Labels
    narrow: NarrowModel
    reading: Reading = lambda _: nullcontext()


@dataclass(frozen=True, kw_only=True)
class _Course:
    """One training.

    Attributes:
        inputs: with the narrow model to start from.
        cluster: the cluster whose own matrices are trained; None for what all share.
        key: of its result and checkpoints.
    """

    inputs: HealInputs
    cluster: int | None
    num_steps: int
    key: str

    def row_ids(self, layer: int, cluster: int) -> torch.Tensor:
        """Rows of the changes that a cluster's neurons take: (kept,)."""
        neuron_ids = self.inputs.narrow.choice.neuron_ids[cluster][layer]
        rows = neuron_ids if self.cluster is None else np.arange(len(neuron_ids))
        return torch.from_numpy(rows).long().to(self.inputs.loaded.device)

    def num_rows(self, layer: int) -> int:
        """Rows of a layer's changes."""
        if self.cluster is None:
            return int(self.inputs.loaded.record.ffn_dim)
        return len(self.inputs.narrow.choice.neuron_ids[self.cluster][layer])

    @property
    def clusters(self) -> Sequence[int]:
        """Clusters whose matrices it changes."""
        return range(len(self.inputs.narrow.choice.neuron_ids)) if self.cluster is None else [self.cluster]

    @property
    def document_ids(self) -> npt.NDArray[np.int64]:
        """Documents to train on: those long enough to be read dense and narrow."""
        fits = np.array([len(document.token_ids) >= _MIN_DOCUMENT_TOKENS for document in self.inputs.documents])
        if self.cluster is not None:
            fits &= self.inputs.labels == self.cluster
        return np.flatnonzero(fits)


def healing_text(config: CompileConfig, corpus: Corpus, routing: Routing) -> tuple[list[Document], Labels]:
    """Choose what to draw from: spare text, and the calibration text too where that is less than the steps read.

    Returns:
        Documents, and (documents,) the cluster of each.
    """
    num_steps = config.effective_heal_steps + config.heal_cluster_steps * routing.clustering.num_clusters
    num_tokens = num_steps * _STEP_TOKENS
    documents = first_documents(corpus.spare, num_tokens * _POOL_SIZE)
    labels = route(routing, documents)
    if sum(len(document.token_ids) for document in documents) < num_tokens:
        documents = [*documents, *corpus.calibration]
        labels = np.concatenate([labels, routing.assignment.calibration])
    return documents, labels


def heal(inputs: HealInputs, cache: Cache, key: str, progress: Progress) -> NarrowModel:
    """Train for the options' steps; an interrupted training continues from its last checkpoint."""
    config, narrow = inputs.config, inputs.narrow
    if config.effective_heal_steps:
        shared = _Course(inputs=inputs, cluster=None, num_steps=config.effective_heal_steps, key=key)
        narrow = replace(narrow, **_as_fields(inputs, _run("heal", [shared], cache, progress)))
    if config.heal_cluster_steps:
        own = [
            _own_course(replace(inputs, narrow=narrow), cluster, key)
            for cluster in range(len(narrow.choice.neuron_ids))
        ]
        narrow = replace(narrow, **_as_fields(inputs, _run("heal clusters", own, cache, progress)))
    return narrow


def _own_course(inputs: HealInputs, cluster: int, key: str) -> _Course:
    steps = inputs.config.heal_cluster_steps
    course = _Course(inputs=inputs, cluster=cluster, num_steps=steps, key=f"{key}-{steps}-cluster-{cluster}")
    if len(course.document_ids):
        return course
    _log.warning("healing: cluster %d has no text to train on and takes no steps of its own; give more text", cluster)
    return replace(course, num_steps=0)


def _run(name: str, courses: Sequence[_Course], cache: Cache, progress: Progress) -> dict[str, Bits]:
    """Train what was not trained before; returns all healed matrices, as `_changed_weights` does."""
    found = [cache.find_arrays(f"{course.key}-healed") for course in courses]
    if None in found:
        with progress.stage(name, sum(course.num_steps for course in courses)) as advance:
            for index, course in enumerate(courses):
                if found[index] is None:
                    found[index] = _healed(course, cache, advance)
                else:
                    advance(course.num_steps)
    return {name: array for arrays in found for name, array in (arrays or {}).items()}


def _healed(course: _Course, cache: Cache, advance: Advance) -> dict[str, Bits]:
    changes = _train(course, cache, advance)
    return dict(cache.arrays(f"{course.key}-healed", lambda: _changed_weights(course, changes)))


def _train(course: _Course, cache: Cache, advance: Advance) -> Changes:
    config, changes = course.inputs.config, _no_changes(course)
    for parameter in course.inputs.loaded.model.parameters():
        parameter.requires_grad_(False)
    optimizer = _optimizer(config.heal_optimizer, _groups(course.inputs.loaded, changes))
    first = _restore(cache, course.key, changes, optimizer)
    advance(first)
    for step in range(first, course.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.heal_rate * group["scale"] * _schedule(step, course.num_steps)
        _step(course, changes, optimizer, step)
        if (step + 1) % _CHECKPOINT_STEPS == 0 and step + 1 < course.num_steps:
            cache.store(f"{course.key}-checkpoint", _checkpoint(changes, optimizer, step + 1))
        advance()
    return changes


def _groups(loaded: LoadedModel, changes: Changes) -> list[dict[str, Any]]:
    """Changes for an optimizer, each with the root mean square of the matrix that it is added to, its scale."""
    groups = []
    for name, change in changes.items():
        layer, role = name.split(".")
        weight = loaded.projection(int(layer), role).weight.detach()
        groups.append({"params": [change], "scale": float(weight.float().square().mean().sqrt())})
    return groups


def _optimizer(name: HealOptimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, fused=True)
    if all(change.device.type == "cpu" for group in groups for change in group["params"]) and not cpu_multiplies_bf16():
        _log.warning("--heal-optimizer muon: this CPU emulates bfloat16, steps will take minutes; adamw is faster here")
    # Steps as large as AdamW's, so that rates are alike.
    return torch.optim.Muon(groups, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def _schedule(step: int, num_steps: int) -> float:
    """Share of the full learning rate: a short linear rise, then half a cosine down to nothing."""
    warm_up = max(1, round(_WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


def _no_changes(course: _Course) -> Changes:
    loaded = course.inputs.loaded
    return {
        f"{layer}.{role}": torch.zeros(
            (course.num_rows(layer), loaded.record.hidden_size), device=loaded.device, requires_grad=True
        )
        for layer in range(loaded.record.num_layers)
        for role in loaded.family.projections
    }


def _step(course: _Course, changes: Changes, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Train on some documents of one cluster; which ones depends on the seed and the step alone."""
    loaded = course.inputs.loaded
    cluster, token_ids, start = _draw(course, step)
    token_ids = token_ids.to(loaded.device)
    cache = DynamicCache()
    with torch.no_grad():
        loaded.read(token_ids[:, :start], cache)
        dense = loaded.states(token_ids[:, start:], cache)
        cache.crop(start - token_ids.shape[1])
    with course.inputs.reading(cluster):
        narrow = loaded.states(token_ids[:, start:], cache, _narrow_weights(course, changes, cluster))
    optimizer.zero_grad(set_to_none=True)
    narrow.backward(_gradient(loaded, narrow.detach().flatten(0, 1), dense.flatten(0, 1)).view_as(narrow))
    torch.nn.utils.clip_grad_norm_([change for change in changes.values() if change.grad is not None], 1.0)
    optimizer.step()


def _gradient(loaded: LoadedModel, narrow: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Gradient of the mean KL(dense || narrow) of next tokens, by the states that the narrow model passes to the head.

    By the logits it is softmax(narrow) - softmax(dense); a few tokens' logits at a time are enough, where those of all
    would take the most memory of a step.

    Args:
        narrow: (tokens, size).
        dense: (tokens, size).
    Returns:
        (tokens, size).
    """
    gradients: list[torch.Tensor] = []
    for own, other in zip(narrow.split(_HEAD_TOKENS), dense.split(_HEAD_TOKENS), strict=True):
        leaf = own.detach().requires_grad_()
        with torch.no_grad():
            target = loaded.head(other).softmax(dim=-1, dtype=torch.float32)
        logits = loaded.head(leaf)
        difference = logits.detach().softmax(dim=-1, dtype=torch.float32).sub_(target).div_(len(narrow))
        gradients += torch.autograd.grad(logits, leaf, difference.to(logits.dtype))
    return torch.cat(gradients)


def _draw(course: _Course, step: int) -> tuple[int, torch.Tensor, int]:
    """Draw a cluster by its tokens and documents of like length from it, cut to the shortest.

    Returns:
        The cluster, token ids (documents, length), and how many of the length are read dense.
    """
    inputs = course.inputs
    generator = np.random.default_rng((inputs.config.seed, step))
    lengths = np.array([len(document.token_ids) for document in inputs.documents])
    long_enough = course.document_ids
    first = int(generator.choice(long_enough, p=lengths[long_enough] / lengths[long_enough].sum()))
    cluster = int(inputs.labels[first])
    members = long_enough[inputs.labels[long_enough] == cluster]
    # Chance decides among documents of one length, and a little beyond.
    distance = np.abs(lengths[members] - lengths[first]) + generator.random(len(members)) * 8
    distance[members == first] = -1
    chosen = members[np.argsort(distance)][: max(1, _STEP_TOKENS // int(lengths[first]))]
    length = int(lengths[chosen].min())
    start = max(1, int(length * generator.uniform(*_DENSE_SHARES)))
    return cluster, torch.tensor([inputs.documents[index].token_ids[:length] for index in chosen]), start


def _narrow_weights(course: _Course, changes: Mapping[str, torch.Tensor], cluster: int) -> dict[str, torch.Tensor]:
    """Tensors of one cluster's FFN under the model's own names, differentiable in the changes."""
    loaded, weights = course.inputs.loaded, {}
    for layer in range(loaded.record.num_layers):
        base = narrow_layer(loaded, course.inputs.narrow, layer, cluster)
        rows = course.row_ids(layer, cluster)
        for role, path in loaded.family.projections.items():
            name = f"{loaded.family.layers}.{layer}.{path}"
            own = base[role]
            weights[f"{name}.weight"] = (own.float() + _oriented(changes[f"{layer}.{role}"][rows], role)).to(own.dtype)
            if resolve(loaded.layers[layer], path).bias is not None:
                weights[f"{name}.bias"] = base[f"{role}_bias"]
    return weights


def _oriented(rows: torch.Tensor, role: str) -> torch.Tensor:
    """Turn rows, one a neuron, into the shape of the role's matrix."""
    return rows.T if role == "down" else rows


def _changed_weights(course: _Course, changes: Changes) -> dict[str, Bits]:
    """Clusters' healed matrices, a row for each neuron: "cluster.layer.role" -> (kept, hidden size) bits."""
    loaded, arrays = course.inputs.loaded, {}
    for cluster in course.clusters:
        for layer in range(loaded.record.num_layers):
            base, rows = narrow_layer(loaded, course.inputs.narrow, layer, cluster), course.row_ids(layer, cluster)
            for role in loaded.family.projections:
                change = changes[f"{layer}.{role}"].detach()[rows]
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
        for part, value in optimizer.state[change].items():
            arrays[f"{part}.{name}"] = value.cpu().numpy()
    return arrays


def _restore(cache: Cache, key: str, changes: Changes, optimizer: torch.optim.Optimizer) -> int:
    """Go back to the last checkpoint; returns how many steps were done."""
    arrays = cache.find_arrays(f"{key}-checkpoint")
    if arrays is None:
        return 0
    with torch.no_grad():
        for name, change in changes.items():
            change.copy_(torch.from_numpy(arrays[f"change.{name}"]))
            optimizer.state[change] = {
                key.removesuffix(f".{name}"): torch.from_numpy(array.copy()).to(change.device)
                for key, array in arrays.items()
                if key.endswith(f".{name}") and not key.startswith("change.")
            }
    return int(arrays["step"][0])
