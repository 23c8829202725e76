"""Bundles that readers of lower schema versions would take for something else."""

import re
from pathlib import Path

import pytest
from coreinfer.bundles import BundleCorrupt, BundleVersionError, manifest, open_bundle

from .bundle_factory import edit_manifest


def check_older_readers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, known: tuple[int, ...], lower: int, said: str
) -> None:
    """Check that a bundle's version is refused by readers of others, and that it may have no lower one.

    Args:
        folder: of a bundle that may be changed; it has the version `lower` then.
        known: versions that an older reader reads.
        said: what is said of the lower version.
    """
    needed = open_bundle(folder).manifest.schema_version
    *first, last = map(str, known)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "READ_VERSIONS", known)
        expected = f"schema version {needed}, this coreinfer reads {', '.join(first)} and {last}; upgrade coreinfer"
        with pytest.raises(BundleVersionError, match=expected):
            open_bundle(folder)
    with edit_manifest(folder) as data:
        data["schema_version"] = lower
    with pytest.raises(BundleCorrupt, match=re.escape(said)):
        open_bundle(folder)
