"""Token shares: which inputs of a layer's matrices a decoded token leaves out, and which it reads in half.

Input j of a group of matrices is wanted where |x_j| times the norm of its column passes a threshold (TEAL, arXiv
2408.14690; WINA, arXiv 2505.19427). Each of a token's experts wants its own inputs: there the norm is that of the
expert's own column, times what the router multiplies the expert's output by, and all experts of a layer have one
threshold. An int4 input that passes it, but not the group's ratio times it, is read in half: of each weight's code the
two high bits, the low ones being taken for their mean. The file has, for each layer and group, the thresholds by which
shares of inputs are read on calibration text, where halves count half, and a plan: what share each group has where the
layers together have some share of their bytes.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .contract import ATTENTION_GROUPS, INPUT_GROUPS, expert_role, norms_role, tensor_name
from .errors import ConfigError
from .manifest import Manifest, ModelRecord, TokenSharesRecord
from .tensors import TensorFile

if TYPE_CHECKING:
    from .reader import Bundle

__all__ = [
    "READ_ALL",
    "check_token_shares",
    "column_norms",
    "default_share",
    "ffn_with_norms",
    "least_share",
    "mean_ffn_bytes",
    "mean_share",
    "shares_at",
    "shares_in_words",
    "thresholds_at",
    "token_thresholds",
]

Floats = npt.NDArray[np.float32]

MOST_RATIO = 16.0
"""Of what an input's score must pass to be read whole, and what it must pass to be read at all."""
READ_ALL = np.float32(-1)
"""A threshold that every input passes, zeros too."""
_WHOLE = 1 - 1e-6


def default_share(manifest: Manifest, cluster: int | None) -> float:
    """Return the share of the layers' bytes that is read where a generation does not say.

    Args:
        cluster: whose pack decodes; None for the dense FFN.
    """
    record = manifest.token_shares
    if record is None:
        return 1.0
    return record.default if cluster is None else record.clusters[cluster]


def mean_share(manifest: Manifest) -> float:
    """Return the share of the layers' bytes that a cluster reads: the mean over the clusters' calibration tokens."""
    record, counts = manifest.token_shares, [cluster.num_tokens for cluster in manifest.clusters]
    if record is None:
        return 1.0
    return float(np.average(record.clusters, weights=counts if sum(counts) else None))


def mean_ffn_bytes(manifest: Manifest) -> float:
    """Return the FFN bytes that a cluster reads at its share: the mean over the clusters' calibration tokens."""
    counts = [cluster.num_tokens for cluster in manifest.clusters]
    own = [default_share(manifest, number) * cluster.ffn_bytes for number, cluster in enumerate(manifest.clusters)]
    return float(np.average(own, weights=counts if sum(counts) else None))


def shares_in_words(manifest: Manifest, record: TokenSharesRecord) -> str:
    """Say what tokens read of the layers' weights: dense, and by the clusters, smallest to largest share."""
    shares = [f"{share:g}" for share in sorted(set(record.clusters))]
    own = shares[0] if len(shares) == 1 else f"{shares[0]} to {shares[-1]}, {mean_share(manifest):.3g} on average,"
    how = "with a pack" if manifest.pack_files else "by a thin cluster"
    if manifest.pack_files and manifest.has_thin:
        how = "with a pack or by a thin cluster"
    halves = ", some inputs in half" if record.halves else ""
    return f"reads {record.default:g} of the layers' weights dense, {own} {how}{halves}"


def least_share(bundle: "Bundle") -> float:
    """Return the lowest share that a bundle has a plan for; 1 where it has no token shares."""
    return 1.0 if bundle.token_shares is None else float(bundle.token_shares["targets"].array[0])


def token_thresholds(bundle: "Bundle", cluster: int | None, share: float) -> Floats:
    """Return the thresholds at a share of the layers' bytes.

    Args:
        cluster: whose pack decodes; None for the dense FFN.
        share: from `least_share` to 1.
    Returns:
        (layers, 4, 2) float32 by `INPUT_GROUPS`: what a score must pass that its input is read at all, and what it must
        pass to be read whole; both -1 where all inputs are.
    Raises:
        ConfigError: the bundle has no such share, or no dense FFN.
    """
    file, least = bundle.token_shares, least_share(bundle)
    if share >= 1:
        return np.full((bundle.manifest.model.num_layers, len(INPUT_GROUPS), 2), READ_ALL)
    if file is None:
        raise ConfigError("token_share: this bundle has no token shares; compile it with --token-share")
    if share < least - 1e-6:
        raise ConfigError(f"token_share: expected {least:g} to 1 with this bundle, got {share:g}")
    if cluster is None and bundle.dense is None:
        raise ConfigError(f"bundle {bundle.path} has no dense FFN; compile it with --dense or use a cluster")
    asked = shares_at(file["targets"].array, file["plan"].array, share)
    known = file[f"thresholds.{'dense' if cluster is None else cluster}"].array
    ratios = file["half_ratios"].array if bundle.manifest.has_halves else np.ones_like(asked)
    return thresholds_at(file["levels"].array, known, asked, ratios)


def ffn_with_norms(bundle: "Bundle", cluster: int | None) -> TensorFile:
    """Return the file of the FFN that a choice decodes with, in which the norms of its columns are.

    Args:
        cluster: whose pack decodes; None for the dense FFN.
    """
    own, manifest = bundle.weights_of(cluster), bundle.manifest
    # Experts that a pack only names are the dense FFN's.
    if own is None or (manifest.model.experts is not None and not manifest.narrows_experts):
        assert bundle.dense is not None
        return bundle.dense
    return bundle.pack(own)


def column_norms(base: TensorFile, ffn: TensorFile, model: ModelRecord, layer: int, group: str) -> Floats:
    """Return the norms of the columns of a group's matrices, (inputs,) float32; of experts (experts, inputs).

    Experts that a pack lacks, which no token chooses, have 0.
    """
    if group in ATTENTION_GROUPS:
        return base[tensor_name(layer, norms_role(group))].array
    if model.experts is None:
        return ffn[tensor_name(layer, norms_role(group))].array
    names = [tensor_name(layer, expert_role(number, norms_role(group))) for number in range(model.experts.num_experts)]
    own = {number: ffn[name].array for number, name in enumerate(names) if name in ffn}
    norms = np.zeros((len(names), next(iter(own.values())).size), dtype=np.float32)
    for number, found in own.items():
        norms[number] = found
    return norms


def shares_at(targets: Floats, plan: Floats, share: float) -> Floats:
    """Return what share of its inputs each group has at a share of the layers' bytes.

    Args:
        targets: (targets,) ascending.
        plan: (targets, layers, 4).
    Returns:
        (layers, 4) float32.
    """
    after = int(np.searchsorted(targets, share).clip(1, len(targets) - 1))
    low, high = float(targets[after - 1]), float(targets[after])
    weight = np.float32(np.clip((share - low) / (high - low), 0, 1))
    return np.asarray((1 - weight) * plan[after - 1] + weight * plan[after], dtype=np.float32)


def thresholds_at(levels: Floats, known: Floats, shares: Floats, ratios: Floats) -> Floats:
    """Return the thresholds by which shares of inputs are read.

    Args:
        levels: (levels,) ascending shares.
        known: (layers, 4, levels) thresholds.
        shares: (layers, 4).
        ratios: (layers, 4) of what an input must pass to be read whole; 1 where none is read in half.
    Returns:
        (layers, 4, 2) float32; see `token_thresholds`.
    """
    found = np.empty(shares.shape, dtype=np.float32)
    for place in np.ndindex(*shares.shape):
        found[place] = np.interp(shares[place], levels, known[place])
    pairs = np.stack([found, ratios * found], axis=-1)
    return np.where((shares >= _WHOLE)[..., None], READ_ALL, pairs)


def check_token_shares(file: TensorFile, manifest: Manifest) -> list[str]:
    """Check what a file of token shares holds, whose shapes are right, and the shares that the manifest names.

    Returns:
        One line for each thing that is wrong.
    """
    record = manifest.token_shares
    assert record is not None
    problems = [f"{file.path}: {name}: expected finite numbers" for name in file if not _is_finite(file, name)]
    if problems:
        return problems
    for name, first in (("levels", 0.0), ("targets", None)):
        values = file[name].array
        ascends = len(values) > 1 and bool(np.all(np.diff(values) > 0))
        if not ascends or values[-1] != 1 or (values[0] != first if first is not None else values[0] <= 0):
            problems.append(f"{file.path}: {name}: expected ascending shares that end at 1")
            return problems
    if not np.all((file["plan"].array >= 0) & (file["plan"].array <= 1)):
        problems.append(f"{file.path}: plan: expected shares from 0 to 1")
    least, shares = float(file["targets"].array[0]), (record.default, *record.clusters)
    if len(record.clusters) != len(manifest.clusters) or not all(least - 1e-6 <= share <= 1 for share in shares):
        problems.append(f"{file.path}: expected a default from {least:g} to 1 of each cluster, got {shares}")
    return [*problems, *_half_problems(file, manifest)]


def _half_problems(file: TensorFile, manifest: Manifest) -> Iterator[str]:
    """Say which ratios cannot be, one line each."""
    if not manifest.has_halves:
        return
    ratios = file["half_ratios"].array
    if not np.all((ratios >= 1) & (ratios <= MOST_RATIO)):
        yield f"{file.path}: half_ratios: expected numbers from 1 to {MOST_RATIO:g}"
        return
    for place, group in enumerate(INPUT_GROUPS):
        if np.any(ratios[:, place] > 1) and not _has_halves(manifest, group):
            kind = "of experts" if manifest.model.experts is not None else f"in {_format_of(manifest, group)}"
            yield f"{file.path}: half_ratios: expected 1 of {group}, whose matrices, {kind}, have no halves"


def _has_halves(manifest: Manifest, group: str) -> bool:
    return manifest.model.experts is None and _format_of(manifest, group) == "int4"


def _format_of(manifest: Manifest, group: str) -> str:
    return manifest.quantization["attention" if group in ATTENTION_GROUPS else "ffn"].format


def _is_finite(file: TensorFile, name: str) -> bool:
    return bool(np.all(np.isfinite(file[name].array)))
