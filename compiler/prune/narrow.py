"""The results of narrowing: the clusters' narrow FFNs, and those of the controls at the same bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.families import ffn_tensors
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel

from .mixtures.expert_splits import SplitLosses, choose_listed
from .profile import Profile
from .select import Choice, choose_neurons

__all__ = [
    "CLUSTERS",
    "Assignment",
    "Cut",
    "CutOf",
    "Labels",
    "NarrowDown",
    "NarrowModel",
    "bf16_bits",
    "choose_all",
    "from_bits",
    "narrow_down",
    "narrow_downs",
    "narrow_layer",
]

CLUSTERS = "clusters"
"""Name of the assignment that is shipped; the others are controls."""

Labels = npt.NDArray[np.int64]
"""(documents,) cluster ids."""
Bits = npt.NDArray[np.uint16]
Cut = Callable[[int, int], dict[str, torch.Tensor]]
"""Layer and cluster -> one layer's FFN, as `narrow_layer` returns it."""
CutOf = Callable[[LoadedModel], Cut]
"""Makes a cut for a model where it runs."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One way to put documents into clusters.

    Attributes:
        name: "clusters", or the control's name.
        calibration, validation, held_out: (documents,) cluster ids of each part of the corpus.
    """

    name: str
    calibration: Labels
    validation: Labels
    held_out: Labels

    @property
    def num_clusters(self) -> int:
        """How many clusters there are; each has calibration text."""
        return int(self.calibration.max()) + 1


@dataclass(frozen=True, kw_only=True)
class NarrowModel:
    """The narrow FFNs of one assignment.

    Attributes:
        choice: scores and neuron ids.
        downs: downs[layer][cluster] is the repaired down projection (kept, hidden size) as bfloat16 bits, or None.
        biases: biases[layer][cluster] is its bias (hidden size,), or None; of families that have one. Of narrow experts
            the rows of one after another, and (experts, hidden size).
        ridges: ridge of each layer, None where the repair was rejected.
        inner: inner[layer][cluster] is role ("gate", "up") -> (kept, hidden size) bfloat16 bits of healed matrices;
            None where they are the model's own.
    """

    choice: Choice
    downs: list[list[Bits | None]]
    biases: list[list[npt.NDArray[np.float32] | None]]
    ridges: tuple[float | None, ...]
    inner: list[list[dict[str, Bits]]] | None = None

    def only(self, cluster: int) -> "NarrowModel":
        """One cluster of it, which then is number 0: all that has to be sent for its pack to be written."""
        return NarrowModel(
            choice=replace(
                self.choice,
                scores=self.choice.scores[cluster : cluster + 1],
                neuron_ids=[self.choice.neuron_ids[cluster]],
            ),
            downs=[[layer[cluster]] for layer in self.downs],
            biases=[[layer[cluster]] for layer in self.biases],
            ridges=self.ridges,
            inner=None if self.inner is None else [[layer[cluster]] for layer in self.inner],
        )


def choose_all(
    config: CompileConfig,
    profile: Profile,
    loaded: LoadedModel,
    assignments: Sequence[Assignment],
    budgets: Mapping[str, Sequence[Sequence[int]]],
    split_losses: Mapping[str, SplitLosses],
) -> dict[str, Choice]:
    """Choose neurons for every assignment.

    Args:
        budgets: budgets[name][cluster][layer].
        split_losses: assignment name -> what experts are left out by; empty where none is, or whole ones are.
    """
    experts, norms = loaded.record.experts, loaded.column_norms
    if experts is not None:
        # Statistics of mixtures have them in them, of experts or of their neurons.
        norms = np.ones((loaded.record.num_layers, 1), dtype=np.float32)
    if experts is not None and split_losses:
        return {
            item.name: choose_listed(config, profile, item.name, norms, budgets[item.name], split_losses[item.name])
            for item in assignments
        }
    return {
        item.name: choose_neurons(
            config,
            profile.statistics[item.name],
            profile.num_tokens[item.name],
            norms,
            budgets[item.name],
            num_parts=experts.num_experts if experts is not None and config.experts == "narrow" else 1,
            part_tokens=profile.expert_tokens.get(item.name),
        )
        for item in assignments
    }


def bf16_bits(values: torch.Tensor) -> Bits:
    """Round a tensor to bfloat16 and return its bit patterns."""
    bits: Bits = values.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    return bits


def narrow_layer(loaded: LoadedModel, narrow: NarrowModel, layer: int, cluster: int) -> dict[str, torch.Tensor]:
    """Cut one layer's FFN down to a cluster's neurons.

    Returns:
        Role -> tensor as `assign_ffn` takes them: gate and up (kept, hidden), down (hidden, kept), biases.
    """
    dense = ffn_tensors(loaded.layers[layer], loaded.family)
    ids = torch.from_numpy(narrow.choice.neuron_ids[cluster][layer]).long().to(loaded.device)
    tensors = {role: tensor[ids] for role, tensor in dense.items() if role not in ("down", "down_bias")}
    if narrow.inner is not None:
        for role, bits in narrow.inner[layer][cluster].items():
            tensors[role] = from_bits(bits).to(dense[role])
    return {**tensors, **narrow_down(loaded, narrow, layer, cluster)}


def narrow_down(loaded: LoadedModel, narrow: NarrowModel, layer: int, cluster: int) -> dict[str, torch.Tensor]:
    """Cut one layer's down projection alone, and its bias; see `narrow_layer`."""
    dense = ffn_tensors(loaded.layers[layer], loaded.family)
    ids = torch.from_numpy(narrow.choice.neuron_ids[cluster][layer]).long().to(loaded.device)
    repaired = narrow.downs[layer][cluster]
    if repaired is None:
        tensors = {"down": dense["down"][:, ids]}
    else:
        tensors = {"down": from_bits(repaired).T.to(dense["down"]).contiguous()}
    if "down_bias" in dense:
        own, bias = dense["down_bias"], narrow.biases[layer][cluster]
        tensors["down_bias"] = own if bias is None else torch.from_numpy(bias).to(own.device, loaded.dtype)
    return tensors


@dataclass(frozen=True, kw_only=True)
class NarrowDown:
    """The down projection of one expert of a pack.

    Attributes:
        number: of the expert.
        neuron_ids: that it keeps, among its own.
        weight: (hidden size, kept), its own or repaired.
        bias: (hidden size,) repaired; None where it is the model's own, or there is none.
    """

    number: int
    neuron_ids: npt.NDArray[np.int32]
    weight: torch.Tensor
    bias: torch.Tensor | None


def narrow_downs(loaded: LoadedModel, narrow: NarrowModel, layer: int, cluster: int) -> Iterator[NarrowDown]:
    """Cut the down projections of the experts that a cluster has of a layer down to its neurons, one after another."""
    numbered = narrow.choice.neuron_ids[cluster][layer] % loaded.record.expert_neurons
    numbers = narrow.choice.experts_of(loaded.record, cluster, layer)
    width = len(numbered) // len(numbers)
    repaired, biases = narrow.downs[layer][cluster], narrow.biases[layer][cluster]
    for place, number in enumerate(numbers):
        part = slice(place * width, (place + 1) * width)
        if repaired is None:
            columns = torch.from_numpy(numbered[part]).long().to(loaded.device)
            weight = loaded.mixture(layer).tensors[expert_role(number, "down")][:, columns]
        else:
            weight = from_bits(repaired[part]).T.to(loaded.device, loaded.dtype).contiguous()
        yield NarrowDown(
            number=number,
            neuron_ids=numbered[part],
            weight=weight,
            bias=None if biases is None else torch.from_numpy(biases[place]),
        )


def from_bits(bits: Bits) -> torch.Tensor:
    """Turn bit patterns back into a bfloat16 tensor."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
