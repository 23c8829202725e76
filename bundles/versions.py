"""Versions of the bundle's schema: which there are, and which a bundle needs."""

__all__ = [
    "EXPERT_SHARES_VERSION",
    "HALVES_VERSION",
    "LISTED_EXPERTS_VERSION",
    "READ_VERSIONS",
    "SCHEMA_VERSION",
    "THIN_VERSION",
    "needed_version",
]

SCHEMA_VERSION = 3
THIN_VERSION = 4
"""Of bundles with thin clusters; what reads up to version 3 would look for their packs."""
EXPERT_SHARES_VERSION = 5
"""Of mixtures of experts with token shares; what reads up to version 4 knows no norms of an expert's columns."""
HALVES_VERSION = 6
"""Of bundles whose tokens read inputs in half; what reads up to version 5 would leave these inputs out or read them."""
LISTED_EXPERTS_VERSION = 7
"""Of packs with some experts alone, each narrower; what reads up to version 6 would look for the others' weights."""
READ_VERSIONS = (2, SCHEMA_VERSION, THIN_VERSION, EXPERT_SHARES_VERSION, HALVES_VERSION, LISTED_EXPERTS_VERSION)


def needed_version(
    *, is_mixture: bool, has_token_shares: bool, is_thin: bool, has_halves: bool, lists_experts: bool
) -> int:
    """Return the lowest version whose readers understand a bundle.

    Args:
        is_mixture: whether the FFN is a mixture of experts.
        is_thin: whether there are thin clusters.
        has_halves: whether tokens read inputs in half.
        lists_experts: whether packs have some experts alone, each narrower.
    """
    if lists_experts:
        return LISTED_EXPERTS_VERSION
    if has_halves:
        return HALVES_VERSION
    if is_mixture and has_token_shares:
        return EXPERT_SHARES_VERSION
    return THIN_VERSION if is_thin else SCHEMA_VERSION
