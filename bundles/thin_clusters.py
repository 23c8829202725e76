"""Clusters without packs: what a bundle must have where there are any."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .manifest import Manifest

__all__ = ["thin_problems"]


def thin_problems(manifest: "Manifest", *, version: int) -> list[str]:
    """List what thin clusters lack, one line each.

    Args:
        version: of the schema that has them.
    """
    if not manifest.has_thin:
        return []
    first = next(number for number, cluster in enumerate(manifest.clusters) if cluster.file is None)
    lacking = {
        f"schema_version {version}": manifest.schema_version == version,
        "token_shares": manifest.token_shares is not None,
        "the dense FFN": manifest.plan.dense,
        "a model without experts": manifest.model.experts is None,
    }
    return [
        f"manifest.clusters[{first}].file: a cluster without one needs {name}"
        for name, has in lacking.items()
        if not has
    ]
