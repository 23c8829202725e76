"""Stage `heal` of a compile: packs are healed, and kept where text that nothing was trained on agrees."""

import logging
from dataclasses import dataclass
from typing import Any

from .cache import stage_key
from .config import CompileConfig
from .progress import Progress
from .prune.heal import HealInputs, Reading, heal, healing_text
from .prune.narrow import CLUSTERS, NarrowModel
from .quality.reference import read_reference
from .quality.stored import stored_packs
from .stages import Ground, score_packs

__all__ = ["KnownReading", "better_packs", "heal_packs"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KnownReading:
    """What tokens read of a pack's inputs, where it is not all.

    Attributes:
        key: of all that it depends on beside the packs.
    """

    key: str
    reading: Reading


def heal_packs(
    config: CompileConfig,
    ground: Ground,
    narrow: NarrowModel,
    upstream: str,
    progress: Progress,
    known: KnownReading | None = None,
) -> tuple[str, NarrowModel]:
    """Heal the clusters' packs.

    Args:
        upstream: key of the stage that made them.
        known: what tokens read of inputs; None for all.
    Returns:
        Key of the healed packs, and these.
    """
    documents, labels = healing_text(config, ground.material.corpus, ground.routing)
    own: dict[str, Any] = {} if known is None else {"reading": known.reading}
    inputs = HealInputs(
        config=config, loaded=ground.material.loaded, documents=documents, labels=labels, narrow=narrow, **own
    )
    key = stage_key(
        "heal",
        upstream=upstream,
        steps=config.effective_heal_steps,
        relative_rate=config.heal_rate,
        optimizer=config.heal_optimizer,
        text=[document.token_ids for document in documents],
        # Without it the key is what it was before there was any such reading.
        **({} if known is None else {"reading": known.key}),
    )
    healed = heal(inputs, ground.material.cache, key, progress)
    return stage_key("healed", upstream=key, cluster_steps=config.heal_cluster_steps), healed


def better_packs(ground: Ground, narrow: NarrowModel, healed: NarrowModel, progress: Progress) -> NarrowModel:
    """Take the healed packs, unless text that nothing was trained on rejects them."""
    material, labels = ground.material, ground.routing.assignment.validation
    if not material.corpus.validation:
        _log.warning("healing is not checked: there is no validation text; give more calibration text")
        return healed
    token_ids = [document.token_ids for document in material.corpus.validation]
    with (
        read_reference(material.team, token_ids, progress, material.stored, labels) as reference,
        stored_packs(material.team, material.stored, {CLUSTERS: narrow, "healed": healed}, progress) as packs,
    ):
        models = {name: (pack.cut, labels) for name, pack in packs.items()}
        quality = score_packs(material, reference, models, progress)
    before, after = quality.clusters.kl, quality.controls[0].kl
    _log.info("healing: KL on validation text %.4f before, %.4f after", before, after)
    if after < before:
        return healed
    _log.warning(
        "healing is left out: KL on validation text rises from %.4f to %.4f; lower --heal-rate or raise --heal-steps",
        before,
        after,
    )
    return narrow
