"""How much text, and how many neurons at a time, the stages take: they, and the estimate of a compile, go by these."""

from coreinfer.bundles.formats import GROUP_SIZE

__all__ = [
    "MOMENT_TOKENS",
    "NEURON_BLOCK",
    "PACKED_ROWS",
    "PROFILE_TOKENS",
    "ROUTER_DIMENSION",
    "NUM_SHARE_LEVELS",
    "NUM_SHARE_TARGETS",
    "SHARE_COST_TOKENS",
    "SUMS_BYTES",
    "SPLIT_TOKENS",
    "VALIDATION_TOKENS",
    "batch_tokens",
    "curve_tokens",
    "fisher_tokens",
    "num_candidates",
    "share_tokens",
]

MOMENT_TOKENS = 4096
"""Means of squares settle soon: more tokens change nothing that rounding could see."""
SPLIT_TOKENS = 16_384
"""Of mixtures, that what fewer experts and narrower ones cost is measured on."""
PROFILE_TOKENS = 16_384
"""Enough for scores that no neuron is removed by; it is what modes stability and fused go by at run time."""
VALIDATION_TOKENS = 4096
"""Ridges differ enough in their costs; of these tokens half are read narrow."""
SHARE_COST_TOKENS = 4096
"""Half of them are scored, by gradients: one pass forward and one back."""
NUM_SHARE_LEVELS, NUM_SHARE_TARGETS = 33, 15
"""Shares of inputs that there are thresholds for, and shares of the layers' bytes that there are plans for."""
NEURON_BLOCK = GROUP_SIZE
"""Kept neurons a layer are a multiple of this, the kernels' group size."""
PACKED_ROWS = 64
"""Of a symmetric matrix, rows of a block that is packed as one: see `prune.triangle`."""
ROUTER_DIMENSION = 128
"""Of the router's table, where its encoder has more: 64 clusters are told apart as well as in 384 (docs/dev/log.md)."""
SUMS_BYTES = 6 << 30
"""What sums over the text may take on the disk, to be kept while layers are narrowed again."""
_LEAST_FISHER_TOKENS, _MOST_FISHER_TOKENS = 4096, 8192
_LEAST_CURVE_TOKENS, _MOST_CURVE_TOKENS = 8192, 16_384
_SPARE_CANDIDATES, _MOST_CANDIDATES = 0.55, 0.9
_MOST_BATCH_TOKENS, _MOST_BATCH_LOGITS = 1024, 1 << 25
_ALL_SHARE_TOKENS, _LEAST_SHARE_TOKENS, _MOST_SHARE_TOKENS = 8192, 256, 2048


def batch_tokens(vocab_size: int) -> int:
    """Tokens of the held-out texts that are read together at most, with padding: their logits are in memory."""
    return max(1, min(_MOST_BATCH_TOKENS, _MOST_BATCH_LOGITS // vocab_size))


def fisher_tokens(hidden_size: int) -> int:
    """Tokens whose gradients make Fisher matrices of (hidden size, hidden size): four for each row, within bounds."""
    return min(max(4 * hidden_size, _LEAST_FISHER_TOKENS), _MOST_FISHER_TOKENS)


def curve_tokens(ffn_dim: int) -> int:
    """Tokens whose activations make Gram matrices of (ffn_dim, ffn_dim): four for each row, within bounds."""
    return min(max(4 * ffn_dim, _LEAST_CURVE_TOKENS), _MOST_CURVE_TOKENS)


def num_candidates(num_kept: int, ffn_dim: int) -> int:
    """Neurons of a layer that repairs look at, where no cluster keeps more than some: a multiple of 32, or all.

    Beside what is kept half of the rest and a little more: what 16 clusters keep lies there but for half a percent
    (docs/dev/log.md). Of so many that hardly any would be left out, all.
    """
    wanted = int(num_kept + _SPARE_CANDIDATES * (ffn_dim - num_kept))
    whole = -(-wanted // NEURON_BLOCK) * NEURON_BLOCK
    return ffn_dim if whole > _MOST_CANDIDATES * ffn_dim else whole


def share_tokens(num_clusters: int) -> int:
    """Tokens of each cluster's text that its token shares are set by; half of them are read as they are decoded."""
    return min(max(_ALL_SHARE_TOKENS // num_clusters, _LEAST_SHARE_TOKENS), _MOST_SHARE_TOKENS)
