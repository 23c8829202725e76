"""From a quality to token shares: of each cluster the smallest share that holds, measured on the stored files."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.manifest import Score
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.efforts import METHODS
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.quality.reference import Reference
from coreinfer.compiler.quality.search import LEAST_TOKENS, excess_of, least_keeps, rounding_problem, too_little_text
from coreinfer.compiler.quality.tally import Tally
from coreinfer.compiler.team.team import Team

from .measure import Measured, Part, SharedWeights, measure_parts
from .plan import TARGETS

__all__ = ["DENSE", "POOL", "ShareSearch", "Shares", "check_aim", "fit_shares", "measurable"]

_log = logging.getLogger(__name__)
_FIRST_TRY, _FINE, _NUM_TRIES = 0.65, 0.005, 6
_POWER = 3.4
"""What is lost grows as this power of the share that is left out (docs/token_shares.md)."""
DENSE = "the dense FFN"
"""Among the names of a search."""
POOL = "clusters with little text, at one share"
"""Among the names of a search."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the layers' bytes.

    Attributes:
        dense: with the dense FFN.
        clusters: of each cluster.
    """

    dense: float
    clusters: tuple[float, ...]


def check_aim(config: CompileConfig, reference: Reference | None) -> None:
    """Refuse, where shares are to be found by a quality, what no share can have: before anything is made for it.

    Raises:
        ConfigError: there is no held-out text to measure on, or rounding alone loses more than may be lost.
    """
    if not config.searches_share:
        return
    if reference is None:
        raise ConfigError(f"--token-share auto: {too_little_text()}, or a share")
    if excess_of(config, reference.dense) > 0:
        raise ConfigError(rounding_problem(config, reference.dense))


def fit_shares(
    config: CompileConfig,
    team: Team,
    reference: Reference | None,
    shared: SharedWeights,
    num_tokens: Sequence[int],
    progress: Progress,
) -> Shares:
    """Turn `max_kl` and `min_top1` into token shares where `token_share` is auto; else it is all clusters' share.

    Clusters with little held-out text are judged together, by one share; where even together they have little, by all
    clusters' text at one share, and they read no less than any other.

    Args:
        num_tokens: (clusters,) held-out tokens of each cluster that are decoded.
    Raises:
        ConfigError: there is no held-out text to measure on, or all weights together lose more than may be lost.
    """
    if config.token_share != "auto":
        assert config.token_share is not None
        return Shares(dense=config.token_share, clusters=(config.token_share,) * len(num_tokens))
    reference = measurable(config, reference, num_tokens)
    search = ShareSearch(config, team, reference, shared, num_tokens, progress)
    return search.shares(search.least(search.names))


def measurable(config: CompileConfig, reference: Reference | None, num_tokens: Sequence[int]) -> Reference:
    """Return the reference, on which shares can be found by a quality.

    Args:
        num_tokens: (clusters,) held-out tokens of each cluster that are decoded.
    Raises:
        ConfigError: there is no held-out text to measure on, or rounding alone loses more than may be lost.
    """
    check_aim(config, reference)
    if reference is None or not sum(num_tokens):
        raise ConfigError(f"--token-share auto: {too_little_text()}, or a share")
    return reference


class ShareSearch:
    """Searches shares for several things at once, each try being one measurement of all of them.

    Attributes:
        names: what is searched for: clusters with enough text, the others together, and the dense FFN.
        clusters: name -> the clusters that it stands for; without the dense FFN.
        pools_all: whether the others have too little text even together, so that all clusters' stands for it.
    """

    def __init__(
        self,
        config: CompileConfig,
        team: Team,
        reference: Reference,
        shared: SharedWeights,
        num_tokens: Sequence[int],
        progress: Progress,
    ) -> None:
        """Decide what is searched for; see `fit_shares`."""
        self._config, self._team, self._reference, self._shared = config, team, reference, shared
        self._progress, self._members, self._num_clusters = progress, shared.members(), len(num_tokens)
        own = [cluster for cluster, count in enumerate(num_tokens) if count >= LEAST_TOKENS]
        self.clusters: dict[str, tuple[int, ...]] = {f"cluster {cluster}": (cluster,) for cluster in own}
        others = [cluster for cluster, count in enumerate(num_tokens) if count < LEAST_TOKENS]
        self.pools_all = bool(others) and sum(num_tokens[cluster] for cluster in others) < LEAST_TOKENS
        if others:
            self.clusters[POOL] = tuple(c for c in self._members if self.pools_all or c in others)
        self.names = (*self.clusters, DENSE)
        self._known: dict[tuple[str, float], tuple[Measured, ...]] = {}

    def shares(self, found: Mapping[str, float]) -> Shares:
        """Give each cluster its share, from the shares of `names`."""
        others = max((share for name, share in found.items() if name != DENSE), default=1.0)
        pooled = others if self.pools_all else found.get(POOL, others)
        clusters = (found.get(f"cluster {cluster}", pooled) for cluster in range(self._num_clusters))
        return Shares(dense=found[DENSE], clusters=tuple(clusters))

    def least(self, names: Sequence[str]) -> dict[str, float]:
        """Find the smallest share of each of some.

        Raises:
            ConfigError: packs lose more than may be lost where all of them is read.
        """
        with_all = self.excesses_with_all(names)
        for name, excess in zip(names, with_all, strict=True):
            if self._shared.packs is not None and excess > 0:
                raise ConfigError(
                    f"--token-share auto: {name} loses more than asked for on held-out text with all weights read "
                    f"({excess + 1:.2f} times as much as may be lost); give a higher --keep, or ask for less"
                )
        tolerance = -_straight(-METHODS[self._config.effort].tolerance)
        shares = least_keeps(
            lambda shares: [_straight(excess) for excess in self.excesses(names, shares)],
            num_clusters=len(names),
            least=float(TARGETS[0]),
            dense_excess=_straight(max(with_all)),
            tolerance=tolerance,
            num_tries=_NUM_TRIES,
            first_try=_FIRST_TRY,
            power=1.0,
            fine=_FINE,
        )
        return dict(zip(names, shares, strict=True))

    def excesses_with_all(self, names: Sequence[str]) -> list[float]:
        """What is lost too much, -1 for nothing, where all is read; of thin clusters alone that of all text."""
        if self._shared.packs is None:
            return [excess_of(self._config, self._reference.dense)] * len(names)
        return self.excesses(names, [1.0] * len(names))

    def excesses(self, names: Sequence[str], shares: Sequence[float]) -> list[float]:
        """Tell of each thing's share how much more is lost than may be (`excess_of`); what is known is kept."""
        asked = [key for key in zip(names, shares, strict=True) if key not in self._known]
        parts = [self._parts(*key) for key in asked]
        flat = [part for own in parts for part in own]
        measured = iter(measure_parts(self._team, self._reference, self._shared, flat, self._progress))
        for key, own in zip(asked, parts, strict=True):
            self._known[key] = tuple(next(measured) for _ in own)
            score = self.score(*key)
            _log.info("%s: share %.4f, held-out KL %.4f, top-1 %.4f", *key, score.kl, score.top1)
        return [excess_of(self._config, self.score(*key)) for key in zip(names, shares, strict=True)]

    def score(self, name: str, share: float) -> Score:
        """The score of what was measured."""
        tally = Tally()
        for found in self._known[name, share]:
            tally.add(found.tally)
        return tally.score(name)

    def measured(self, name: str, share: float) -> dict[int, Measured]:
        """Cluster -> what was measured of it; not of the dense FFN."""
        return dict(zip(self.clusters[name], self._known[name, share], strict=True))

    def _parts(self, name: str, share: float) -> list[Part]:
        planned = self._shared.planned(share)
        if name == DENSE:
            numbers = tuple(range(self._reference.num_texts))
            return [Part(ffn=None, thresholds="dense", shares=planned, numbers=numbers)]
        return [self._shared.part(cluster, self._members[cluster], planned) for cluster in self.clusters[name]]


def _straight(excess: float) -> float:
    """Bend an excess so that it grows about in a straight line with the share that is left out; its sign stays."""
    return float(max(1 + excess, 0.0) ** (1 / _POWER)) - 1
