"""Clusters without packs, and token shares: what a bundle must have where there are any."""

from typing import TYPE_CHECKING

from .versions import needed_version

if TYPE_CHECKING:
    from .manifest import Manifest

__all__ = ["share_problems"]


def share_problems(manifest: "Manifest") -> list[str]:
    """List what thin clusters and token shares lack, one line each."""
    version = needed_version(
        is_mixture=manifest.model.experts is not None,
        has_token_shares=manifest.token_shares is not None,
        is_thin=manifest.has_thin,
        has_halves=manifest.has_halves,
        lists_experts=False,
    )
    # Readers of a lower version would take them for something else.
    lacking = {f"schema_version {version}": manifest.schema_version >= version}
    if manifest.has_thin:
        first = next(number for number, cluster in enumerate(manifest.clusters) if cluster.file is None)
        what = f"manifest.clusters[{first}].file: a cluster without one needs"
        lacking |= {"token_shares": manifest.token_shares is not None, "the dense FFN": manifest.plan.dense}
    elif manifest.has_halves:
        what = "manifest.token_shares.halves: inputs that are read in half need"
    else:
        what = "manifest.token_shares: those of a mixture of experts need"
    return [f"{what} {name}" for name, has in lacking.items() if not has]
