"""Own weights or the dense FFN: of each cluster what reads the fewest bytes a token at a quality (`--packs auto`)."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from coreinfer.bundles.manifest import PackChoice, TriedWeights
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.options import TRIED_KEEPS
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.narrow import CLUSTERS, NarrowModel
from coreinfer.compiler.quality.reference import Reference
from coreinfer.compiler.quality.stored import StoredPacks, stored_packs
from coreinfer.compiler.stages import Ground, budgets_at, narrow_packs

from .measure import SharedWeights
from .search import DENSE, POOL, Shares, ShareSearch, measurable
from .stage import share_inputs, thin_key
from .token_reads import ReadSizes, read_sizes
from .token_shares import Arrays, find_token_shares, renew_thresholds

__all__ = ["ChosenPacks", "chosen_packs", "units_of"]

_log = logging.getLogger(__name__)
_SLACK = 1.01
"""A search of shares stops short of the least by about this; bytes that rise by less may still fall."""


@dataclass(frozen=True, kw_only=True)
class ChosenPacks:
    """What clusters decode with.

    Attributes:
        keep: keep ratio that has as many neurons on held-out text; 1 where all clusters are thin.
        keeps: of each cluster; 1 of thin ones.
        narrow: the packs' weights, of thin clusters to be passed over; None where all are thin.
        shared: the files, and the thresholds by which tokens read them; its `packs` are None where all are thin.
        choices: how each cluster came to what it is.
    """

    keep: float
    keeps: tuple[float, ...]
    narrow: NarrowModel | None
    shared: SharedWeights
    shares: Shares
    choices: tuple[PackChoice, ...]

    @property
    def thin(self) -> frozenset[int]:
        """Clusters that have no pack."""
        packs = self.shared.packs
        return frozenset(range(len(self.keeps))) if packs is None else packs.thin


@dataclass(frozen=True, kw_only=True)
class _Thin:
    """What was found of the clusters as thin ones.

    Attributes:
        tried: name of a search -> what it reads; without the dense FFN on all text.
    """

    shared: SharedWeights
    shares: Shares
    tried: Mapping[str, TriedWeights]


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What all tries have in common.

    Attributes:
        num_tokens: (clusters,) held-out tokens of each cluster that are decoded.
        units: name of a search -> clusters that are chosen for together.
    """

    config: CompileConfig
    ground: Ground
    reference: Reference
    progress: Progress
    sizes: ReadSizes
    num_tokens: Sequence[int]
    units: Mapping[str, tuple[int, ...]]

    def search(self, shared: SharedWeights) -> ShareSearch:
        """Search shares of weights."""
        team = self.ground.material.team
        return ShareSearch(self.config, team, self.reference, shared, self.num_tokens, self.progress)

    def tried(
        self, search: ShareSearch, packs: StoredPacks | None, keeps: Mapping[str, float], shares: Mapping[str, float]
    ) -> dict[str, TriedWeights]:
        """Say what was measured of some names at their shares."""
        search.excesses([*shares], [*shares.values()])
        found = {}
        for name, share in shares.items():
            score = search.score(name, share)
            found[name] = TriedWeights(
                keep=keeps[name],
                share=share,
                kl=score.kl,
                top1=score.top1,
                token_bytes=self.sizes.token_bytes(packs, search.measured(name, share)),
            )
        return found


@dataclass(frozen=True, kw_only=True)
class _Packs:
    """Packs of some clusters, stored, and the thresholds by which tokens read them."""

    narrow: NarrowModel
    shared: SharedWeights


def units_of(clusters: Mapping[str, tuple[int, ...]], num_clusters: int) -> dict[str, tuple[int, ...]]:
    """Return the clusters that are chosen for together, by the name of their search.

    Clusters with little text are chosen for by what they lose together. Where even that is too little, and other
    clusters' text stands for theirs, nothing says what narrowing would cost them: they are in no unit.

    Args:
        clusters: of a `ShareSearch`.
    """
    own = {name: members for name, members in clusters.items() if name != POOL}
    named = {cluster for members in own.values() for cluster in members}
    others = tuple(cluster for cluster in range(num_clusters) if cluster not in named)
    stands_for_others = POOL in clusters and not named.isdisjoint(clusters[POOL])
    return own if not others or stands_for_others else {**own, POOL: others}


@contextmanager
def chosen_packs(
    config: CompileConfig, ground: Ground, reference: Reference | None, progress: Progress
) -> Iterator[ChosenPacks]:
    """Choose what each cluster decodes with; the packs are stored for the time of the block.

    Raises:
        BundleError: the disk cannot take the packs.
        ConfigError: there is no held-out text to measure on, or rounding alone loses more than may be lost.
    """
    num_tokens = ground.num_held_out_tokens
    reference = measurable(config, reference, num_tokens)
    arrays = _thin_arrays(config, ground, progress)
    labels = ground.routing.assignment.held_out
    shared = SharedWeights(stored=ground.material.stored, packs=None, arrays=arrays, labels=labels)
    search = ShareSearch(config, ground.material.team, reference, shared, num_tokens, progress)
    setting = _Setting(
        config=config,
        ground=ground,
        reference=reference,
        progress=progress,
        sizes=read_sizes(config, ground.material.loaded),
        num_tokens=num_tokens,
        units=units_of(search.clusters, len(num_tokens)),
    )
    found = search.least(search.names)
    named = {name: share for name, share in found.items() if name != DENSE}
    tried = setting.tried(search, None, dict.fromkeys(named, 1.0), named)
    thin = _Thin(shared=shared, shares=search.shares(found), tried=tried)
    best, tries = _best_of_own(setting, thin)
    asked = {name: own for name, own in best.items() if own.token_bytes < thin.tried[name].token_bytes}
    with _settled(setting, thin, asked) as (packs, shares, settled):
        # What was chosen, and loses too much as it was made in the end, has no numbers that hold.
        others = {name: own for name, own in best.items() if name not in asked}
        yield _chosen(setting, thin, packs, shares, others | settled, tries)


def _thin_arrays(config: CompileConfig, ground: Ground, progress: Progress) -> Arrays:
    material, routing = ground.material, ground.routing
    inputs = share_inputs(config, material, routing, None)
    return find_token_shares(inputs, material.cache, thin_key(material, routing), progress)


def _best_of_own(setting: _Setting, thin: _Thin) -> tuple[dict[str, TriedWeights], dict[str, tuple[float, ...]]]:
    """Try keep ratios downwards, of each unit until the quality is lost or bytes rise.

    Returns:
        Of each unit the weights with the fewest bytes that hold, where any do, and the ratios that were tried.
    """
    best = dict[str, TriedWeights]()
    tries = dict[str, tuple[float, ...]]()
    active, last = [*setting.units], {name: thin.tried[name].token_bytes for name in setting.units}
    for keep in TRIED_KEEPS:
        if not active:
            break
        found = _try_keep(setting, thin, keep, active)
        for name in active:
            tries[name] = (*tries.get(name, ()), keep)
            _log_try(name, keep, found.get(name), thin.tried[name])
        better = {name: own for name, own in found.items() if name not in best or _fewer(own, best[name])}
        best |= better
        active = [name for name, own in found.items() if own.token_bytes <= _SLACK * last[name]]
        last = {name: own.token_bytes for name, own in found.items()}
    return best, tries


def _fewer(one: TriedWeights, other: TriedWeights) -> bool:
    return one.token_bytes < other.token_bytes


def _log_try(name: str, keep: float, own: TriedWeights | None, thin: TriedWeights) -> None:
    said = "loses too much with all of it read"
    if own is not None:
        said = f"share {own.share:.3f}, {own.token_bytes / 1e6:.2f} MB a token"
    _log.info("%s: keep %.2f: %s; thin %.3f, %.2f MB", name, keep, said, thin.share, thin.token_bytes / 1e6)


def _try_keep(setting: _Setting, thin: _Thin, keep: float, names: Sequence[str]) -> dict[str, TriedWeights]:
    """Measure some units at a keep ratio: those that hold the quality where all is read, at their least shares."""
    keeps = dict.fromkeys(names, keep)
    with _packs_at(setting, thin, keeps) as made:
        search = setting.search(made.shared)
        holding = _holding(search, names)
        if not holding:
            return {}
        shares = search.least(holding)
        return setting.tried(search, made.shared.packs, keeps, shares)


def _holding(search: ShareSearch, names: Sequence[str]) -> list[str]:
    return [name for name, excess in zip(names, search.excesses_with_all(names), strict=True) if excess <= 0]


@contextmanager
def _packs_at(setting: _Setting, thin: _Thin, keeps: Mapping[str, float]) -> Iterator[_Packs]:
    """Narrow and store the packs of some units, each at its keep ratio; other clusters are thin."""
    config, ground, progress = setting.config, setting.ground, setting.progress
    material, by_cluster = ground.material, _by_cluster(setting, keeps)
    clusters = ground.assignments[:1]
    ratios = [by_cluster.get(cluster, 1.0) for cluster in range(len(setting.num_tokens))]
    key, narrow = narrow_packs(
        config, ground, budgets_at(config, ground, ratios[0], ratios, clusters), clusters, progress
    )
    without = frozenset(range(len(ratios))) - by_cluster.keys()
    with stored_packs(material.team, material.stored, narrow, progress, without) as stored:
        inputs = share_inputs(config, material, ground.routing, stored[CLUSTERS])
        arrays = renew_thresholds(inputs, thin.shared.arrays, material.cache, key, progress)
        shared = SharedWeights(stored=material.stored, packs=stored[CLUSTERS], arrays=arrays, labels=thin.shared.labels)
        yield _Packs(narrow=narrow[CLUSTERS], shared=shared)


def _by_cluster(setting: _Setting, keeps: Mapping[str, float]) -> dict[int, float]:
    return {cluster: keep for name, keep in keeps.items() for cluster in setting.units[name]}


@contextmanager
def _settled(
    setting: _Setting, thin: _Thin, asked: Mapping[str, TriedWeights]
) -> Iterator[tuple[_Packs | None, Shares, dict[str, TriedWeights]]]:
    """Make the packs that were chosen, and measure them as they will be stored.

    What other clusters keep changes a pack by a little, as all share a ridge: units that now lose the quality, or read
    no fewer bytes than thin, become thin.
    """
    if not asked:
        yield None, thin.shares, {}
        return
    keeps = {name: own.keep for name, own in asked.items()}
    with _packs_at(setting, thin, keeps) as made:
        search, packs = setting.search(made.shared), made.shared.packs
        assert packs is not None
        holding = _holding(search, [*asked])
        # With packs of all clusters it is the search that `--packs own` makes, which has the dense FFN in it.
        names = [*search.names] if not packs.thin and len(holding) == len(keeps) else holding
        found = search.least(names) if names else {}
        settled = setting.tried(search, packs, keeps, {name: found[name] for name in holding})
        kept = {name: own for name, own in settled.items() if _fewer(own, thin.tried[name])}
        for name in asked.keys() - kept.keys():
            _log.warning("%s: of its own weights, as stored, it reads no less at this quality; it is thin", name)
        if not kept:
            yield None, thin.shares, settled
            return
        own_shares = _by_cluster(setting, {name: own.share for name, own in kept.items()})
        shares = Shares(
            dense=found.get(DENSE, thin.shares.dense),
            clusters=tuple(own_shares.get(cluster, share) for cluster, share in enumerate(thin.shares.clusters)),
        )
        yield _without(setting, thin, made, asked.keys() - kept.keys()), shares, settled


def _without(setting: _Setting, thin: _Thin, made: _Packs, names: Collection[str]) -> _Packs:
    """Make units thin that have packs."""
    packs = made.shared.packs
    assert packs is not None
    clusters = [cluster for name in names for cluster in setting.units[name]]
    thresholds = {name: thin.shared.arrays[name] for name in (f"thresholds.{cluster}" for cluster in clusters)}
    shared = SharedWeights(
        stored=made.shared.stored,
        packs=packs.without(clusters),
        arrays={**made.shared.arrays, **thresholds},
        labels=made.shared.labels,
    )
    return _Packs(narrow=made.narrow, shared=shared)


def _chosen(
    setting: _Setting,
    thin: _Thin,
    packs: _Packs | None,
    shares: Shares,
    own: Mapping[str, TriedWeights],
    tries: Mapping[str, tuple[float, ...]],
) -> ChosenPacks:
    """Put together what came out."""
    names = {cluster: name for name, clusters in setting.units.items() for cluster in clusters}
    stored = None if packs is None else packs.shared.packs
    choices = []
    for cluster in range(len(setting.num_tokens)):
        name = names.get(cluster, POOL)
        choice = PackChoice(
            cluster=cluster,
            judged_by=name,
            is_thin=stored is None or cluster in stored.thin,
            thin=thin.tried[name],
            own=own.get(name),
            tried_keeps=tries.get(name, ()),
        )
        choices.append(choice)
    keeps = tuple(1.0 if choice.is_thin or choice.own is None else choice.own.keep for choice in choices)
    return ChosenPacks(
        keep=round(float(np.average(keeps, weights=setting.num_tokens)), 4),
        keeps=keeps,
        narrow=None if packs is None else packs.narrow,
        shared=thin.shared if packs is None else packs.shared,
        shares=shares,
        choices=tuple(choices),
    )
