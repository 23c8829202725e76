"""Token shares of a compile: found, measured, and written beside the model's files."""

from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import TokenSharesRecord
from coreinfer.bundles.writer import disk_errors
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.quality.reference import Reference
from coreinfer.compiler.quality.stored import StoredPacks
from coreinfer.compiler.stages import Ground

from .score import SharedWeights, score_token_shares
from .token_shares import ShareInputs, find_token_shares, write_token_shares

__all__ = ["set_token_shares"]


def set_token_shares(
    config: CompileConfig,
    ground: Ground,
    reference: Reference | None,
    packs: StoredPacks,
    upstream: str,
    progress: Progress,
) -> TokenSharesRecord:
    """Find the token shares of the clusters' packs, and write their file into the stored model's folder.

    Args:
        upstream: key of the packs.
    Raises:
        BundleError: the disk cannot take the file.
    """
    material, routing, share = ground.material, ground.routing, config.token_share
    assert share is not None
    inputs = ShareInputs(
        loaded=material.team.loaded,
        stored=material.stored,
        packs=packs,
        documents=material.corpus.calibration,
        labels=routing.clustering.labels,
        seed=config.seed,
    )
    arrays = find_token_shares(inputs, material.cache, upstream, progress)
    with disk_errors(config.output):
        write_token_shares(material.stored.folder / LAYOUT.token_shares, arrays, with_dense=config.dense)
    shared = SharedWeights(stored=material.stored, packs=packs, arrays=arrays, labels=routing.assignment.held_out)
    return TokenSharesRecord(
        default=share,
        clusters=(share,) * routing.clustering.num_clusters,
        num_levels=len(arrays["levels"]),
        num_targets=len(arrays["targets"]),
        scores=score_token_shares(material.team, reference, shared, share, progress)
        if config.evaluate and reference
        else (),
    )
