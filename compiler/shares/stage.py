"""Token shares of a compile: found, measured, and written beside the model's files."""

from collections.abc import Sequence
from dataclasses import dataclass

from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import PackChoice, Quality, TokenSharesRecord
from coreinfer.bundles.writer import disk_errors
from coreinfer.compiler.cache import stage_key
from coreinfer.compiler.clusters.route import Routing
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.quality.reference import Reference
from coreinfer.compiler.quality.stored import StoredPacks
from coreinfer.compiler.stages import Material, held_out_tokens

from .halves import reads_halves
from .measure import SharedWeights
from .score import ScoredShares, score_token_shares
from .search import Shares, fit_shares
from .token_shares import Arrays, ShareInputs, has_halves, write_token_shares

__all__ = ["FoundShares", "keep_token_shares", "set_token_shares", "share_inputs", "thin_key"]


@dataclass(frozen=True, kw_only=True)
class FoundShares:
    """What a compile's token shares are.

    Attributes:
        quality: where some clusters are thin; None where all have packs, which are scored themselves, or nothing was
            measured.
    """

    record: TokenSharesRecord
    quality: Quality | None


def thin_key(material: Material, routing: Routing) -> str:
    """Key of all that the thresholds of thin clusters depend on."""
    return stage_key("thin", upstream=material.key, clusters=routing.clustering.labels.tolist())


def share_inputs(config: CompileConfig, material: Material, routing: Routing, packs: StoredPacks | None) -> ShareInputs:
    """Say what the token shares of the clusters are made of.

    Args:
        packs: of the clusters; None where all are thin.
    """
    return ShareInputs(
        loaded=material.team.loaded,
        stored=material.stored,
        packs=packs,
        documents=material.corpus.calibration,
        labels=routing.clustering.labels,
        seed=config.seed,
        halves=reads_halves(config, material.team.loaded),
    )


def set_token_shares(
    config: CompileConfig,
    material: Material,
    routing: Routing,
    reference: Reference | None,
    inputs: ShareInputs,
    arrays: Arrays,
    progress: Progress,
) -> FoundShares:
    """Choose and measure the clusters' token shares, and write their file into the stored model's folder.

    Args:
        inputs: of `share_inputs`.
        arrays: what `find_token_shares` made of them.
    Raises:
        BundleError: the disk cannot take the file.
        ConfigError: shares were to be found by a quality that cannot be had.
    """
    shared = SharedWeights(
        stored=material.stored, packs=inputs.packs, arrays=arrays, labels=routing.assignment.held_out
    )
    num_tokens: Sequence[int] = held_out_tokens(material, routing)
    shares = fit_shares(config, material.team, reference, shared, num_tokens, progress)
    return keep_token_shares(config, material, reference, shared, shares, num_tokens, progress)


def keep_token_shares(
    config: CompileConfig,
    material: Material,
    reference: Reference | None,
    shared: SharedWeights,
    shares: Shares,
    num_tokens: Sequence[int],
    progress: Progress,
    choices: tuple[PackChoice, ...] = (),
) -> FoundShares:
    """Write the file of token shares that were found into the stored model's folder, and measure what they cost.

    Args:
        num_tokens: (clusters,) held-out tokens of each cluster that are decoded.
        choices: how it was decided which clusters are thin, where that was asked for.
    Raises:
        BundleError: the disk cannot take the file.
    """
    arrays = shared.arrays
    with disk_errors(config.output):
        write_token_shares(material.stored.folder / LAYOUT.token_shares, arrays, with_dense=config.dense)
    scored = ScoredShares(scores=(), quality=None)
    if config.evaluate and reference:
        scored = score_token_shares(
            material.team, reference, shared, shares, num_tokens, seed=config.seed, progress=progress
        )
    record = TokenSharesRecord(
        default=shares.dense,
        clusters=shares.clusters,
        num_levels=len(arrays["levels"]),
        num_targets=len(arrays["targets"]),
        scores=scored.scores,
        halves=has_halves(arrays),
        choices=choices,
    )
    return FoundShares(record=record, quality=scored.quality)
