"""Moments of the tokens that a layer's FFN sees, cluster by cluster: each place sums its own, and sums are added."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from coreinfer.compiler.team.adding import add_up, pass_on
from coreinfer.compiler.team.team import Pending, Team, Worker

from .dealt import Find, LayerTokens, TokenCounts
from .products import add_products
from .triangle import pack_upper, unpack_upper

__all__ = ["Moments", "add_moments", "ask_moments", "ask_overall", "ask_parts", "mean_moments", "weighted_sum"]

_TOKEN_CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Means over tokens of h h^T, h y^T, h and y; the last two only where the down projection has a bias.

    Attributes:
        upper: of h h^T what `pack_upper` returns.
        cross: (ffn_dim, hidden size).
        mean_activation: (ffn_dim,).
        mean_target: (hidden size,).
    """

    upper: torch.Tensor
    cross: torch.Tensor
    mean_activation: torch.Tensor
    mean_target: torch.Tensor

    @property
    def gram(self) -> torch.Tensor:
        """The mean of h h^T as a whole: (ffn_dim, ffn_dim)."""
        return unpack_upper(self.upper, len(self.cross))

    def parts(self) -> tuple[torch.Tensor, ...]:
        """All of them."""
        return self.upper, self.cross, self.mean_activation, self.mean_target


def ask_moments(
    team: Team, stage: str, finds: Mapping[int, Find], counts: TokenCounts, cluster: int, *, centred: bool
) -> Pending[Moments]:
    """Ask for one cluster's moments, from the places that have text of it; see `ask_parts`."""
    return add_up(team, stage, add_moments, ask_parts(team, stage, finds, counts, cluster, centred=centred))


def ask_parts(
    team: Team, stage: str, finds: Mapping[int, Find], counts: TokenCounts, cluster: int, *, centred: bool
) -> dict[int, Pending[Moments]]:
    """Ask for each place's part of one cluster's moments.

    Args:
        centred: whether means of h and y are wanted too.
    """
    total = sum(counts[cluster].values())
    return {
        place: team.call(place, stage, _cluster_moments, finds[place], cluster, total, centred)
        for place in counts[cluster]
    }


def ask_overall(
    team: Team,
    stage: str,
    finds: Mapping[int, Find],
    counts: TokenCounts,
    known: Mapping[int, Pending[Moments]] | None,
    homes: Mapping[int, int],
    *,
    centred: bool,
) -> Mapping[int, Pending[Moments]] | None:
    """Ask for the moments of all text; None where there is one cluster.

    Args:
        known: each cluster's moments, from which they follow; None to sum them over the tokens.
        homes: cluster -> place that works on it.
    Returns:
        Place -> the moments there.
    """
    if len(counts) == 1:
        return None
    totals = [sum(places.values()) for places in counts]
    all_tokens = sum(totals)
    parts: dict[int, Pending[Moments]] = {}
    if known is None:
        for place in sorted({place for places in counts for place in places}):
            parts[place] = team.call(place, stage, _place_moments, finds[place], all_tokens, centred)
    else:
        at_home: dict[int, list[int]] = {}
        for cluster in range(len(counts)):
            at_home.setdefault(homes[cluster], []).append(cluster)
        for place, clusters in sorted(at_home.items()):
            weights = [totals[cluster] / all_tokens for cluster in clusters]
            parts[place] = team.call(place, stage, _weigh, weights, *(known[cluster] for cluster in clusters))
    total = add_up(team, stage, add_moments, parts)
    return pass_on(team, stage, total, sorted({*homes.values()}))


@torch.inference_mode()
def _cluster_moments(worker: Worker, find: Find, cluster: int, total: int, centred: bool) -> Moments:
    """A place's part of a cluster's moments; `total` tokens are the cluster's at all places."""
    seen = find(worker)
    return mean_moments(seen.tokens, seen.rows.calibration[cluster], total, centred=centred)


@torch.inference_mode()
def _place_moments(worker: Worker, find: Find, total: int, centred: bool) -> Moments:
    """A place's part of the moments of all text."""
    seen = find(worker)
    return mean_moments(seen.tokens, torch.cat([*seen.rows.calibration]), total, centred=centred)


@torch.inference_mode()
def _weigh(_worker: Worker, weights: Sequence[float], *moments: Moments) -> Moments:
    return weighted_sum(moments, weights)


@torch.inference_mode()
def add_moments(_worker: Worker, first: Moments, second: Moments) -> Moments:
    """Add moments, or parts of them."""
    upper, cross, activation, target = (a + b for a, b in zip(first.parts(), second.parts(), strict=True))
    return Moments(upper=upper, cross=cross, mean_activation=activation, mean_target=target)


def weighted_sum(moments: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """Mix moments."""
    upper, cross, activation, target = (
        _accumulate(parts, weights) for parts in zip(*(item.parts() for item in moments), strict=True)
    )
    return Moments(upper=upper, cross=cross, mean_activation=activation, mean_target=target)


def _accumulate(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def mean_moments(tokens: LayerTokens, rows: torch.Tensor, total: int, *, centred: bool) -> Moments:
    """Sums over some tokens divided by the number of all; means are left at 0 where nothing is centred."""
    ffn_dim, hidden_size = tokens.activations.shape[1], tokens.targets.shape[1]
    device = tokens.activations.device
    gram, cross = torch.zeros((ffn_dim, ffn_dim), device=device), torch.zeros((ffn_dim, hidden_size), device=device)
    add_products(gram, cross, tokens.activations, tokens.targets, rows)
    sums = Moments(
        upper=pack_upper(gram),
        cross=cross,
        mean_activation=torch.zeros(ffn_dim, device=device),
        mean_target=torch.zeros(hidden_size, device=device),
    )
    if centred:
        for part in rows.split(_TOKEN_CHUNK):
            sums.mean_activation.add_(tokens.activations[part].float().sum(dim=0))
            sums.mean_target.add_(tokens.targets[part].float().sum(dim=0))
    for value in sums.parts():
        value.div_(max(1, total))
    return sums
