"""Healing that knows of token shares: packs are trained on what their tokens read of them.

Thresholds come first, for they say what is read. Steps then run through a cluster's inputs as its tokens take them,
some left out and some read in half, and the gradient is that of what is read. What low bits add is that of the packs
before healing, as are thresholds and norms. Healed weights have other activations, so that thresholds are set again.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from coreinfer.compiler.cache import stage_key
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.healing import KnownReading, heal_packs
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.heal import Reading
from coreinfer.compiler.prune.narrow import CLUSTERS, NarrowModel
from coreinfer.compiler.quality.reference import Reference, read_reference
from coreinfer.compiler.quality.stored import stored_packs
from coreinfer.compiler.stages import Ground, held_out_tokens

from .measure import Measured, SharedWeights, measure_parts, part_inputs
from .search import fit_shares
from .stage import share_inputs
from .token_shares import Arrays, find_token_shares, renew_thresholds, shares_key

__all__ = ["Divergence", "gains", "heal_with_shares"]

_log = logging.getLogger(__name__)
_HEALED = "healed"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL of packs on text, nats a token.

    Attributes:
        shared: at the clusters' shares.
        whole: at share 1.
    """

    shared: float
    whole: float


def heal_with_shares(
    config: CompileConfig,
    ground: Ground,
    narrow: NarrowModel,
    reference: Reference | None,
    upstream: str,
    progress: Progress,
) -> tuple[NarrowModel, Arrays]:
    """Heal packs at their clusters' shares; they stay as they are where validation text does not gain.

    Args:
        reference: on which shares are found, where these are to be found.
        upstream: key of the packs.
    Returns:
        The packs, and what `find_token_shares` returns of these.
    Raises:
        BundleError: the disk cannot take packs.
        ConfigError: shares were to be found by a quality that cannot be had.
    """
    material = ground.material
    with stored_packs(material.team, material.stored, {CLUSTERS: narrow}, progress) as packs:
        inputs = share_inputs(config, material, ground.routing, packs[CLUSTERS])
        arrays = find_token_shares(inputs, material.cache, upstream, progress)
        if not material.corpus.validation:
            _log.warning("healing is left out: there is no validation text to check it on; give more calibration text")
            return narrow, arrays
        shared = SharedWeights(
            stored=material.stored,
            packs=packs[CLUSTERS],
            arrays=arrays,
            labels=ground.routing.assignment.held_out,
        )
        num_tokens = held_out_tokens(material, ground.routing)
        shares = fit_shares(config, material.team, reference, shared, num_tokens, progress).clusters
        key = stage_key("reading", upstream=shares_key(inputs, upstream), shares=shares)
        known = KnownReading(key=key, reading=_reading(ground, shared, shares))
        healed_key, healed = heal_packs(config, ground, narrow, upstream, progress, known)
        with stored_packs(material.team, material.stored, {_HEALED: healed}, progress) as healed_packs:
            own = replace(inputs, packs=healed_packs[_HEALED])
            renewed = renew_thresholds(own, arrays, material.cache, healed_key, progress)
            found = [shared, replace(shared, packs=own.packs, arrays=renewed)]
            before, after = _divergences(ground, found, shares, progress)
    return (healed, renewed) if gains(before, after) else (narrow, arrays)


def _reading(ground: Ground, shared: SharedWeights, shares: Sequence[float]) -> Reading:
    """What tokens take of their inputs, by cluster."""
    taken = part_inputs(ground.material.loaded, shared)
    return lambda cluster: taken(shared.part(cluster, (), shared.planned(shares[cluster])), None)


def _divergences(
    ground: Ground, packs: Sequence[SharedWeights], shares: Sequence[float], progress: Progress
) -> list[Divergence]:
    """Measure packs on the validation text, each text with its cluster's, at the clusters' shares and at share 1."""
    material, labels = ground.material, ground.routing.assignment.validation
    token_ids = [document.token_ids for document in material.corpus.validation]
    with read_reference(material.team, token_ids, progress, material.stored, labels) as reference:
        return [_divergence(ground, reference, own, shares, progress) for own in packs]


def _divergence(
    ground: Ground, reference: Reference, own: SharedWeights, shares: Sequence[float], progress: Progress
) -> Divergence:
    members = own.members(ground.routing.assignment.validation)
    rows = [
        [own.part(cluster, numbers, own.planned(read[cluster])) for cluster, numbers in members.items()]
        for read in (shares, [1.0] * len(shares))
    ]
    measured = iter(measure_parts(ground.material.team, reference, own, [*chain(*rows)], progress))
    shared, whole = (_kl(islice(measured, len(row))) for row in rows)
    return Divergence(shared=shared, whole=whole)


def _kl(parts: Iterable[Measured]) -> float:
    total = Measured()
    for part in parts:
        total.merge(part)
    return total.tally.score(CLUSTERS).kl


def gains(before: Divergence, after: Divergence) -> bool:
    """Whether healed packs are better at their shares, and lose no more at share 1 than they gain there."""
    values = (before.shared, after.shared, before.whole, after.whole)
    told = "KL on validation text %.4f before, %.4f after, at share 1 %.4f before, %.4f after"
    if after.shared < before.shared and after.whole - before.whole <= before.shared - after.shared:
        _log.info(f"healing with token shares: {told}", *values)
        return True
    _log.warning(f"healing is left out: {told}; lower --heal-rate or raise --heal-steps", *values)
    return False
